"""Patches of a picture as channels, and back."""

from __future__ import annotations

from einops import rearrange
from jax.typing import ArrayLike
from jaxtyping import Float


def space_to_depth(
    x: Float[ArrayLike, "B H W C"], p: int, field: str
) -> Float[ArrayLike, "B h w P"]:
    """Non-overlapping p x p patches, each one pixel of p*p*C channels; of 1 the picture itself.

    ValueError, naming the config's `field`, if p doesn't divide height and width.
    """
    H, W = x.shape[1:3]
    if H % p or W % p:
        raise ValueError(f"{field}={p}: must divide the picture's height and width, {H} x {W}")
    if p == 1:
        return x
    return rearrange(x, "B (h p) (w q) C -> B h w (p q C)", p=p, q=p)


def depth_to_space(x: Float[ArrayLike, "B h w P"], p: int) -> Float[ArrayLike, "B H W C"]:
    """The inverse of `space_to_depth`."""
    if p == 1:
        return x
    return rearrange(x, "B h w (p q C) -> B (h p) (w q) C", p=p, q=p)
