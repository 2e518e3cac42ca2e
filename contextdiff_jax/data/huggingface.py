"""Data sets of Hugging Face's `datasets`, in Parquet or Arrow: a folder, or a name on the hub.

    path/train-00000-of-00002.parquet  train-00001-of-00002.parquet  test-00000-of-00001.parquet
    path/dataset_dict.json  train/  test/          as `save_to_disk` writes them
    ORG/NAME@REVISION/FOLDER                       downloaded once: `runtime.hub`

The picture is the column `image_field`, else the only one of type `datasets.Image`: the picture's
bytes, alone or as `{"bytes": ...}`. The caption is the column `caption_field`, else `caption`, else
`captions`; one string or a list of them. Other columns that are strings or numbers are kept as
attributes. Records are read at random from memory-mapped Arrow files, which `datasets` makes of
Parquet once, in `index_folder`; for a name of the hub's by default in its own cache.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from typing import Any

import numpy as np

from contextdiff_jax.data.kept_arrays import KEPT, digest, fingerprint
from contextdiff_jax.data.records import (
    BrokenRecords,
    Encoded,
    PictureConfig,
    PictureSource,
    captions_of,
)
from contextdiff_jax.runtime.errors import one_line
from contextdiff_jax.runtime.hub import find_data

_MAX_COMPARED = 100_000  # captions that processes compare
_CAPTIONS = ("caption", "captions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceConfig(PictureConfig):
    """A choice of the data set to read. `split`: its name, `train[:90%]` too; `image_field`: the
    column of the picture.
    """

    split: str = "train"
    image_field: str = "image"


def _import() -> Any:
    """The package `datasets`; ValueError says how to get it."""
    try:
        import datasets  # here: it takes seconds that other sources need not spend
    except ImportError:
        raise ValueError(
            "data.source='huggingface': needs a package that isn't installed: pip install datasets"
        ) from None
    return datasets


@functools.lru_cache(8)  # both splits of an evaluation, and the question which there are
def _open(folder: str, cache: str) -> Any:
    """The splits of the data set in a folder, by name. ValueError with the reason if there is
    none.
    """
    datasets = _import()
    datasets.disable_progress_bars()
    path = pathlib.Path(folder)
    saved = [name for name in ("dataset_dict.json", "state.json") if (path / name).is_file()]
    try:
        if saved:
            found = datasets.load_from_disk(folder)
        else:
            found = datasets.load_dataset(folder, cache_dir=cache or None)
    except Exception as error:  # of its own kinds, pyarrow's, fsspec's
        raise ValueError(f"can't be read as a data set ({one_line(error)[:300]})") from None
    return found if isinstance(found, dict) else datasets.DatasetDict({"train": found})


def _splits(path: str, index_folder: str) -> Any:
    """`_open` of a folder or of the hub's name."""
    folder = find_data(path)
    if not folder or not os.path.isdir(folder):
        raise ValueError(f"data.path={path!r}: is not a folder")
    cache = index_folder or ("" if folder != path else os.path.join(path, KEPT))
    try:
        return _open(folder, cache)
    except ValueError as error:
        raise ValueError(f"data.path={path!r}: {error}") from None


def has_split(path: str, split: str, index_folder: str = "") -> bool:
    """Whether the data set has a split of that name. ValueError if there is no set."""
    return split in _splits(os.path.expanduser(path), os.path.expanduser(index_folder))


def _rows_of(splits: Any, split: str) -> Any:
    """The rows of a split, or of a part of one: `train[:90%]`."""
    name, bracket, span = split.partition("[")
    if name not in splits:
        raise ValueError(f"has the splits {', '.join(splits)}")
    rows = splits[name]
    if not bracket:
        return rows
    first, colon, last = span.removesuffix("]").partition(":")
    if not colon or not span.endswith("]"):
        raise ValueError("a part of a split is written train[:90%] or train[100:200]")

    def place(text: str, default: int) -> int:
        text = text.strip()
        if not text:
            return default
        try:
            number = float(text.removesuffix("%"))
        except ValueError:
            raise ValueError(f"{text!r} is no number of rows, nor a share of them in %") from None
        count = round(number * len(rows) / 100) if text.endswith("%") else int(number)
        return min(max(count + len(rows) * (count < 0), 0), len(rows))

    return rows.select(range(place(first, 0), place(last, len(rows))))


class HuggingFaceSource(PictureSource):
    """Random access to one split of a data set in Parquet or Arrow."""

    def __init__(self, config: HuggingFaceConfig):
        """Opens the data set; makes its Arrow files, once, where it is Parquet.

        Raises:
            ValueError: if there is none, or none of that split, or without a picture or caption.
        """
        self.config = config
        try:
            rows = _rows_of(_splits(config.path, config.index_folder), config.split)
        except ValueError as error:
            if str(error).startswith("data."):
                raise
            raise ValueError(f"data.metadata={config.split!r}: {config.path} {error}") from None
        self._image = self._image_column(rows.features)
        self._caption = self._caption_column(rows.features)
        if isinstance(rows.features[self._image], _import().Image):
            # Pictures stay encoded: `decode` can make them smaller while it decodes.
            rows = rows.cast_column(self._image, _import().Image(decode=False))
        plain = [name for name, feature in rows.features.items() if _is_plain(feature)]
        names = dict.fromkeys((self._image, self._caption, *plain))
        self._rows = rows.select_columns(list(names))
        self._files = [file["filename"] for file in rows.cache_files]
        if not config.index_folder and not os.path.isdir(config.path):  # a name of the hub
            kept = os.path.dirname(self._files[0]) if self._files else find_data(config.path)
            self.config = dataclasses.replace(config, index_folder=kept)
        self.broken = BrokenRecords(config.path, len(self), config.max_broken_fraction)
        if not len(self):
            raise ValueError(f"data.metadata={config.split!r}: holds no records")

    def _image_column(self, features: Any) -> str:
        wanted = self.config.image_field
        images = [name for name, each in features.items() if isinstance(each, _import().Image)]
        if wanted in features:
            return wanted
        if wanted == HuggingFaceConfig.image_field and len(images) == 1:
            return images[0]
        raise ValueError(
            f"data.image_field={wanted!r}: {self.config.path} has the columns {', '.join(features)}"
        )

    def _caption_column(self, features: Any) -> str:
        wanted = self.config.caption_field
        found = [name for name in dict.fromkeys((wanted, *_CAPTIONS)) if name in features]
        if not found:
            raise ValueError(
                f"data.caption_field={wanted!r}: {self.config.path} has the columns "
                f"{', '.join(features)}"
            )
        return found[0]

    def __len__(self) -> int:
        return len(self._rows)

    def cache_key(self, here: bool = True) -> str:
        root = os.path.dirname(self._files[0]) if self._files else "/"
        return f"huggingface {self.config.split} {fingerprint(self._files, root, here)}"

    def names_key(self) -> str:
        every = -(-len(self) // _MAX_COMPARED)
        captions = self._rows.select_columns([self._caption])[::every][self._caption]
        return f"huggingface {self.config.split} {digest(captions)}"

    def where(self, index: int) -> str:
        return f"{self.config.split}: row {index}"

    def read(self, index: int) -> Encoded:
        record = self._rows[index]
        image = record.pop(self._image)
        if isinstance(image, dict):
            image = image.get("bytes")
        if not isinstance(image, bytes):
            raise ValueError(f"column {self._image!r} holds no picture's bytes")
        captions = captions_of({self._caption: record.pop(self._caption)}, self._caption)
        return Encoded(image, captions, {k: v for k, v in record.items() if v is not None})


def _is_plain(feature: Any) -> bool:
    """Whether a column holds a string or a number a row."""
    kind = getattr(feature, "dtype", None)
    return kind is not None and (kind in ("string", "large_string") or _is_number(kind))


def _is_number(kind: str) -> bool:
    try:
        return np.dtype(kind).kind in "biuf"
    except TypeError:
        return False
