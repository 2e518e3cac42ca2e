"""The networks that a run reads from folders and doesn't train."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import PyTree

from contextdiff_jax.models.contextdiff import Frozen, FrozenText, FrozenVision
from contextdiff_jax.pretrained import load_clip_text, load_clip_vision, load_vae
from contextdiff_jax.settings import Settings


def load_frozen(settings: Settings, shardings: Callable[[PyTree], PyTree] | None = None) -> Frozen:
    """The networks of `latent.vae`, `text.pretrained` and `context.clip`, in the types that are stored.

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
    clip = load_clip_text(settings.text.pretrained, **options)
    for field, value, wanted in (
        ("model.cross_attention_dim", settings.model.cross_attention_dim, clip.config.hidden_size),
        ("data.max_length", settings.data.max_length, clip.config.max_position_embeddings),
    ):
        if value > wanted or (value < wanted and field.startswith("model")):
            raise ValueError(f"{field}={value}: text.pretrained={settings.text.pretrained!r} has {wanted}")
    return Frozen(vae, FrozenText(clip), vision)
