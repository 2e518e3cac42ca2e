"""The common parts of sources of encoded pictures: captions, crops, broken records.

Broken records never pass silently. What can be told without decoding (not JSON, no caption, no
picture) is skipped, counted and logged when a source is made; a record that fails when it is read
is counted, logged, and its place is taken by the next good record. A share of broken records above
`max_broken_fraction` raises.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import glob
import logging
import operator
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8, UInt16

from contextdiff_jax.data.decoding import (
    CENTRE,
    FILTERS,
    MAX_PIXELS,
    UNDECODABLE,
    decode,
    picture_size,
    size_condition,
)
from contextdiff_jax.data.kept_arrays import digest, kept_array
from contextdiff_jax.runtime.fields import check_choice
from contextdiff_jax.runtime.texts import check_text

CROPS = ("centre", "random")
CAPTION_CHOICES = ("first", "random")
LOGGER = logging.getLogger(__name__)
_MAX_LOGGED = 20
# Fields that change how a record is given out, not which records there are or what size they have.
_GIVEN_OUT = ("path", "index_folder", "image_size", "max_broken_fraction", "seed", "crop")
_GIVEN_OUT += ("caption_choice", "resample", "sizes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """Options of reading pictures, whatever holds them.

    Attributes:
        path: the folder.
        image_size: pixels a side, where the loader asks for no bucket.
        max_broken_fraction: largest share of broken records to go on with.
        caption_field: the field that holds the caption, or a list of captions.
        caption_choice: of several captions, the `first` or a `random` one.
        crop: of what hangs over, keep the `centre` or a `random` part.
        resample: filter that scales pictures, a name in `decoding.FILTERS`.
        max_pixels: a picture with more counts as broken.
        seed: of the random choices.
        index_folder: folder of what is computed once from the data; empty: `.contextdiff_jax` in
            `path`.
        sizes: records also have `sizes`, what `decoding.size_condition` says of the picture.
    """

    path: str
    image_size: int = 64
    max_broken_fraction: float = 0.01
    caption_field: str = "text"
    caption_choice: str = "first"
    crop: str = "centre"
    resample: str = "lanczos"
    max_pixels: int = MAX_PIXELS
    seed: int = 0
    index_folder: str = ""
    sizes: bool = False

    def __post_init__(self):
        for field in ("path", "index_folder"):  # no shell has read what follows an `=`
            object.__setattr__(self, field, os.path.expanduser(getattr(self, field)))
        if self.image_size < 1:
            raise ValueError(f"image_size={self.image_size}: must be at least 1")
        if self.max_pixels < 1:
            raise ValueError(f"data.max_pixels={self.max_pixels}: must be at least 1")
        if not 0 <= self.max_broken_fraction <= 1:
            raise ValueError(f"max_broken_fraction={self.max_broken_fraction}: must lie in [0, 1]")
        for field, allowed in (
            ("crop", CROPS),
            ("caption_choice", CAPTION_CHOICES),
            ("resample", FILTERS),
        ):
            check_choice(f"data.{field}", getattr(self, field), allowed)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A record as it is stored: an encoded picture, at least one caption, the other fields."""

    image: bytes
    captions: Sequence[str]
    attributes: dict[str, Any]


def captions_of(fields: Mapping[str, Any], name: str) -> list[str]:
    """The caption, or the list of them without its nulls, in field `name`; ValueError with the
    reason if there is none, or one that is no text.
    """
    value = fields.get(name)
    captions = [value] if isinstance(value, str) else value
    if isinstance(captions, list):
        captions = [caption for caption in captions if caption is not None]
    if (
        not isinstance(captions, list)
        or not captions
        or not all(isinstance(c, str) for c in captions)
    ):
        raise ValueError(
            f"field {name!r} is {'no string or list of strings' if name in fields else 'missing'}"
        )
    for caption in captions:
        try:
            check_text(caption)
        except ValueError as error:
            raise ValueError(f"field {name!r} {error}") from None
    return captions


class BrokenRecords:
    """Counts and logs the broken records of a source, and ends the run when there are too many.
    Picklable.

    Those found while reading are counted in each process for itself; `drain` hands them on, so that
    the loader can count those of its workers together.
    """

    def __init__(
        self,
        path: str,
        total: int,
        max_fraction: float,
        skipped: int = 0,
        reasons: Sequence[str] = (),
    ):
        """`skipped` of `total` records are known to be broken, for example for `reasons`;
        ValueError if too many.
        """
        self._path, self._total, self._limit, self._skipped = path, total, max_fraction, skipped
        self._replaced: dict[int, str] = {}
        self._new: collections.deque[tuple[int, str]] = collections.deque()
        for reason in reasons[:_MAX_LOGGED]:
            LOGGER.warning("Skipped a broken record: %s", reason)
        if skipped:
            LOGGER.warning("Skipped %d of %d records in %s", skipped, total, path)
            self._check(reasons[0])

    def __len__(self) -> int:
        return self._skipped + len(self._replaced)

    def __contains__(self, index: int) -> bool:
        return index in self._replaced

    def replaced(self, index: int, reason: str) -> None:
        """Counts record `index`, once; ValueError if that makes too many."""
        if index in self._replaced:
            return
        self._replaced[index] = reason
        self._new.append((index, reason))
        if len(self._replaced) <= _MAX_LOGGED:
            LOGGER.warning("Replaced a record that fails to decode: %s", reason)
        self._check(reason)

    def drain(self) -> list[tuple[int, str]]:
        """(index, reason) of the records counted since the last call."""
        return [self._new.popleft() for _ in range(len(self._new))]

    def _check(self, latest: str) -> None:
        if len(self) > self._limit * self._total:
            raise ValueError(
                f"data.path={self._path!r}: {len(self)} of {self._total} records are broken, "
                f"max_broken_fraction={self._limit} allows {int(self._limit * self._total)}; for "
                f"example {latest}"
            )


def find_files(path: str, pattern: str, kind: str) -> list[pathlib.Path]:
    """The files that the glob `data.metadata` names in the folder `path`, or from / or ~, sorted;
    as in a shell, hidden ones only where the glob says so. ValueError if there are none.
    """
    if not os.path.isdir(path):
        raise ValueError(f"data.path={path!r}: is not a folder")
    files = _matches(path, pattern)
    if not files:
        raise ValueError(f"data.metadata={pattern!r}: no such {kind} in {path}")
    for file in files:
        if not os.access(file, os.R_OK):
            raise ValueError(f"data.path={path!r}: {file} cannot be read")
    return files


def first_found(path: str, patterns: Sequence[str], required: bool) -> str | None:
    """The first of the globs that finds a file in the folder `path`; if none does, the first of
    all where one is `required`, else None.
    """
    found = (pattern for pattern in patterns if _matches(os.path.expanduser(path), pattern))
    return next(found, patterns[0] if required else None)


def _matches(path: str, pattern: str) -> list[pathlib.Path]:
    found = glob.glob(os.path.join(glob.escape(path), os.path.expanduser(pattern)), recursive=True)
    return sorted(pathlib.Path(file) for file in found if not os.path.isdir(file))


class PictureSource(abc.ABC):
    """Random access to records of encoded pictures; a subclass says how one is read (`read`,
    `where`, `__len__`).

    Records: `image` uint8 [H, W, 3], `caption` str, `attributes` (the other fields), and `sizes`
    float32 [6] where the config asks for them.
    """

    config: PictureConfig
    broken: BrokenRecords

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, index: int) -> Encoded:
        """Record `index` as it is stored; raises one of `UNDECODABLE`, with the reason, if it is
        broken.
        """

    @abc.abstractmethod
    def where(self, index: int) -> str:
        """The place of record `index`, for messages."""

    @abc.abstractmethod
    def cache_key(self, here: bool = True) -> str:
        """Changes when the stored records do, by names, sizes and times of files; `here`: see
        `kept.fingerprint`.
        """

    @abc.abstractmethod
    def names_key(self) -> str:
        """Changes with the list of records and their sizes; the same for a copy on another
        machine.
        """

    def kept_key(self) -> str:
        """The key of what is computed from each record: `cache_key`, and the fields that decide
        which records there are and how they are read.
        """
        fields = {k: v for k, v in vars(self.config).items() if k not in _GIVEN_OUT}
        return f"{self.cache_key()} {len(self)} {digest(fields)}"

    @property
    def num_broken(self) -> int:
        """Number of broken records known so far."""
        return len(self.broken)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.record(index)

    def record(
        self, index: int, epoch: int = 0, size: tuple[int, int] | None = None
    ) -> dict[str, Any]:
        """Record `index`, or the next one that decodes, so that the answer never depends on earlier
        reads.

        Args:
            index: in 0..len - 1.
            epoch: with the config's seed and the record's number it decides the random crop and
                caption.
            size: (height, width) of the picture; None: `image_size` squared.

        Raises:
            IndexError: if `index` is out of range.
            ValueError: if this makes the share of broken records too large.
        """
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index={index}: must lie in 0..{len(self) - 1}")
        size = size or (self.config.image_size,) * 2
        for offset in range(len(self)):
            position = (index + offset) % len(self)
            if position in self.broken:
                continue
            try:
                encoded = self.read(position)
                place, choice = self._draw(position, epoch)
                image: UInt8[np.ndarray, "H W 3"] = decode(
                    encoded.image, size, place, self.config.resample, self.config.max_pixels
                )
                more = self._sizes(encoded.image, size, place)
            except UNDECODABLE as error:
                self.broken.replaced(position, f"{self.where(position)}: {error}")
                continue
            caption = encoded.captions[int(choice * len(encoded.captions))]
            return {"image": image, "caption": caption, "attributes": encoded.attributes, **more}
        raise ValueError(f"data.path={self.config.path!r}: no picture decodes")

    def _sizes(
        self, image: bytes, size: tuple[int, int], place: tuple[float, float]
    ) -> dict[str, np.ndarray]:
        """`sizes`, if they are asked for."""
        if not self.config.sizes:
            return {}
        full = picture_size(image, self.config.max_pixels)
        return {"sizes": size_condition(full, size, place)}

    def _draw(self, index: int, epoch: int) -> tuple[tuple[float, float], float]:
        """(place of the crop, place in the list of captions), each in [0, 1)."""
        config = self.config
        if config.crop == "centre" and config.caption_choice == "first":
            return CENTRE, 0.0
        down, across, choice = np.random.default_rng((config.seed, epoch, index)).random(3)
        return (
            (down, across) if config.crop == "random" else CENTRE,
            choice if config.caption_choice == "random" else 0.0,
        )

    def picture_sizes(self) -> UInt16[np.ndarray, "N 2"]:
        """(height, width) of each record's picture; (0, 0), and counted as broken, where it has no
        readable header.

        Reads each record once and keeps the answer in `index_folder`.
        """

        def measure():
            LOGGER.warning("Measuring %d pictures in %s, once", len(self), self.config.path)
            sizes, unread = np.zeros((len(self), 2), np.uint16), 0
            for index in range(len(self)):
                try:
                    sizes[index] = np.minimum(
                        picture_size(self.read(index).image, self.config.max_pixels),
                        np.iinfo(np.uint16).max,
                    )
                except UNDECODABLE as error:
                    unread += 1
                    if unread <= _MAX_LOGGED:
                        LOGGER.warning("No size: %s: %s", self.where(index), error)
            return sizes, {}

        sizes, _ = kept_array(
            self.config.path, self.config.index_folder, "sizes", self.kept_key(), measure
        )
        for index in map(int, np.flatnonzero(sizes[:, 0] == 0)):
            self.broken.replaced(index, f"{self.where(index)}: no readable picture or caption")
        return sizes
