"""Files that are complete or absent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from etils import epath


@contextlib.contextmanager
def replacing(path: epath.Path) -> Iterator[epath.Path]:
    """A path beside `path` to write to; it becomes `path` at the end of the block, so nobody reads half a file. After an
    error what was there stays."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    partial.replace(path)
