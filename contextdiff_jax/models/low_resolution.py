"""The low-resolution picture that an upsampler reads beside x_t (Ho et al., 2021; Saharia et al.,
2022).

    y_l = cos(pi l / 2) y + sin(pi l / 2) noise,   l in [0, 1]                                  (1)

y is the picture at the low resolution, l its noise's level. In training l is drawn and the network
reads it, so that it learns how far y is to be trusted; in sampling l is chosen. The noise comes
before the enlarging: it hides as much of y, whatever the factor.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import reduce
from jax.typing import ArrayLike
from jaxtyping import Array, Float, UInt8

from contextdiff_jax.models.layers import timestep_embedding


class LowResolution(NamedTuple):
    """What networks read: (1), enlarged to x0's size, and the level."""

    picture: Float[ArrayLike, "B H W C"]
    level: Float[ArrayLike, "B"]


def shrink(images: UInt8[ArrayLike, "B H W C"], factor: int) -> UInt8[ArrayLike, "B H2 W2 C"]:
    """The means of squares of `factor` pixels a side; numpy's stay numpy's. A piece whose place is
    a multiple of `factor` shrinks to that piece of the whole picture, shrunk.

    ValueError if the factor doesn't divide height and width.
    """
    height, width = images.shape[1:3]
    if height % factor or width % factor:
        raise ValueError(
            f"super_resolution.factor={factor}: must divide the picture's height and width, "
            f"{height} x {width}"
        )
    mean = reduce(
        images.astype(jnp.float32), "B (h p) (w q) C -> B h w C", "mean", p=factor, q=factor
    )
    return mean.round().astype(jnp.uint8)


def augment(
    small: Float[ArrayLike, "B h w C"],
    level: Float[ArrayLike, "B"],
    noise: Float[ArrayLike, "B h w C"],
) -> Float[Array, "B h w C"]:
    """(1)."""
    angle = 0.5 * jnp.pi * level[:, None, None, None]
    return jnp.cos(angle) * small + jnp.sin(angle) * noise


def enlarged(
    small: Float[ArrayLike, "B h w C"],
    factor: int,
    level: Float[ArrayLike, "B"],
    noise: Float[ArrayLike, "B h w C"],
) -> LowResolution:
    """`small` as networks read it: noised, then bicubic."""
    return LowResolution(bicubic(augment(small, level, noise), factor), level)


def bicubic(small: Float[ArrayLike, "B h w C"], factor: int) -> Float[Array, "B H W C"]:
    """Enlarged by a whole factor, without a network."""
    B, h, w, C = small.shape
    return jax.image.resize(small, (B, factor * h, factor * w, C), "bicubic")


def embed_level(level: Float[ArrayLike, "B"], features: int) -> Float[Array, "B D"]:
    """The level's sinusoids, as those of a time in 0..1000."""
    return timestep_embedding(1000 * level, features)
