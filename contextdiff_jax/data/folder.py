"""Pictures in a folder with JSON-lines metadata: Hugging Face's imagefolder convention.

    path/metadata.jsonl     {"file_name": "images/1.png", "text": "a horse", ...}     one record a line
    path/images/1.png

`file_name` is relative to the metadata file. Fields other than `file_name` and the caption are kept as
attributes.

Broken records never pass silently: what can be told without decoding (not JSON, no caption, no such
picture) is skipped, counted and logged when the source is made; a picture that fails to decode is counted,
logged, and replaced by the next good record. A share of broken records above `max_broken_fraction` raises.
"""

from __future__ import annotations

import dataclasses
import io
import json
import operator
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import UInt8
from PIL import Image

_MAX_LOGGED = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """Which pictures to read, and how.

    Attributes:
        path: the folder.
        metadata: name or glob of the metadata files in it.
        image_size: pixels a side of the pictures given out.
        max_broken_fraction: largest share of broken records to go on with.
        caption_field: the metadata field that holds the caption.
    """

    path: str
    metadata: str = "metadata*.jsonl"
    image_size: int = 64
    max_broken_fraction: float = 0.01
    caption_field: str = "text"

    def __post_init__(self):
        if self.image_size < 1:
            raise ValueError(f"image_size={self.image_size}: must be at least 1")
        if not 0 <= self.max_broken_fraction <= 1:
            raise ValueError(f"max_broken_fraction={self.max_broken_fraction}: must lie in [0, 1]")


@dataclasses.dataclass(frozen=True)
class _Entry:
    path: str
    caption: str
    attributes: dict[str, Any]


class _Pictures:
    """Tells whether a file exists from one listing a folder: a `stat` each is slow on network disks."""

    def __init__(self):
        self._listings: dict[str, frozenset[str]] = {}

    def __contains__(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._listings:
            self._listings[folder] = frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()
        return name in self._listings[folder]


def _parse_line(line: str, folder: pathlib.Path, caption_field: str, pictures: _Pictures) -> _Entry:
    """One metadata line; ValueError with the reason if it is broken."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from error
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    for name in ("file_name", caption_field):
        if not isinstance(fields.get(name), str):
            raise ValueError(f"field {name!r} is {'not a string' if name in fields else 'missing'}")
    path = os.path.normpath(folder / fields.pop("file_name"))
    if path not in pictures:
        raise ValueError(f"no such picture: {path}")
    return _Entry(path, fields.pop(caption_field), fields)


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of the lines that are not blank."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _index(config: FolderConfig) -> tuple[list[_Entry], list[str]]:
    """(the good records, the reasons of the broken ones with file:line)."""
    root = pathlib.Path(config.path)
    if not root.is_dir():
        raise ValueError(f"data.path={config.path!r}: is not a folder")
    files = sorted(root.glob(config.metadata))
    if not files:
        raise ValueError(f"data.metadata={config.metadata!r}: no such file in {config.path}")
    entries, broken, pictures = [], [], _Pictures()
    for file in files:
        for number, line in _lines(file):
            try:
                entries.append(_parse_line(line, file.parent, config.caption_field, pictures))
            except ValueError as error:
                broken.append(f"{file}:{number}: {error}")
    return entries, broken


def load_image(path: str, image_size: int) -> UInt8[np.ndarray, "S S 3"]:
    """Decodes a picture: transparency over white, the shorter side to `image_size`, the centre square.

    Raises:
        OSError, ValueError, SyntaxError: whatever PIL raises for a file it cannot decode.
    """
    # Read whole first: PIL keeps a lazily read file open when decoding fails.
    with Image.open(io.BytesIO(pathlib.Path(path).read_bytes())) as image:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    width, height = image.size
    if min(width, height) != image_size:
        scale = image_size / min(width, height)
        # reducing_gap: large pictures are box-averaged first, which costs little; Lanczos does the rest.
        size = max(round(width * scale), image_size), max(round(height * scale), image_size)
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return np.asarray(image.crop((left, top, left + image_size, top + image_size)))


class FolderSource:
    """Random access to the good records of a folder.

    Records: `image` uint8 [H, W, 3], `caption` str, `attributes` (the other metadata fields).

    Pictures that fail to decode are counted in each loader process for itself, against all records.
    """

    def __init__(self, config: FolderConfig):
        """Reads the metadata.

        Raises:
            ValueError: if there is no such folder or metadata, no good record, or too many broken ones.
        """
        self.config = config
        self._entries, broken = _index(config)
        self._total = len(self._entries) + len(broken)
        self._num_broken_lines = len(broken)
        self._undecodable: set[int] = set()
        for reason in broken[:_MAX_LOGGED]:
            logging.warning("Skipped a broken record: %s", reason)
        if broken:
            logging.warning("Skipped %d of %d records in %s", len(broken), self._total, config.path)
            self._check_share(broken[0])
        if not self._entries:
            raise ValueError(f"data.metadata={config.metadata!r}: holds no records")

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_broken(self) -> int:
        """Number of broken records known so far."""
        return self._num_broken_lines + len(self._undecodable)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record `index`, or the next one that decodes, so that the answer never depends on earlier reads.

        Raises:
            IndexError: if `index` is outside 0..len - 1.
            ValueError: if this makes the share of broken records too large.
        """
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index={index}: must lie in 0..{len(self) - 1}")
        for offset in range(len(self)):
            position = (index + offset) % len(self)
            if position in self._undecodable:
                continue
            entry = self._entries[position]
            try:
                image = load_image(entry.path, self.config.image_size)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                self._undecodable.add(position)
                if len(self._undecodable) <= _MAX_LOGGED:
                    logging.warning("Replaced a picture that fails to decode: %s: %s", entry.path, error)
                self._check_share(f"{entry.path}: {error}")
                continue
            return {"image": image, "caption": entry.caption, "attributes": dict(entry.attributes)}
        raise ValueError(f"data.path={self.config.path!r}: no picture decodes")

    def _check_share(self, latest: str) -> None:
        limit = self.config.max_broken_fraction
        if self.num_broken > limit * self._total:
            raise ValueError(
                f"data.path={self.config.path!r}: {self.num_broken} of {self._total} records are broken, "
                f"max_broken_fraction={limit} allows {int(limit * self._total)}; for example {latest}"
            )
