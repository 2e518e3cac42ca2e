"""Pictures as patches, and back."""

from __future__ import annotations

from einops import rearrange
from jax.typing import ArrayLike
from jaxtyping import Array, Float


def patches(x: Float[ArrayLike, "B H W C"], p: int, field: str) -> Float[ArrayLike, "B N P"]:
    """Non-overlapping p x p patches, row-major; ValueError, which names the config's `field`, if p
    doesn't divide height and width.
    """
    H, W = x.shape[1:3]
    if H % p or W % p:
        raise ValueError(f"{field}={p}: must divide the picture's height and width, {H} x {W}")
    return rearrange(x, "B (h p) (w q) C -> B (h w) (p q C)", p=p, q=p)


def unpatch(
    tokens: Float[ArrayLike, "B N P"], p: int, shape: tuple[int, ...]
) -> Float[Array, "B H W C"]:
    """The inverse of `patches`; `shape` is that of the picture."""
    return rearrange(tokens, "B (h w) (p q C) -> B (h p) (w q) C", h=shape[1] // p, p=p, q=p)
