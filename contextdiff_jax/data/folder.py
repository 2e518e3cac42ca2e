"""Pictures in a folder with a table of captions: Hugging Face's imagefolder convention.

    path/metadata.jsonl     {"file_name": "images/1.png", "text": "a horse", ...}, one a line
    path/images/1.png

or `metadata.csv` or `metadata.parquet` with columns of these names (see `tables`). `file_name` is
relative to the metadata file, with / or \\ between its parts. The caption may be a list of them.
Other fields are kept as attributes.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import unicodedata
from typing import Any

import numpy as np
from jaxtyping import UInt8

from contextdiff_jax.data.decoding import decode
from contextdiff_jax.data.kept_arrays import digest, fingerprint
from contextdiff_jax.data.metadata import Fields, rows_of
from contextdiff_jax.data.records import (
    BrokenRecords,
    Encoded,
    PictureConfig,
    PictureSource,
    captions_of,
    find_files,
)

_MAX_COMPARED = 100_000  # pictures whose sizes processes compare: a `stat` each takes its time


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderConfig(PictureConfig):
    """A choice of pictures to read. `metadata`: name or glob of the metadata files in `path`."""

    metadata: str = "metadata*.jsonl"


@dataclasses.dataclass(frozen=True)
class _Entry:
    path: str
    captions: list[str]
    attributes: dict[str, Any]


class _Pictures:
    """Finds files by listing a folder once: a `stat` each is slow on network disks."""

    def __init__(self):
        self._listings: dict[str, dict[str, str]] = {}

    def find(self, folder: pathlib.Path, name: str) -> str | None:
        """The path of file `name` in `folder`: as it is written, else with Windows' \\ as /, else
        with its accents as the disk writes them (macOS takes them apart).
        """
        paths = [os.path.normpath(folder / text) for text in (name, name.replace("\\", "/"))]
        for path in (*paths, unicodedata.normalize("NFC", paths[-1])):
            parent, base = os.path.split(path)
            found = self._listing(parent).get(base)
            if found is not None:
                return os.path.join(parent, found)
        return None

    def _listing(self, folder: str) -> dict[str, str]:
        if folder not in self._listings:
            names = os.listdir(folder) if os.path.isdir(folder) else []
            composed = {unicodedata.normalize("NFC", name): name for name in names}
            self._listings[folder] = composed | {name: name for name in names}
        return self._listings[folder]


def _entry(
    fields: dict[str, Any], folder: pathlib.Path, caption_field: str, pictures: _Pictures
) -> _Entry:
    """A record of a row; ValueError with the reason if it is broken."""
    name = fields.get("file_name")
    if not isinstance(name, str) or not name or "\0" in name:
        reason = "not a file's name" if "file_name" in fields else "missing"
        raise ValueError(f"field 'file_name' is {reason}")
    captions = captions_of(fields, caption_field)
    path = pictures.find(folder, name)
    if path is None:
        raise ValueError(f"no such picture: {os.path.normpath(folder / name)}")
    rest = {k: v for k, v in fields.items() if k not in ("file_name", caption_field)}
    return _Entry(path, captions, rest)


def _index(files: list[pathlib.Path], caption_field: str) -> tuple[list[_Entry], int, list[str]]:
    """(the good records, number of broken ones, their reasons with file:line)."""
    entries, reasons, pictures = [], [], _Pictures()
    broken: list[Fields] = []
    good_size = 0
    for file in files:
        for row in rows_of(file):
            try:
                if isinstance(row.fields, ValueError):
                    raise row.fields
                entries.append(_entry(row.fields, file.parent, caption_field, pictures))
                good_size += row.size
            except ValueError as error:
                reasons.append(f"{file}:{row.number}: {error}")
                broken.append(row)
    # A row that swallowed others, as a run of zeros does, counts as those that fit into it.
    mean = max(1.0, good_size / max(1, len(entries)))
    return entries, sum(max(1, row.lost, round(row.zeros / mean)) for row in broken), reasons


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
        self._entries, num_broken, reasons = _index(files, config.caption_field)
        total = len(self._entries) + num_broken
        self.broken = BrokenRecords(
            config.path, total, config.max_broken_fraction, num_broken, reasons
        )
        if not self._entries:
            example = f"; for example {reasons[0]}" if reasons else ""
            raise ValueError(
                f"data.metadata={config.metadata!r}: holds no records in {config.path}{example}"
            )

    def __len__(self) -> int:
        return len(self._entries)

    def cache_key(self, here: bool = True) -> str:
        files = fingerprint((entry.path for entry in self._entries), self.config.path, here)
        return f"folder {files} {self._captions_key()}"

    def names_key(self) -> str:
        every = -(-len(self) // _MAX_COMPARED)
        compared = [self._entries[i].path for i in range(0, len(self), every)]
        sizes = [os.path.getsize(path) if os.path.exists(path) else -1 for path in compared]
        return f"folder {digest(sizes)} {self._captions_key()}"

    def _captions_key(self) -> str:
        root = self.config.path
        return digest([(os.path.relpath(e.path, root), e.captions) for e in self._entries])

    def where(self, index: int) -> str:
        return self._entries[index].path

    def read(self, index: int) -> Encoded:
        entry = self._entries[index]
        return Encoded(
            pathlib.Path(entry.path).read_bytes(), entry.captions, dict(entry.attributes)
        )
