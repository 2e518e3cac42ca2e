"""softmax(q k^T) v: the plain core, its form for many tokens on a CPU, and self-attention as what
suits the target.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from contextdiff_jax.models import flash
from contextdiff_jax.parallel.mesh import current_target

_TILE = 128  # queries, about
HIDDEN = -1e30  # the bias of a key that doesn't count: far below all others


def attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H D"],
    mask: Bool[ArrayLike, "#B *N M"] | None = None,
    *,
    bias: Float[ArrayLike, "H N M"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B N H D"]:
    """softmax(scale q k^T + bias) v per head, logits and softmax in float32: the one attention
    core.

    `scale` is 1 / sqrt(D) unless given. Keys whose mask is False (for every query, or with an axis
    N for each) get no weight; a row without any valid key attends uniformly, so it stays finite.
    The weights are normalised after their product with v, which has D columns and not M: two passes
    over N M less. XLA's CPU backend is why heads go in front of tokens (over the B N H D layout the
    same einsums take four times as long: forward at B 16, N 256, H 8, D 16: 60 ms against 15), and
    why k and v stand across: their gradients are then products that it is fast at (62 against 20
    GFLOP/s, one core), which without the barriers it would turn about again.
    """
    q = jnp.swapaxes(q, 1, 2)  # [B, H, N, D]
    k, v = (_across(jnp.moveaxis(y, 1, 3)) for y in (k, v))  # [B, H, D, M]
    logits = jnp.einsum("bhnd,bhdm->bhnm", q, k, preferred_element_type=jnp.float32)
    logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if mask is not None:
        mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]  # [B, 1, 1 or N, M]
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))  # [B, H, N, M]
    out = jnp.einsum(
        "bhnm,bhdm->bhnd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    out = (out / weights.sum(-1, keepdims=True)).astype(v.dtype)
    return jnp.swapaxes(out, 1, 2)  # [B, N, H, D]


def _across(y: Float[Array, "B H D M"]) -> Float[Array, "B H D M"]:
    """y, which stays as it lies; on a GPU XLA may turn it about as its products like it."""
    return y if current_target().platform == "gpu" else jax.lax.optimization_barrier(y)


def tiled_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H E"],
    *,
    scale: float | None = None,
) -> Float[Array, "B N H E"]:
    """`attention`, a tile of one head's queries after the other, as FlashAttention (Dao et al.,
    2022): the logits in memory are a tile's, and the backward pass computes them once more. For a
    CPU, whose cache they stay in (one core, 2 x 1024 tokens, 8 heads of 16, forward and backward:
    56 ms; `attention` 205, torch 78).
    """
    B, N, H, D = q.shape
    # As equal as can be: of 272 queries (a picture's and a text's) three tiles of 128 would be 384.
    tile, width = -(-N // max(round(N / _TILE), 1)), v.shape[-1]
    q = jnp.swapaxes(q * (D**-0.5 if scale is None else scale), 1, 2).reshape(B * H, N, D)
    q = jnp.pad(q, ((0, 0), (0, -N % tile), (0, 0))).reshape(B * H, -1, tile, D)
    k, v = (jnp.moveaxis(y, 1, 3).reshape(B * H, y.shape[-1], -1) for y in (k, v))
    out = jax.lax.map(lambda qkv: _head(*qkv), (q, k, v))  # [B*H, N / tile, tile, D]
    return jnp.swapaxes(out.reshape(B, H, -1, width)[:, :, :N], 1, 2)


@jax.custom_vjp
def _head(
    q: Float[Array, "T N D"], k: Float[Array, "D M"], v: Float[Array, "E M"]
) -> Float[Array, "T N E"]:
    """One head's attention, queries scaled and in tiles."""
    return _head_forward(q, k, v)[0]


def _head_forward(q, k, v):
    k, v = jax.lax.optimization_barrier((k, v))  # stay turned about, as in `attention`

    def tile(q):
        logits = jnp.dot(q, k, preferred_element_type=jnp.float32)  # [N, M]
        largest = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = weights.sum(-1, keepdims=True)
        out = jnp.einsum(
            "nm,dm->nd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return (out / total).astype(v.dtype), largest + jnp.log(total)

    out, lse = checkpoint_name(jax.lax.map(tile, q), flash.RESIDUALS)  # [T, N, D], [T, N, 1]
    return out, (q, k, v, out, lse)


def _head_backward(residuals, d_out):
    """The gradients, with P = exp(S - lse) a tile at a time: dS = P (dP - rowsum(dO O)),
    dP = dO V^T (FlashAttention, B.2).
    """
    q, k, v, out, lse = residuals
    d_total = (d_out * out).sum(-1, keepdims=True, dtype=jnp.float32)  # [T, N, 1]

    def tile(sums, rows):
        q, d_out, lse, d_total = rows
        dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        weights = jnp.exp(dot("nd,dm->nm", q, k) - lse)
        d_logits = (weights * (dot("nd,dm->nm", d_out, v) - d_total)).astype(q.dtype)
        d_k, d_v = dot("nd,nm->dm", q, d_logits), dot("nd,nm->dm", d_out, weights.astype(q.dtype))
        return (sums[0] + d_k, sums[1] + d_v), dot("nm,dm->nd", d_logits, k).astype(q.dtype)

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    (d_k, d_v), d_q = jax.lax.scan(tile, zeros, (q, d_out, lse, d_total))
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype)


_head.defvjp(_head_forward, _head_backward)


def self_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H D"],
    scale: float | None = None,
    mask: Bool[ArrayLike, "B M"] | None = None,
    *,
    choice: str,
) -> Float[Array, "B N H D"]:
    """`attention` of tokens to themselves or to others, as `choice` of `flash.CHOICES` says or its
    `auto` finds.
    """
    target, scale = current_target(), q.shape[-1] ** -0.5 if scale is None else scale
    how = flash.formulation(choice, q, k, target)
    if kernel := {"splash": flash.splash_attention, "cudnn": flash.cudnn_attention}.get(how):
        return kernel(q, k, v, scale, mask, target=target)
    if how == "tiles":
        q, k = (q, k) if mask is None else with_bias(q, k, jnp.where(mask, 0.0, HIDDEN))
        return flash.on_each_device(
            functools.partial(tiled_attention, scale=scale), q, k, v, target
        )
    return attention(q, k, v, mask, scale=scale)


def with_bias(
    q: Float[Array, "B N H D"], k: Float[Array, "B M H D"], bias: Float[Array, "B M"]
) -> tuple[Float[Array, "B N H D2"], Float[Array, "B M H D2"]]:
    """q and k with one more column, by which each key's products have its bias added, before they
    are scaled: so all that computes attention can.
    """
    column = jnp.broadcast_to(bias.astype(k.dtype)[..., None, None], (*k.shape[:3], 1))
    ones = jnp.ones((*q.shape[:3], 1), q.dtype)
    return jnp.concatenate([q, ones], axis=-1), jnp.concatenate([k, column], axis=-1)


def heads_attention(
    q: Float[Array, "B H N D"],
    k: Float[Array, "B H M D"],
    v: Float[Array, "B H M D"],
    mask: Bool[ArrayLike, "B M"] | None = None,
    *,
    choice: str,
) -> Float[Array, "B H N D"]:
    """`self_attention` of queries that are scaled already; heads stand in front of tokens."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # which its core turns back
    return jnp.swapaxes(self_attention(q, k, v, 1.0, mask, choice=choice), 1, 2)


def joint_attention(
    picture: tuple[Array, Array, Array],
    text: tuple[Array, Array, Array],
    mask: Bool[ArrayLike, "B L"] | None = None,
    *,
    choice: str = "auto",
    both: bool = True,
) -> tuple[Float[Array, "B H N D"], Float[Array, "B H L D"] | None]:
    """What the tokens of both find among all of them; each gives its q (scaled), k and v,
    [B, H, N, D].

    `mask`: which of the text's tokens are found, by anybody. Without `both` the text only is read.
    """
    (q, *found), (q_text, *found_text) = picture, text
    B, _, N, _ = q.shape
    k, v = (jnp.concatenate(pair, axis=2) for pair in zip(found, found_text, strict=True))
    if mask is not None:
        mask = jnp.concatenate([jnp.ones((B, N), bool), mask], axis=1)  # [B, N + L]
    attend = functools.partial(heads_attention, k=k, v=v, mask=mask, choice=choice)
    if not both:
        return attend(q), None
    if current_target().splits("rows"):  # the picture's queries are; the text's all devices have
        return attend(q), attend(q_text)
    out = attend(jnp.concatenate([q, q_text], axis=2))
    return out[:, :, :N], out[:, :, N:]
