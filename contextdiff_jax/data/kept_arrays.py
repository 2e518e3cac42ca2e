"""Arrays that are computed once from a data set and kept on disk, memory-mapped, checked, never
half written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pathlib
import tempfile
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

LOGGER = logging.getLogger(__name__)
KEPT = ".contextdiff_jax"  # the folder in a data set's, by default
_FORMAT = 2  # part of every key: raise it when what is stored changes its meaning


def digest(facts: Any) -> str:
    """A short digest of JSON-able facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint(files: Iterable[str | pathlib.Path], root: str, here: bool = True) -> str:
    """A digest of the files' names below `root`, sizes and times of change.

    `here`: also the time of the last change on this disk, which no program can set back, and which
    a copy does not keep.
    """
    facts = []
    for file in files:
        try:
            stat = os.stat(file)
            facts.append((stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns if here else 0))
        except OSError as error:  # a record that is broken is told when it is read
            facts.append((error.strerror, 0, 0))
        facts.append(os.path.relpath(file, root))
    return digest(facts)


def kept_array(
    path: str,
    index_folder: str,
    name: str,
    key: str,
    make: Callable[[], tuple[np.ndarray, dict[str, Any]]],
) -> tuple[np.ndarray, dict[str, Any]]:
    """The array and the JSON-able facts that `make` gives, from disk if they were made before under
    this key.

    An array read from disk is a read-only memory map. A stored one that is incomplete or changed is
    made anew.

    Args:
        path: the data set's folder.
        index_folder: folder to keep them in; empty: `.contextdiff_jax` in `path`.
        name: what is stored.
        key: a `fingerprint` of what it was made from.
        make: makes it.

    Raises:
        ValueError: if the folder cannot be written.
    """
    folder = pathlib.Path(index_folder or pathlib.Path(path, KEPT))
    # The path is part of the key: several data sets may share a folder.
    place = hashlib.sha256(f"{_FORMAT} {os.path.abspath(path)} {key}".encode()).hexdigest()[:16]
    array_file, facts_file = folder / f"{name}-{place}.npy", folder / f"{name}-{place}.json"
    if facts_file.exists():
        try:
            facts = json.loads(facts_file.read_text())
            array = np.load(array_file, mmap_mode="r")
            if zlib.crc32(array) == facts.pop("crc32"):
                return array, facts
            reason = "another checksum"
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            reason = str(error)
        LOGGER.warning("%s is damaged and is made anew: %s", array_file, reason)
    array, facts = make()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(array_file, lambda file: np.save(file, array))
        facts_text = json.dumps({**facts, "crc32": zlib.crc32(np.ascontiguousarray(array))})
        _write(facts_file, lambda file: file.write(facts_text.encode()))
    except OSError as error:
        raise ValueError(
            f"data.index_folder={index_folder!r}: {folder} cannot be written ({error.strerror}); "
            "name a folder that can"
        ) from error
    return array, facts


def _write(path: pathlib.Path, write: Callable[[Any], Any]) -> None:
    """Visible when complete, also where several processes write the same file."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        write(file)
    os.chmod(file.name, 0o644)  # temporary files are private; this is shared
    os.replace(file.name, path)
