"""Encoded captions, and what networks read of them beside the tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float


class Captions(NamedTuple):
    """Encoded captions: token states, which of them count, and the pooled text of an encoder that
    gives one (None: the mean of the tokens that count is read where one is wanted).
    """

    tokens: Float[ArrayLike, "B L D"]
    mask: Bool[ArrayLike, "B L"]
    pooled: Float[Array, "B P"] | None = None


def pool(tokens: Float[ArrayLike, "B L D"], mask: Bool[ArrayLike, "B L"]) -> Float[Array, "B 1 D"]:
    """Mean over the tokens that count."""
    weight = mask[..., None].astype(tokens.dtype)
    return (tokens * weight).sum(1, keepdims=True) / jnp.maximum(weight.sum(1, keepdims=True), 1)


def pooled_text(captions: Captions) -> Float[Array, "B P"]:
    """The text as one vector."""
    tokens, mask, pooled = captions
    return pool(tokens, mask)[:, 0] if pooled is None else pooled


def text_and_size(captions: Captions, height: int, width: int) -> dict[str, Array]:
    """What a UNet of the XL kind reads beside the tokens: the pooled text, and the picture's size
    without a crop (SDXL, 2.2).
    """
    sizes = jnp.array([height, width, 0, 0, height, width], jnp.float32)
    return {
        "text_embeds": pooled_text(captions),
        "time_ids": jnp.broadcast_to(sizes, (captions.tokens.shape[0], 6)),
    }
