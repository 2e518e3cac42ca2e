"""The page that a command's `--help` prints: its example, what it does, its flags by groups."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence

WIDEST, COLUMN = 100, 28  # of the page, and at most of the flags' names on it


@dataclasses.dataclass(frozen=True)
class Entry:
    """One flag: as it is typed, what it does, and lines such as the names that it takes."""

    typed: str
    help: str
    lines: Sequence[str] = ()


def make_page(doc: str, groups: Mapping[str, Sequence[Entry]], width: int) -> str:
    """Return the page for a terminal of `width` columns. `doc`: the command's docstring, whose
    first paragraph has its examples, one a line.
    """
    width = min(width, WIDEST)
    examples, *about = doc.strip().split("\n\n")
    parts = ["Example:\n" + textwrap.indent(examples, "  ")]
    for paragraph in about:
        is_table = any(line.startswith(" ") for line in paragraph.splitlines())
        parts.append(paragraph if is_table else textwrap.fill(paragraph, width))
    for title, entries in groups.items():
        lines = [line for entry in entries for line in _of_entry(entry, _column(groups), width)]
        parts.append("\n".join([f"{title}:", *lines]))
    return "\n\n".join(parts)


def _column(groups: Mapping[str, Sequence[Entry]]) -> int:
    """Where the flags' descriptions begin: longer names have a line of their own."""
    lengths = [len(entry.typed) + 4 for entries in groups.values() for entry in entries]
    return min(COLUMN, max(lengths))


def _of_entry(entry: Entry, column: int, width: int) -> list[str]:
    described = textwrap.wrap(entry.help, width - column)
    for line in entry.lines:
        described += textwrap.wrap(line, width - column, subsequent_indent="  ")
    head = f"  {entry.typed}"
    if len(head) + 2 > column:
        described.insert(0, "")
    first, *rest = described
    return [f"{head:<{column}}{first}".rstrip(), *(" " * column + line for line in rest)]
