"""Encoded captions, and what networks read of them beside the tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from contextdiff_jax.models.low_resolution import LowResolution


class Captions(NamedTuple):
    """Encoded captions: token states, which of them count, the pooled text of an encoder that gives
    one (None: the mean of the tokens that count is read where one is wanted), the sizes of their
    pictures (None: what is made is its picture, without a crop), as `data.sizes` has them, and for
    an upsampler the low-resolution pictures, which stay where guidance hides the text.
    """

    tokens: Float[ArrayLike, "B L D"]
    mask: Bool[ArrayLike, "B L"]
    pooled: Float[Array, "B P"] | None = None
    sizes: Float[ArrayLike, "B 6"] | None = None
    low: LowResolution | None = None

    def hidden(self) -> Captions:
        """Zeros in the place of the text's states; all else stays."""
        pooled = None if self.pooled is None else jnp.zeros_like(self.pooled)
        return self._replace(tokens=jnp.zeros_like(self.tokens), pooled=pooled)


def encode(
    text: Callable[..., Any], ids: Int[ArrayLike, "B *E L"], mask: Bool[ArrayLike, "B L"]
) -> Captions:
    """A text encoder's captions of token ids; the tokens of one that gives its states alone count
    as the mask says.
    """
    states = text(ids, mask)
    return Captions(*states) if isinstance(states, tuple) else Captions(states, mask)


def pool(tokens: Float[ArrayLike, "B L D"], mask: Bool[ArrayLike, "B L"]) -> Float[Array, "B 1 D"]:
    """Mean over the tokens that count."""
    # A product with the mask here gave nonsense on CPUs, anew at each call, for one caption read by
    # 17 or more frames: XLA's library of CPU kernels adds up products of two broadcast arrays
    # wrongly (jaxlib 0.10, github.com/google/XNNPACK/pull/11243).
    total = jnp.sum(tokens, axis=1, keepdims=True, where=mask[..., None])
    return total / jnp.maximum(mask.sum(1, dtype=tokens.dtype)[:, None, None], 1)


def pooled_text(captions: Captions) -> Float[Array, "B P"]:
    """The text as one vector."""
    if captions.pooled is not None:
        return captions.pooled
    return pool(captions.tokens, captions.mask)[:, 0]


def text_and_size(captions: Captions, height: int, width: int) -> dict[str, Array]:
    """What a UNet of the XL kind reads beside the tokens: the pooled text, and the captions' sizes,
    or without any the picture's own without a crop (SDXL, 2.2).
    """
    sizes = captions.sizes
    if sizes is None:
        sizes = jnp.array([height, width, 0, 0, height, width], jnp.float32)
    return {
        "text_embeds": pooled_text(captions),
        "time_ids": jnp.broadcast_to(sizes, (captions.tokens.shape[0], 6)),
    }
