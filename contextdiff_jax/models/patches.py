"""Pictures as patches, p x p pixels each: as a smaller picture of more channels, or as tokens."""

from __future__ import annotations

from einops import rearrange
from jax.typing import ArrayLike
from jaxtyping import Array, Float


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


def patches(x: Float[ArrayLike, "B H W C"], p: int, field: str) -> Float[ArrayLike, "B N P"]:
    """The patches as tokens, row by row; raises as `space_to_depth`."""
    return rearrange(space_to_depth(x, p, field), "B h w P -> B (h w) P")


def unpatch(
    tokens: Float[ArrayLike, "B N P"], p: int, shape: tuple[int, ...]
) -> Float[Array, "B H W C"]:
    """The inverse of `patches`; `shape` is that of the picture."""
    return depth_to_space(rearrange(tokens, "B (h w) P -> B h w P", h=shape[1] // p), p)
