"""Pictures in a folder with JSON-lines metadata: Hugging Face's imagefolder convention.

    path/metadata.jsonl     {"file_name": "images/1.png", "text": "a horse", ...}     one record a line
    path/images/1.png

`file_name` is relative to the metadata file; the caption may be a list of captions. Other fields
are kept as attributes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

from contextdiff_jax.data.decoding import decode
from contextdiff_jax.data.kept import fingerprint
from contextdiff_jax.data.records import (
    BrokenRecords,
    Encoded,
    PictureConfig,
    PictureSource,
    captions_of,
    find_files,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderConfig(PictureConfig):
    """Which pictures to read. `metadata`: name or glob of the metadata files in `path`."""

    metadata: str = "metadata*.jsonl"


@dataclasses.dataclass(frozen=True)
class _Entry:
    path: str
    captions: list[str]
    attributes: dict[str, Any]


class _Pictures:
    """Tells whether a file exists from one listing a folder: a `stat` each is slow on network
    disks.
    """

    def __init__(self):
        self._listings: dict[str, frozenset[str]] = {}

    def __contains__(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._listings:
            self._listings[folder] = (
                frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()
            )
        return name in self._listings[folder]


def _parse_line(line: str, folder: pathlib.Path, caption_field: str, pictures: _Pictures) -> _Entry:
    """One metadata line; ValueError with the reason if it is broken."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from error
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    if not isinstance(fields.get("file_name"), str):
        raise ValueError(
            f"field 'file_name' is {'not a string' if 'file_name' in fields else 'missing'}"
        )
    captions = captions_of(fields, caption_field)
    path = os.path.normpath(folder / fields.pop("file_name"))
    if path not in pictures:
        raise ValueError(f"no such picture: {path}")
    del fields[caption_field]
    return _Entry(path, captions, fields)


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of the lines that are not blank."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _index(files: list[pathlib.Path], caption_field: str) -> tuple[list[_Entry], list[str]]:
    """(the good records, the reasons of the broken ones with file:line)."""
    entries, broken, pictures = [], [], _Pictures()
    for file in files:
        for number, line in _lines(file):
            try:
                entries.append(_parse_line(line, file.parent, caption_field, pictures))
            except ValueError as error:
                broken.append(f"{file}:{number}: {error}")
    return entries, broken


def load_image(path: str, image_size: int) -> UInt8[np.ndarray, "S S 3"]:
    """Decodes a picture file: see `decode`."""
    return decode(pathlib.Path(path).read_bytes(), (image_size, image_size))


class FolderSource(PictureSource):
    """Random access to the good records of a folder."""

    def __init__(self, config: FolderConfig):
        """Reads the metadata.

        Raises:
            ValueError: if there is no such folder or metadata, no good record, or too many broken
                ones.
        """
        self.config = config
        files = find_files(config.path, config.metadata, "file")
        self._entries, broken = _index(files, config.caption_field)
        self._key = fingerprint(files)
        total = len(self._entries) + len(broken)
        self.broken = BrokenRecords(
            config.path, total, config.max_broken_fraction, len(broken), broken
        )
        if not self._entries:
            raise ValueError(f"data.metadata={config.metadata!r}: holds no records")

    def __len__(self) -> int:
        return len(self._entries)

    def cache_key(self) -> str:
        return f"folder {self._key}"

    def where(self, index: int) -> str:
        return self._entries[index].path

    def read(self, index: int) -> Encoded:
        entry = self._entries[index]
        return Encoded(
            pathlib.Path(entry.path).read_bytes(), entry.captions, dict(entry.attributes)
        )
