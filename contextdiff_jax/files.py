"""Files that are complete or absent."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath


@contextlib.contextmanager
def replacing(path: epath.Path) -> Iterator[epath.Path]:
    """A path beside `path` to write to; it becomes `path` at the end of the block, so nobody reads
    half a file. After an error what was there stays.
    """
    partial = path.with_name(path.name + ".partial")
    yield partial
    partial.replace(path)


def write_json(path: epath.Path, values: Mapping[str, Any], sort_keys: bool = False) -> None:
    """A JSON object for people to read, complete or not at all."""
    with replacing(path) as file:
        file.write_text(json.dumps(values, indent=2, sort_keys=sort_keys) + "\n")
