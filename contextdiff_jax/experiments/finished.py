"""Finished cells: one JSON Lines file a plan, one line a cell, each written whole."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from contextdiff_jax.runtime.files import replacing


def read_finished(path: pathlib.Path) -> list[dict[str, Any]]:
    """Read the cells in a plan's file; none if there is no file.

    ValueError, with the line's number, for a line that is not a cell.
    """
    return [cell for _, cell in _lines(path)]


def add_finished(path: pathlib.Path, cell: Mapping[str, Any]) -> None:
    """Add a cell's line, in the place of an older one of the same variant and seed.

    Processes may do so at the same time. Each reads and replaces the file while it holds a lock, so
    no line is lost, and a process that is killed leaves the file as it was.
    """
    with _locked(path):
        kept = [line for line, other in _lines(path) if _name(other) != _name(cell)]
        with replacing(path) as partial, partial.open("w") as file:
            file.writelines(line + "\n" for line in [*kept, json.dumps(cell)])
            file.flush()
            os.fsync(file.fileno())


def _lines(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [(line, _parse(line, f"{path}:{n}")) for n, line in enumerate(lines, start=1)]


def _parse(line: str, place: str) -> dict[str, Any]:
    with contextlib.suppress(json.JSONDecodeError):
        cell = json.loads(line)
        if isinstance(cell, dict) and {"variant", "seed", "config", "options"} <= cell.keys():
            return cell
    raise ValueError(f"{place}: not a finished cell; without this line the cell is run again")


def _name(cell: Mapping[str, Any]) -> tuple[str, int]:
    return cell["variant"], cell["seed"]


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
