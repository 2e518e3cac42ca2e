"""TensorFlow Datasets' ArrayRecord files, read at random by `tfds.data_source`; TensorFlow is never
imported.

    path/dataset_info.json, features.json, NAME-SPLIT.array_record-00000-of-00001 ...

as tfds writes them.

The picture is the feature `image`, else the one of type `tfds.features.Image`; the caption is the
feature `caption_field` (`a/b`: feature b of the sequence a), else `caption`, else `captions`; one
string or a sequence of them. Other features that are strings or numbers are kept as attributes.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

from contextdiff_jax.data.kept_arrays import digest, fingerprint
from contextdiff_jax.data.records import (
    BrokenRecords,
    Encoded,
    PictureConfig,
    PictureSource,
    captions_of,
)
from contextdiff_jax.runtime.errors import one_line


@dataclasses.dataclass(frozen=True, kw_only=True)
class TFDSConfig(PictureConfig):
    """A choice of the data set to read. `split`: as tfds writes it, `train[:90%]` too."""

    split: str = "train"


def _folder(path: str) -> pathlib.Path:
    """The folder with dataset_info.json: `path`, or the only one below it (a tfds data_dir, or a
    data set's name).
    """
    root = pathlib.Path(path)
    if not path or not root.is_dir():
        raise ValueError(f"data.path={path!r}: is not a folder")
    if (root / "dataset_info.json").exists():
        return root
    found = sorted(file.parent for file in root.rglob("dataset_info.json"))
    if len(found) == 1:
        return found[0]
    names = ", ".join(str(folder.relative_to(root)) for folder in found[:5])
    raise ValueError(
        f"data.path={path!r}: must hold one tfds data set (dataset_info.json); holds "
        f"{names or 'none'}"
    )


def _decoded(value: Any) -> Any:
    """The plain value of what tfds gives. Its text is bytes; those that are no UTF-8 become
    surrogates, which no caption may hold.
    """
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="surrogateescape")
    if isinstance(value, np.ndarray):
        return _decoded(value.tolist())
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _builder(path: str) -> tuple[Any, pathlib.Path]:
    """The data set that `path` holds, and its folder. ValueError if there is none."""
    # here: it takes a second that other sources need not spend
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    folder = _folder(path)
    try:
        return tfds.builder_from_directory(folder), folder
    except (ParseError, ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        reason = one_line(error)
        raise ValueError(
            f"data.path={path!r}: dataset_info.json or features.json in {folder} cannot be read "
            f"({reason})"
        ) from None


def has_split(path: str, split: str) -> bool:
    """Whether the data set in `path` has a split of that name. ValueError if there is no set."""
    return split in _builder(path)[0].info.splits


class TFDSSource(PictureSource):
    """Random access to one split of a data set that tfds wrote as ArrayRecord."""

    def __init__(self, config: TFDSConfig):
        """Opens the data set.

        Raises:
            ValueError: if there is none, or none of that split, without a picture or caption, or
                not ArrayRecord.
        """
        import tensorflow_datasets as tfds

        self.config = config
        builder, folder = _builder(config.path)
        if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise ValueError(
                f"data.path={config.path!r}: is of format {builder.info.file_format.value}; must "
                "be array_record"
            )
        features = builder.info.features
        pictures = [
            name for name, feature in features.items() if isinstance(feature, tfds.features.Image)
        ]
        if not pictures:
            raise ValueError(
                f"data.path={config.path!r}: has no Image feature; it has {', '.join(features)}"
            )
        self._image = "image" if "image" in pictures else pictures[0]
        names = dict.fromkeys((config.caption_field, "caption", "captions"))
        found = [name for name in names if name.split("/")[0] in features]
        if not found:
            raise ValueError(
                f"data.caption_field={config.caption_field!r}: {config.path} has the features "
                f"{', '.join(features)}"
            )
        self._caption = found[0]
        try:
            # Pictures stay encoded: `decode` can make them smaller while it decodes.
            self._source = builder.as_data_source(
                split=config.split, decoders={self._image: tfds.decode.SkipDecoding()}
            )
        except ValueError as error:
            splits = ", ".join(builder.info.splits)
            raise ValueError(
                f"data.metadata={config.split!r}: {config.path} has the splits {splits}"
            ) from error
        self._files = sorted(folder.glob("*.array_record*"))
        self.broken = BrokenRecords(config.path, len(self), config.max_broken_fraction)
        if not len(self):
            raise ValueError(f"data.metadata={config.split!r}: holds no records")

    def __len__(self) -> int:
        return len(self._source)

    def cache_key(self, here: bool = True) -> str:
        return f"tfds {self.config.split} {fingerprint(self._files, self.config.path, here)}"

    def names_key(self) -> str:
        names = [(file.name, file.stat().st_size) for file in self._files]
        return f"tfds {self.config.split} {digest(names)}"

    def where(self, index: int) -> str:
        return f"{self.config.split}: record {index}"

    def read(self, index: int) -> Encoded:
        record = self._source[index]
        image = record.pop(self._image)
        field, *rest = self._caption.split("/")
        value = record.pop(field)
        for name in rest:
            value = value[name]
        captions = captions_of({self._caption: _decoded(value)}, self._caption)
        plain = {
            k: _decoded(v)
            for k, v in record.items()
            if not isinstance(v, (dict, np.ndarray)) or np.ndim(v) == 0
        }
        return Encoded(image, captions, plain)
