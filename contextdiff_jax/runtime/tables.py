"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Make a table of texts: the first column to the left, the others to the right."""
    sides = ("left", *["right"] * (len(head) - 1))
    return tabulate(rows, head, tablefmt="plain", colalign=sides, disable_numparse=True)
