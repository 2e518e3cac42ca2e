"""A pipeline's folder: its index, and the text encoders as the networks of its kind read them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contextdiff_jax.models.frozen_text import FrozenText, FrozenTextPair
from contextdiff_jax.pretrained.clip import load_clip_text
from contextdiff_jax.pretrained.folder_files import INDEX_FILE, exists, read_json

CLASSES = tuple(
    f"StableDiffusion{kind}{way}Pipeline"
    for kind in ("", "XL")
    for way in ("", "Img2Img", "Inpaint")
)


def is_pipeline(folder: str | Path) -> bool:
    """Whether a folder, or a single-file checkpoint, is a whole pipeline."""
    return exists(Path(folder, INDEX_FILE))


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json's values. ValueError for a pipeline that is not supported."""
    path = folder / INDEX_FILE
    index = read_json(path, "a diffusers pipeline folder")
    name = index.get("_class_name")
    if name not in CLASSES:
        raise ValueError(
            f"{path}: _class_name={name!r}: another pipeline; one of {', '.join(CLASSES)}"
        )
    if index.get("requires_aesthetics_score") or (
        is_xl(index) and not exists(folder / "text_encoder")
    ):
        raise ValueError(
            f"{path}: XL's refiner is not supported; its base, with two text encoders, is"
        )
    return index


def is_xl(index: Mapping[str, Any]) -> bool:
    """Whether a pipeline's index is of Stable Diffusion XL."""
    return "XL" in index["_class_name"]


def encoder_names(index: Mapping[str, Any]) -> tuple[str, ...]:
    """The folders of a pipeline's text encoders."""
    return ("text_encoder", "text_encoder_2") if is_xl(index) else ("text_encoder",)


def load_texts(folder: Path, **options: Any) -> FrozenText | FrozenTextPair:
    """The text encoders of a pipeline; for `options` see `pretrained.kinds.Options`."""
    index = read_index(folder)
    texts = [load_clip_text(folder / name, **options) for name in encoder_names(index)]
    if len(texts) == 1:
        return FrozenText(*texts)
    return FrozenTextPair(*texts, bool(index.get("force_zeros_for_empty_prompt", True)))
