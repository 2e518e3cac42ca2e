"""Self-attention without its matrix of weights: JAX's Pallas splash kernel where the target is a
TPU, and who decides.

At 4096 tokens XLA writes the float32 logits of all heads to HBM and reads them back, several times
in training; the kernel keeps a block of them on the chip (Dao et al., 2022). A CPU takes a tile of
one head's queries at a time, whose logits fit its cache (`attention.tiled_attention`).
Cross-attention to a few dozen text tokens has no such matrix to save: it stays with XLA, as do
short sequences. On a GPU cuDNN's flash attention takes both kinds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from contextdiff_jax.parallel.mesh import Target, current_target, place

CHOICES = ("auto", "xla", "splash", "tiles", "cudnn")
# the checkpoint name of what the backward passes read: output and log-sum-exp
RESIDUALS = "splash_residuals"
# What `auto` takes by platform, from as many keys: below, XLA's logits fit beside everything else.
_LONG = {"tpu": ("splash", 1024), "cpu": ("tiles", 256)}
# On a GPU it takes cuDNN's from as many logits a head (queries x keys): on an H200 five to eight
# times as fast as XLA's with 1,178 and more tokens, 1.1 times with 4096 queries and 77 keys, half
# as fast with 64 tokens.
_GPU_LOGITS = 2**16
# The forms made for a platform, beside XLA's.
_OWN = {"tpu": "splash", "cpu": "tiles", "gpu": "cudnn"}
_CUDNN_TYPES = (jnp.bfloat16, jnp.float16)
# The splash kernel's blocks are multiples of a TPU's lanes. In the backward pass 4096 keys
# don't fit in a v5e's or v5p's VMEM.
_LANES, _BLOCK, _LONG_BLOCK = 128, 512, 2048


def formulation(
    choice: str, q: Float[ArrayLike, "B N H D"], k: Float[ArrayLike, "B M H D"], target: Target
) -> str:
    """The name in `CHOICES` of what the attention of `q` to `k` runs as. `auto` follows the
    platform that is compiled for, which needn't be this machine's, and takes XLA's where the
    platform's own can't be had.
    """
    if choice != "auto":
        return choice
    if target.platform == "gpu":
        width = k.shape[-1]
        can = k.dtype in _CUDNN_TYPES and width % 8 == 0 and width <= 128
        return "cudnn" if can and q.shape[1] * k.shape[1] >= _GPU_LOGITS else "xla"
    how, least = _LONG.get(target.platform, ("xla", 0))
    return how if k.shape[1] >= least else "xla"


def choices_of(target: Target) -> tuple[str, ...]:
    """The forms that a platform has, XLA's first."""
    return ("xla", *([_OWN[target.platform]] if target.platform in _OWN else []))


def cudnn_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H D"],
    scale: float,
    mask: Bool[ArrayLike, "B M"] | None = None,
    *,
    target: Target | None = None,
) -> Float[Array, "B N H D"]:
    """softmax(scale q k^T) v per head by cuDNN's flash attention, over the keys in `mask`.

    Raises ValueError for float32, which it doesn't compute in.
    """
    if q.dtype not in _CUDNN_TYPES:
        raise ValueError(
            f"train.attention='cudnn': computes in bfloat16, and these are {q.dtype}; "
            "train.precision=bfloat16, or another train.attention"
        )
    target = current_target() if target is None else target

    def one_device(q, k, v, mask=None):
        attend = functools.partial(
            jax.nn.dot_product_attention, scale=scale, implementation="cudnn"
        )
        N, M = q.shape[1], k.shape[1]
        if mask is None and not N % 2 and not M % 2:
            return attend(q, k, v)
        # In training it takes even numbers of queries and keys alone.
        mask = jnp.ones((len(k), M), bool) if mask is None else mask
        q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
        found = jnp.pad(mask, ((0, 0), (0, M % 2)))[:, None, None, :]
        found = jnp.broadcast_to(found, (len(q), 1, q.shape[1], k.shape[1]))
        return attend(q, k, v, mask=found)[:, :N]

    return on_each_device(one_device, q, k, v, target, mask)


def on_each_device(
    kernel: Callable[..., Array],
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H E"],
    target: Target,
    mask: Bool[ArrayLike, "B M"] | None = None,
) -> Float[Array, "B N H E"]:
    """`kernel(q, k, v)`, with the mask where there is one, by each of the target's devices for its
    own examples, heads and rows: a program of one device, which XLA's partitioner can't split.
    """
    masks = () if mask is None else (mask,)
    if target.mesh is None:
        return kernel(q, k, v, *masks)
    queries = place(target.mesh, q.shape, ("batch", "rows", "heads", None), target.rules).spec
    keys = place(
        target.mesh, k.shape, ("batch", None, "heads", None), target.rules
    ).spec  # all rows: every query reads them
    hidden = [place(target.mesh, mask.shape, ("batch", None), target.rules).spec for mask in masks]
    return jax.shard_map(
        kernel,
        mesh=target.mesh,
        in_specs=(queries, keys, keys, *hidden),
        out_specs=queries,
        check_vma=False,
    )(q, k, v, *masks)


def splash_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H D"],
    scale: float,
    mask: Bool[ArrayLike, "B M"] | None = None,
    *,
    target: Target | None = None,
) -> Float[Array, "B N H D"]:
    """softmax(scale q k^T) v per head, over the keys in `mask` (None: all; `target`: the current
    one). Off a TPU the kernel is interpreted: right, and slow.
    """
    target = current_target() if target is None else target
    return on_each_device(
        functools.partial(_one_device, scale=scale, interpret=target.platform != "tpu"),
        q,
        k,
        v,
        target,
        mask,
    )


def _one_device(
    q: Array, k: Array, v: Array, mask: Array | None = None, *, scale: float, interpret: bool
) -> Array:
    """Tokens are padded to whole blocks, which segment ids hide, and the head's width to the lanes,
    which zeros hide.
    """
    (N, H, D), M = q.shape[1:], k.shape[1]
    rows, columns = _padded(N), _padded(M)
    width = -D % _LANES
    q, k, v = (
        jnp.pad(
            jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, length - x.shape[1]), (0, width))
        )  # [B, H, N, D]
        for x, length in ((q * scale, rows), (k, columns), (v, columns))
    )
    block_q, block_kv = _block(rows, _BLOCK), _block(columns, _BLOCK)
    # One backward kernel for all three gradients: a second, for dq alone, would compute the logits
    # and their gradient again. It writes a dq for each of its blocks of keys, summed after it: so
    # these are long.
    sizes = splash_kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv * _block(columns // block_kv, _LONG_BLOCK // block_kv, 1),
        block_kv_dkv_compute=block_kv,
        use_fused_bwd_kernel=True,
    )
    full = splash_mask.MultiHeadMask([splash_mask.FullMask((rows, columns))] * H)
    kernel = splash_kernel.make_splash_mha_single_device(
        full, block_sizes=sizes, interpret=interpret, residual_checkpoint_name=RESIDUALS
    )
    segments = None
    if rows > N or columns > M or mask is not None:
        # Queries find the keys of their own segment, 0; rows of padding find what nobody reads.
        found = jnp.ones((len(k), M), bool) if mask is None else mask
        found = jnp.pad(found, ((0, 0), (0, columns - M)))
        segments = splash_kernel.SegmentIds(
            jnp.zeros((len(q), rows), jnp.int32), (~found).astype(jnp.int32)
        )
    out = jax.vmap(lambda q, k, v, segments: kernel(q, k, v, segment_ids=segments))(
        q, k, v, segments
    )
    return jnp.swapaxes(out[:, :, :N, :D], 1, 2)


def _padded(tokens: int) -> int:
    return tokens + -tokens % _LANES


def _block(length: int, limit: int, unit: int = _LANES) -> int:
    """The largest multiple of `unit` up to `limit` that divides `length`."""
    return next(size for size in range(min(limit, length), 0, -unit) if length % size == 0)
