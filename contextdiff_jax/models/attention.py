"""softmax(q k^T) v: the plain core, its form for long sequences on a CPU, and self-attention as what suits the target."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from contextdiff_jax.models import flash
from contextdiff_jax.parallel.mesh import current_target


def attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H D"],
    mask: Bool[Array, "B *N M"] | None = None,
    *,
    bias: Float[Array, "H N M"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B N H D"]:
    """softmax(scale q k^T + bias) v per head, logits and softmax in float32: the one attention core.

    `scale` is 1 / sqrt(D) unless given. Keys whose mask is False (for every query, or with an axis N for each)
    get no weight; a row without any valid key attends uniformly, so it stays finite.
    The weights are normalised after their product with v, which has D columns and not M: two passes over N M less.
    XLA's CPU backend is why heads go in front of tokens (over the B N H D layout the same einsums take four times as
    long: forward at B 16, N 256, H 8, D 16: 60 ms against 15), and why k and v stand across: their gradients are then
    products that it is fast at (62 against 20 GFLOP/s, one core), which without the barriers it would turn about again.
    """
    q = jnp.swapaxes(q, 1, 2)  # [B, H, N, D]
    k, v = (jax.lax.optimization_barrier(jnp.moveaxis(y, 1, 3)) for y in (k, v))  # [B, H, D, M]
    logits = jnp.einsum("bhnd,bhdm->bhnm", q, k, preferred_element_type=jnp.float32)
    logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if mask is not None:
        mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]  # [B, 1, 1 or N, M]
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))  # [B, H, N, M]
    out = jnp.einsum("bhnm,bhdm->bhnd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = (out / weights.sum(-1, keepdims=True)).astype(v.dtype)
    return jnp.swapaxes(out, 1, 2)  # [B, N, H, D]


def attention_by_heads(
    q: Float[Array, "B N H D"], k: Float[Array, "B M H D"], v: Float[Array, "B M H D"], *, scale: float | None = None
) -> Float[Array, "B N H D"]:
    """`attention`, one head of one example after the other, and once more in the backward pass: N M logits are in memory at
    a time, not B H N M, and on a CPU they stay in its cache (one core, 4 x 1024 tokens, 8 heads of 16: 39 ms against 57)."""
    B, N, H, D = q.shape
    one = jax.checkpoint(lambda *qkv: attention(*(y[None, :, None] for y in qkv), scale=scale)[0, :, 0])  # [N, D]
    heads = (jnp.swapaxes(y, 1, 2).reshape(B * H, -1, D) for y in (q, k, v))
    out = jax.lax.map(lambda qkv: one(*qkv), tuple(heads))  # [B*H, N, D]
    return jnp.swapaxes(out.reshape(B, H, N, D), 1, 2)


def self_attention(
    q: Float[Array, "B N H D"], k: Float[Array, "B N H D"], v: Float[Array, "B N H D"], scale: float | None, *, choice: str
) -> Float[Array, "B N H D"]:
    """`attention` of tokens to themselves, all of them, as `choice` of `flash.CHOICES` says or its `auto` finds."""
    target = current_target()
    how = flash.formulation(choice, q.shape[1], target)
    if how == "splash":
        return flash.splash_attention(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, target=target)
    if how == "heads":
        return flash.on_each_device(functools.partial(attention_by_heads, scale=scale), q, k, v, target)
    return attention(q, k, v, scale=scale)
