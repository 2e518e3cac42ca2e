"""Data: sources by name -> batches of numpy arrays (no JAX here).

    source = make_source(DataConfig(source="shapes", image_size=32), split="train")
    loader = make_loader(source, batch_size=64, seed=0, tokenizer=load_tokenizer(), max_length=32)
    batch = next(loader)  # image uint8 [64, 32, 32, 3], token_ids and token_mask [64, 32], caption

To add a source, add a function to `SOURCES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from contextdiff_jax.data.cached import CacheSource
from contextdiff_jax.data.folder import FolderConfig, FolderSource
from contextdiff_jax.data.loader import Batch, Loader, RandomAccessSource, make_loader
from contextdiff_jax.data.shapes import ShapesConfig, ShapesSource
from contextdiff_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "SOURCES",
    "Batch",
    "CacheSource",
    "DataConfig",
    "FolderConfig",
    "FolderSource",
    "Loader",
    "RandomAccessSource",
    "ShapesConfig",
    "ShapesSource",
    "Tokenizer",
    "load_tokenizer",
    "make_loader",
    "make_source",
    "train_tokenizer",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data room's configuration. Fields that a source has no use for are ignored by it.

    Attributes:
        source: a name in `SOURCES`.
        path: the folder (`folder`, `emoji`, `cache`).
        metadata: metadata file name or glob of the training split; empty: the source's default.
        heldout_metadata: the same of the held-out split; empty: the source's default.
        caption_field: metadata field with the caption.
        max_broken_fraction: largest share of broken records to go on with.
        image_size: pixels a side.
        num_objects: fewest and most objects of a scene (`shapes`).
        num_scenes: scenes in an epoch (`shapes`).
        heldout_fraction: share of attribute combinations kept from training (`shapes`).
        backgrounds: of the scenes (`shapes`).
        position_fraction: share of the captions of one object that state its place (`shapes`).
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
    max_broken_fraction: float = 0.01
    image_size: int = 32
    num_objects: tuple[int, int] = (1, 3)
    num_scenes: int = 100_000
    heldout_fraction: float = 0.125
    backgrounds: tuple[str, ...] = ("dark",)
    position_fraction: float = 0.5
    scene_seed: int = 0
    seed: int = 0
    max_length: int = 32
    tokenizer: str = ""
    num_workers: int = 0
    prefetch: int = 2


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
        )
    )


def _folder_with(metadata: dict[str, str]) -> Callable[[DataConfig, str], RandomAccessSource]:
    """A folder source whose metadata files by split default to `metadata`."""

    def make(config: DataConfig, split: str) -> RandomAccessSource:
        configured = {"train": config.metadata, "heldout": config.heldout_metadata}
        name = configured.get(split) or metadata.get(split)
        if name is None:
            field = "data.heldout_metadata" if split == "heldout" else "split"
            raise ValueError(
                f"{field}: data.source={config.source!r} has no metadata file for split={split!r}"
            )
        if not config.path:
            raise ValueError(f"data.path={config.path!r}: data.source={config.source!r} needs a folder")
        return FolderSource(
            FolderConfig(
                path=config.path,
                metadata=name,
                image_size=config.image_size,
                max_broken_fraction=config.max_broken_fraction,
                caption_field=config.caption_field,
            )
        )

    return make


def _cache(config: DataConfig, split: str) -> RandomAccessSource:
    source = CacheSource(config.path)
    for field in ("image_size", "max_length", "tokenizer"):
        wanted, found = getattr(config, field), getattr(source.cache, field)
        if wanted != found:
            raise ValueError(f"data.{field}={wanted!r}: the cache in data.path={config.path!r} has {found!r}")
    if source.cache.source["split"] != split:
        raise ValueError(f"data.path={config.path!r}: a cache of the split {source.cache.source['split']!r}, not of {split!r}")
    return source


SOURCES: dict[str, Callable[[DataConfig, str], RandomAccessSource]] = {
    "shapes": _shapes,
    "folder": _folder_with({"train": "metadata*.jsonl"}),
    "emoji": _folder_with(
        {"train": "metadata_train.jsonl", "heldout": "metadata_test.jsonl", "all": "metadata_*.jsonl"}
    ),
    "cache": _cache,
}


def make_source(config: DataConfig, split: str = "train") -> RandomAccessSource:
    """The records of `config.source` in `split` (`train`, `heldout`, or `all` where the source has it).

    Raises:
        ValueError: for an unknown source, a split that it does not have, or what the source itself refuses.
    """
    if config.source not in SOURCES:
        raise ValueError(f"data.source={config.source!r}: unknown; one of {', '.join(SOURCES)}")
    return SOURCES[config.source](config, split)
