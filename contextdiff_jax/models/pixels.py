"""The two scales of pictures: as they are stored, 0 to 255, and as networks read them, -1 to 1."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, UInt8


def to_unit(images: UInt8[ArrayLike, "*B H W C"]) -> Float[ArrayLike, "*B H W C"]:
    """Stored pictures in [-1, 1], float32; numpy's stay numpy's."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(x: Float[ArrayLike, "*B H W C"]) -> UInt8[Array, "*B H W C"]:
    """Pictures in [-1, 1], clipped, as they are stored."""
    return jnp.round((jnp.clip(x, -1, 1) + 1) * 127.5).astype(jnp.uint8)
