"""The networks that a run reads from folders and doesn't train."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from contextdiff_jax.models.contextdiff import Frozen, FrozenVision
from contextdiff_jax.models.frozen_text import AnyFrozenText, FrozenT5, FrozenText
from contextdiff_jax.pretrained import load_clip_text, load_clip_vision, load_t5, load_vae
from contextdiff_jax.pretrained.clip import TEXT
from contextdiff_jax.pretrained.folder import read_config
from contextdiff_jax.pretrained.folder_files import read_json, weights_key
from contextdiff_jax.pretrained.pipeline_folder import (
    encoder_names,
    is_pipeline,
    load_texts,
    read_index,
)
from contextdiff_jax.pretrained.t5 import MODEL as T5
from contextdiff_jax.settings import Settings


def load_frozen(
    settings: Settings,
    shardings: Callable[[PyTree], PyTree] | None = None,
    text: AnyFrozenText | None = None,
    described: bool = False,
) -> Frozen:
    """The networks of `latent.vae`, `text.pretrained` and `context.clip`, in the types that are
    stored.

    Args:
      shardings: abstract parameters -> where they go, as `pretrained.kinds.Options`.
      text: in the place of the encoder of `text.pretrained`, which isn't read then.
      described: folders without weights give shapes, as in `pretrained.kinds.Options`.

    Raises ValueError, one line, for a folder that can't be read or a text encoder that doesn't fit.
    """
    options = dict(
        dtype=jnp.dtype(settings.train.precision), shardings=shardings, described=described
    )
    vae = load_vae(settings.latent.vae, **options) if settings.latent.vae else None
    vision = None
    if settings.context.tokens == "clip":
        vision = FrozenVision(load_clip_vision(settings.context.clip, **options))
    if not settings.text.pretrained:
        return Frozen(vae, None, vision)
    if text is None:
        text = load_text(settings, **options)
    else:
        check_text(settings, text)
    return Frozen(vae, text, vision)


def load_text(settings: Settings, **options: Any) -> AnyFrozenText:
    """The text encoder of `text.pretrained`, in the types that are stored; `options` as
    `pretrained.model.Options`. Raises ValueError as `load_frozen`.
    """
    text = _read_text(Path(settings.text.pretrained), settings.data.max_length, options)
    check_text(settings, text)
    return text


def check_text(settings: Settings, text: AnyFrozenText) -> None:
    """Raises ValueError for states that the network can't read, or too few of them."""
    folder, length = settings.text.pretrained, settings.data.max_length
    widths = text.width, text.pooled_width
    for field, (given, wanted) in settings.model.text_fields(*widths).items():
        if given != wanted:
            raise ValueError(
                f"model.{field}={given}: text.pretrained={folder!r} has {widths[0]}, and a pooled "
                f"text of {widths[1]}; must be {wanted}"
            )
    if length > text.longest:
        raise ValueError(f"data.max_length={length}: text.pretrained={folder!r} has {text.longest}")


def _read_text(folder: Path, length: int, options: dict[str, Any]) -> AnyFrozenText:
    if is_pipeline(folder):
        return load_texts(folder, length, **options)
    config = read_json(folder / "config.json", "a folder of a CLIP text or T5 encoder")
    if config.get("model_type") == "t5":
        return FrozenT5(load_t5(folder, **options))
    return FrozenText(load_clip_text(folder, **options))


def text_key(folder: str) -> str:
    """Tells the text encoder, or encoders, in a folder from others: by configs and weights."""
    path, digest = Path(folder), hashlib.blake2b(digest_size=8)
    names = encoder_names(read_index(path)) if is_pipeline(path) else (".",)
    for name in names:
        values = read_json(path / name / "config.json", "a folder of a CLIP text or T5 encoder")
        model = T5 if values.get("model_type") == "t5" else TEXT
        config = dataclasses.asdict(read_config(model, path / name))
        digest.update(json.dumps([name, config], default=str).encode())
        digest.update(weights_key(path / name, model.weights_file).encode())
    return digest.hexdigest()
