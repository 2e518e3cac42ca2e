"""Files that are complete or absent, and logs of which a line may be torn."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

LOGGER = logging.getLogger(__name__)


@contextlib.contextmanager
def replacing(path: epath.Path) -> Iterator[epath.Path]:
    """A path beside `path` to write to; it becomes `path` at the end of the block, so nobody reads
    half a file. After an error what was there stays, and the OSError names the file: that of a
    write to a full disk doesn't.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def write_json(path: epath.Path, values: Mapping[str, Any], sort_keys: bool = False) -> None:
    """A JSON object for people to read, complete or not at all."""
    with replacing(path) as file:
        file.write_text(json.dumps(values, indent=2, sort_keys=sort_keys) + "\n")


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """The JSON objects of a metrics.jsonl, one a line. What a crash or a full disk tore is left
    out, and said.
    """
    rows, torn = [], 0
    for line in filter(bytes.strip, path.read_bytes().splitlines()):
        try:
            rows.append({**json.loads(line)})
        except (ValueError, TypeError):  # half a line, or zeros where the power failed
            torn += 1
    if torn:
        LOGGER.warning("%s: %d torn or damaged lines are left out", path, torn)
    return rows
