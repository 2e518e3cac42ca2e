"""The networks that a run reads from folders and doesn't train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from contextdiff_jax.models.contextdiff import Frozen, FrozenT5, FrozenText, FrozenVision
from contextdiff_jax.pretrained import load_clip_text, load_clip_vision, load_t5, load_vae
from contextdiff_jax.pretrained.folder_files import read_json
from contextdiff_jax.settings import Settings


def load_frozen(settings: Settings, shardings: Callable[[PyTree], PyTree] | None = None) -> Frozen:
    """The networks of `latent.vae`, `text.pretrained` and `context.clip`, in the types that are
    stored.

    Args:
      shardings: abstract parameters -> where they go, as `pretrained.model.Options`.

    Raises ValueError, one line, for a folder that can't be read or a text encoder that doesn't fit.
    """
    options = dict(dtype=jnp.dtype(settings.train.precision), shardings=shardings)
    vae = load_vae(settings.latent.vae, **options) if settings.latent.vae else None
    vision = None
    if settings.context.tokens == "clip":
        vision = FrozenVision(load_clip_vision(settings.context.clip, **options))
    if not settings.text.pretrained:
        return Frozen(vae, None, vision)
    return Frozen(vae, _load_text(settings, options), vision)


def _load_text(settings: Settings, options: dict[str, Any]) -> FrozenText | FrozenT5:
    folder = settings.text.pretrained
    config = read_json(Path(folder, "config.json"), "a folder of a CLIP text or T5 encoder")
    if config.get("model_type") == "t5":  # relative positions: any length
        text = FrozenT5(load_t5(folder, **options))
        width, longest = text.t5.config.d_model, settings.data.max_length
    else:
        text = FrozenText(load_clip_text(folder, **options))
        width, longest = text.clip.config.hidden_size, text.clip.config.max_position_embeddings
    for field, (given, wanted) in settings.model.text_fields(width).items():
        if given != wanted:
            raise ValueError(f"model.{field}={given}: text.pretrained={folder!r} has {width}")
    if settings.data.max_length > longest:
        raise ValueError(
            f"data.max_length={settings.data.max_length}: text.pretrained={folder!r} has {longest}"
        )
    return text
