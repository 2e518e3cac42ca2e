"""Data: sources by name -> batches of numpy arrays (no JAX here).

    source = make_source(DataConfig(source="shapes", image_size=32), split="train")
    loader = make_loader(source, batch_size=64, seed=0, tokenizer=load_tokenizer(), max_length=32)
    batch = next(loader)  # image uint8 [64, 32, 32, 3], token_ids and token_mask [64, 32], caption

To add a source, add a function to `SOURCES`, or a `Source` where it has more than training records.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from contextdiff_jax.data.buckets import check_buckets, derive_buckets
from contextdiff_jax.data.decoding import MAX_PIXELS
from contextdiff_jax.data.folder import FolderConfig, FolderSource
from contextdiff_jax.data.huggingface import HuggingFaceConfig, HuggingFaceSource
from contextdiff_jax.data.huggingface import has_split as has_table
from contextdiff_jax.data.latent_shards import CacheSource, read_cache
from contextdiff_jax.data.loader import Batch, Loader, Pieces, RandomAccessSource, make_loader
from contextdiff_jax.data.orders import Size
from contextdiff_jax.data.records import PictureConfig, PictureSource, first_found
from contextdiff_jax.data.shapes import ShapesConfig, ShapesSource, heldout_triples
from contextdiff_jax.data.tfds import TFDSConfig, TFDSSource, has_split
from contextdiff_jax.data.tokenizer import AnyTokenizer, Tokenizer, load_tokenizer, train_tokenizer
from contextdiff_jax.data.webdataset import WebDatasetConfig, WebDatasetSource
from contextdiff_jax.runtime.fields import check_choice, no_type_check, strict

__all__ = [
    "AnyTokenizer",
    "SOURCES",
    "Batch",
    "CacheSource",
    "DataConfig",
    "FolderConfig",
    "FolderSource",
    "HuggingFaceConfig",
    "HuggingFaceSource",
    "Loader",
    "Pieces",
    "PictureSource",
    "RandomAccessSource",
    "ShapesConfig",
    "ShapesSource",
    "Source",
    "TFDSConfig",
    "TFDSSource",
    "Tokenizer",
    "WebDatasetConfig",
    "WebDatasetSource",
    "bucket_sizes",
    "load_tokenizer",
    "make_loader",
    "make_source",
    "train_tokenizer",
]


@no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data room's configuration. Fields that a source has no use for are ignored by it.

    Attributes:
        source: a name in `SOURCES`.
        path: the folder (all but `shapes`); of `huggingface` also ORG/NAME[@REVISION] of the hub.
        metadata: what the training split is: glob of metadata files (`folder`, `emoji`), of shards
            (`webdataset`), in `path` or from / or ~; name of a split (`tfds`, `huggingface`);
            empty: the source's default.
        heldout_metadata: the same of the held-out split.
        caption_field: field with the caption, or a list of captions.
        image_field: column with the picture (`huggingface`).
        caption_choice: of several captions, the `first` or a `random` one (by seed, epoch and
            record).
        max_broken_fraction: largest share of broken records to go on with.
        index_folder: folder of what is computed once from the data; empty: `.contextdiff_jax` in
            `path`.
        image_size: pixels a side.
        crop: where a picture is longer than asked for, keep the `centre` or a `random` part (by
            seed, epoch and record).
        crop_size: side of the piece of each picture that training reads, where `crop` says; 0: all.
        resample: filter that scales pictures: lanczos, bicubic or bilinear.
        max_pixels: a picture with more counts as broken.
        buckets: sizes (height, width) to sort pictures into by their aspect ratios, a batch of one
            of them; empty: none.
        bucket_max_ratio: derives buckets of about image_size squared pixels up to this ratio of the
            sides; 0: none.
        bucket_step: of the sides of the derived buckets.
        sizes: batches also have each picture's own size, its crop and its size in the batch, which
            XL's networks read; a source without pictures of other sizes has none.
        num_objects: fewest and most objects of a scene (`shapes`).
        num_scenes: scenes in an epoch (`shapes`).
        heldout_fraction: share of attribute combinations kept from training (`shapes`).
        backgrounds: of the scenes (`shapes`).
        position_fraction: share of the captions of one object that state its place (`shapes`).
        reading_order: share of the captions of two objects that are made to begin with the left or
            the upper one (`shapes`); evaluation has as many of either.
        scene_seed: another seed gives other scenes (`shapes`).
        seed: of the order of the records.
        max_length: tokens a caption.
        tokenizer: a tokenizer file; empty: the bundled one.
        num_workers: loader processes; 0 loads in threads of the training process.
        prefetch: batches kept ready.
    """

    source: str = "shapes"
    path: str = ""
    metadata: str = ""
    heldout_metadata: str = ""
    caption_field: str = "text"
    image_field: str = "image"
    caption_choice: str = "first"
    max_broken_fraction: float = 0.01
    index_folder: str = ""
    image_size: int = 32
    crop: str = "centre"
    crop_size: int = 0
    resample: str = "lanczos"
    max_pixels: int = MAX_PIXELS
    buckets: tuple[Size, ...] = ()
    bucket_max_ratio: float = 0.0
    bucket_step: int = 64
    sizes: bool = False
    num_objects: tuple[int, int] = (1, 1)
    num_scenes: int = 100_000
    heldout_fraction: float = 0.125
    backgrounds: tuple[str, ...] = ("dark",)
    position_fraction: float = 0.5
    reading_order: float = 0.0
    scene_seed: int = 0
    seed: int = 0
    max_length: int = 32
    tokenizer: str = ""
    num_workers: int = 0
    prefetch: int = 2

    @property
    def kind(self) -> Source:
        """The kind of its source, which says what that has. ValueError for an unknown one."""
        check_choice("data.source", self.source, SOURCES)
        kind = SOURCES[self.source]
        return kind if isinstance(kind, Source) else Source(make=kind)


MakeSource = Callable[[DataConfig, str], RandomAccessSource]


def _training_alone(config: DataConfig) -> tuple[str, ...]:
    return ("train",)


def _same(config: DataConfig, number: int = 0) -> DataConfig:
    return config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A kind of data, and what the rest may rely on. A function alone in `SOURCES` is its `make`.

    Attributes:
        make: opens the records of a split: `train`, `heldout`, or `all` where there is that.
        splits: of `train` and `heldout` those that a config's data has.
        rows: what a person calls their records.
        others: the config of records that are drawn like a config's and are none of them, for each
            number above 0; where none are drawn, the config as it is.
        pictures: the config of the pictures that the records were made of, where they hold none.
        is_drawn: whether `others` gives other records.
        is_cache: whether the records were made of others, whose config `pictures` gives.
        has_scenes: whether captions and pictures are scenes (data.shapes), which pixels can judge.
    """

    make: MakeSource
    splits: Callable[[DataConfig], tuple[str, ...]] = _training_alone
    rows: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"train": "training records", "heldout": "held-out records"}
    )
    others: Callable[[DataConfig, int], DataConfig] = _same
    pictures: Callable[[DataConfig], DataConfig] = _same
    has_scenes: bool = False

    @property
    def is_drawn(self) -> bool:
        return self.others is not _same

    @property
    def is_cache(self) -> bool:
        return self.pictures is not _same


def _shapes(config: DataConfig, split: str) -> RandomAccessSource:
    return ShapesSource(
        ShapesConfig(
            num_objects=tuple(config.num_objects),
            image_size=config.image_size,
            length=config.num_scenes,
            split=split,
            seed=config.scene_seed,
            heldout_fraction=config.heldout_fraction,
            backgrounds=tuple(config.backgrounds),
            position_fraction=config.position_fraction,
            reading_order=config.reading_order,
        )
    )


def _shapes_splits(config: DataConfig) -> tuple[str, ...]:
    return ("train", "heldout") if heldout_triples(config.heldout_fraction) else ("train",)


def _other_scenes(config: DataConfig, number: int) -> DataConfig:
    # Judged are both orders alike, whatever made the training easier.
    return dataclasses.replace(config, scene_seed=config.scene_seed + number, reading_order=0.0)


def _has_file(path: str, pattern: str) -> bool:
    return first_found(path, (pattern,), required=False) is not None


def _pictures_with(
    make: Callable[[dict[str, Any], str], RandomAccessSource],
    defaults: dict[str, str | tuple[str, ...]],
    has: Callable[[str, str], bool] = _has_file,
) -> Source:
    """A source of encoded pictures: `make(fields of PictureConfig, what the split is)`, by default
    `defaults[split]`: of several globs the first that finds a file. `has(path, default)`: whether
    the data in `path` has it.
    """
    shared = [field.name for field in dataclasses.fields(PictureConfig)]

    def source(config: DataConfig, split: str) -> RandomAccessSource:
        configured = {"train": config.metadata, "heldout": config.heldout_metadata}
        name = configured.get(split) or defaults.get(split)
        if isinstance(name, tuple) and config.path:
            name = first_found(config.path, name, required=split == "train")
        if name is None:
            field = "data.heldout_metadata" if split == "heldout" else "split"
            raise ValueError(
                f"{field}: data.source={config.source!r} has no metadata file for split={split!r}"
            )
        if not config.path:
            raise ValueError(
                f"data.path={config.path!r}: data.source={config.source!r} needs a folder"
            )
        return make({field: getattr(config, field) for field in shared}, name)

    def splits(config: DataConfig) -> tuple[str, ...]:
        names = defaults.get("heldout", ())
        names = names if isinstance(names, tuple) else (names,)
        found = config.heldout_metadata or any(has(config.path, name) for name in names)
        return ("train", "heldout") if found else ("train",)

    return Source(make=source, splits=splits)


def _tables(*folders: str) -> tuple[str, ...]:
    """Globs of Hugging Face's metadata files in those folders."""
    kinds = [f"metadata*.{kind}" for kind in ("jsonl", "csv", "parquet")]
    return tuple(os.path.join(folder, kind) for folder in folders for kind in kinds)


_TESTS = ("test", "validation", "valid")  # folders of the held-out split


def _folder(fields: dict[str, Any], metadata: str) -> FolderSource:
    return FolderSource(FolderConfig(**fields, metadata=metadata))


def _webdataset(fields: dict[str, Any], shards: str) -> WebDatasetSource:
    return WebDatasetSource(WebDatasetConfig(**fields, shards=shards))


def _tfds(fields: dict[str, Any], split: str) -> TFDSSource:
    return TFDSSource(TFDSConfig(**fields, split=split))


def _huggingface(config: DataConfig, split: str) -> HuggingFaceSource:
    if not config.path:
        raise ValueError("data.path='': data.source='huggingface' needs a folder or ORG/NAME")
    named = {"train": config.metadata or "train", "heldout": config.heldout_metadata}
    name = named.get(split) or next(_heldout_tables(config), "")
    if split not in named or not name:
        raise ValueError(f"split={split!r}: data.path={config.path!r} has none of data.metadata's")
    shared = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(PictureConfig)
    }
    return HuggingFaceSource(
        HuggingFaceConfig(**shared, split=name, image_field=config.image_field)
    )


def _heldout_tables(config: DataConfig) -> Iterator[str]:
    where = config.path, config.index_folder
    return (name for name in _TESTS if has_table(where[0], name, where[1]))


def _table_splits(config: DataConfig) -> tuple[str, ...]:
    found = config.heldout_metadata or next(_heldout_tables(config), "")
    return ("train", "heldout") if found else ("train",)


def _cache(config: DataConfig, split: str) -> RandomAccessSource:
    source = CacheSource(os.path.expanduser(config.path))
    for field in ("image_size", "max_length", "tokenizer"):
        wanted, found = getattr(config, field), getattr(source.cache, field)
        if wanted != found:
            raise ValueError(
                f"data.{field}={wanted!r}: the cache in data.path={config.path!r} has {found!r}"
            )
    if source.cache.source["split"] != split:
        raise ValueError(
            f"data.path={config.path!r}: a cache of the split {source.cache.source['split']!r}, "
            f"not of {split!r}"
        )
    return source


def _cached_split(config: DataConfig) -> tuple[str, ...]:
    return (read_cache(os.path.expanduser(config.path)).source["split"],)


def _cached_pictures(config: DataConfig) -> DataConfig:
    made_of = dict(read_cache(os.path.expanduser(config.path)).source)
    del made_of["split"]
    return strict(DataConfig, f"{config.path}: source", made_of)


SOURCES: dict[str, Source | MakeSource] = {
    "shapes": Source(
        make=_shapes,
        splits=_shapes_splits,
        rows={"train": "seen combinations", "heldout": "held-out combinations"},
        others=_other_scenes,
        has_scenes=True,
    ),
    "folder": _pictures_with(_folder, {"train": _tables("", "train"), "heldout": _tables(*_TESTS)}),
    "emoji": _pictures_with(
        _folder,
        {
            "train": "metadata_train.jsonl",
            "heldout": "metadata_test.jsonl",
            "all": "metadata_*.jsonl",
        },
    ),
    "webdataset": _pictures_with(_webdataset, {"train": "*.tar"}),
    "tfds": _pictures_with(_tfds, {"train": "train", "heldout": "test", "all": "all"}, has_split),
    "huggingface": Source(make=_huggingface, splits=_table_splits),
    "cache": Source(make=_cache, splits=_cached_split, pictures=_cached_pictures),
}


def make_source(config: DataConfig, split: str = "train") -> RandomAccessSource:
    """The records of `config.source` in `split` (`train`, `heldout`, or `all` where the source has
    it).

    Raises:
        ValueError: for an unknown source, a split that it does not have, or what the source itself
            refuses.
    """
    return config.kind.make(config, split)


def bucket_sizes(config: DataConfig) -> tuple[Size, ...]:
    """The sizes (height, width) of the batches; empty: all are `image_size` squared.

    Raises:
        ValueError: for buckets that are none, or given twice over.
    """
    if not config.bucket_max_ratio:
        return check_buckets(config.buckets)
    if config.buckets:
        raise ValueError(
            f"data.bucket_max_ratio={config.bucket_max_ratio}: must be 0 where data.buckets are "
            "named"
        )
    return derive_buckets(config.image_size**2, config.bucket_max_ratio, config.bucket_step)
