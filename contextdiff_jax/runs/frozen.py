"""The networks that a run reads from folders and doesn't train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from contextdiff_jax.models.contextdiff import Frozen, FrozenVision
from contextdiff_jax.models.frozen_text import AnyFrozenText, FrozenT5, FrozenText
from contextdiff_jax.pretrained import load_clip_text, load_clip_vision, load_t5, load_vae
from contextdiff_jax.pretrained.folder_files import read_json
from contextdiff_jax.pretrained.pipeline_folder import is_pipeline, load_texts
from contextdiff_jax.settings import Settings


def load_frozen(
    settings: Settings,
    shardings: Callable[[PyTree], PyTree] | None = None,
    described: bool = False,
) -> Frozen:
    """The networks of `latent.vae`, `text.pretrained` and `context.clip`, in the types that are
    stored.

    Args:
      shardings: abstract parameters -> where they go, as `pretrained.kinds.Options`.
      described: folders without weights give shapes, as there.

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
    return Frozen(vae, _load_text(settings, options), vision)


def _load_text(settings: Settings, options: dict[str, Any]) -> AnyFrozenText:
    folder, length = settings.text.pretrained, settings.data.max_length
    text = _read_text(Path(folder), length, options)
    widths = text.width, text.pooled_width
    for field, (given, wanted) in settings.model.text_fields(*widths).items():
        if given != wanted:
            raise ValueError(
                f"model.{field}={given}: text.pretrained={folder!r} has {widths[0]}, and a pooled "
                f"text of {widths[1]}; must be {wanted}"
            )
    if length > text.longest:
        raise ValueError(f"data.max_length={length}: text.pretrained={folder!r} has {text.longest}")
    return text


def _read_text(folder: Path, length: int, options: dict[str, Any]) -> AnyFrozenText:
    if is_pipeline(folder):
        return load_texts(folder, length, **options)
    config = read_json(folder / "config.json", "a folder of a CLIP text or T5 encoder")
    if config.get("model_type") == "t5":
        return FrozenT5(load_t5(folder, **options))
    return FrozenText(load_clip_text(folder, **options))
