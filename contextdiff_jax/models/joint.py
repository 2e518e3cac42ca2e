"""Joint attention of two streams, picture and text: each has its own weights, and all tokens see
each other (Esser et al., 2024, 4.2).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float

from contextdiff_jax.models.attention import heads_attention, joint_attention
from contextdiff_jax.models.layers import gelu_tanh, linear
from contextdiff_jax.models.remat import from_arguments
from contextdiff_jax.parallel.mesh import current_target, laid

EPS = 1e-6


def normalise(x: Float[ArrayLike, "B N D"]) -> Float[Array, "B N D"]:
    """Layer normalisation without parameters, in float32.

    Mean and mean square come of one reading, which a TPU does while it writes the product before.
    """
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean)
    return (x - mean) * lax.rsqrt(jnp.maximum(variance, 0.0) + EPS)


@from_arguments
def modulate(
    x: Float[ArrayLike, "B N D"], shift: Float[ArrayLike, "B D"], scale: Float[ArrayLike, "B D"]
) -> Float[Array, "B N D"]:
    """The normalised x, scaled and shifted by what the time says (adaLN, Peebles & Xie, 2023)."""
    return (normalise(x) * (1 + scale[:, None]) + shift[:, None]).astype(x.dtype)


def to_heads(
    project: nnx.Linear, x: Float[ArrayLike, "B N D"], num_heads: int
) -> Float[Array, "B H N E"]:
    """`project(x)` by heads.

    On a TPU the product itself writes them so: turned about after it, a joint block of 12 heads of
    128 on v5p takes 36% more cycles, all of them copies. The barrier is for the gradient, which
    XLA would make [D, H E] at once, of a copy that is turned about.
    """
    if current_target().platform != "tpu":
        return rearrange(project(x), "B N (H E) -> B H N E", H=num_heads)
    kernel = lax.optimization_barrier(
        rearrange(project.kernel[...], "D (H E) -> D H E", H=num_heads)
    )
    out = jnp.einsum("BND,DHE->BHNE", *(a.astype(project.dtype) for a in (x, kernel)))
    return out + rearrange(project.bias[...], "(H E) -> H 1 E", H=num_heads).astype(out.dtype)


def from_heads(project: nnx.Linear, x: Float[ArrayLike, "B H N E"]) -> Float[Array, "B N D"]:
    """`project` of all heads' features, as `to_heads`."""
    if current_target().platform != "tpu":
        return project(rearrange(x, "B H N E -> B N (H E)"))
    kernel = lax.optimization_barrier(
        rearrange(project.kernel[...], "(H E) D -> H E D", H=x.shape[1])
    )
    out = jnp.einsum("BHNE,HED->BND", *(a.astype(project.dtype) for a in (x, kernel)))
    return out + project.bias[...].astype(out.dtype)


@from_arguments
def divided(x: Float[ArrayLike, "*S D"], scale: Float[Array, "D"]) -> Float[Array, "*S D"]:
    """x over its root mean square, in float32, times `scale`."""
    h = x.astype(jnp.float32)
    h = h * lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + EPS)
    return (h * scale).astype(x.dtype)


class HeadNorm(nnx.Module):
    """Division by the root mean square of a head's features, in float32, times a learned scale."""

    def __init__(self, features: int, *, param_dtype: DTypeLike, dtype: DTypeLike, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))

    def __call__(self, x: Float[ArrayLike, "*S D"], factor: float = 1.0) -> Float[Array, "*S D"]:
        """The normalised x times `factor`."""
        return divided(x, self.scale[...].astype(jnp.float32) * factor)


class HeadProjections(nnx.Module):
    """Queries, keys and values of one stream's tokens, and the way back from what they find.

    `qk_norm`: queries and keys are divided by their root mean square, head by head. `back`: whether
    what is found is used. The heads stand in front of the tokens from the product on, as the
    attention reads them: a TPU pads 12 heads beside 128 features to 16, and copies.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        qk_norm: bool = False,
        back: bool = True,
        **policy: Any,
    ):
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = (linear(features, features, **policy) for _ in range(3))
        self.to_out = linear(features, features, **policy) if back else None
        self.norm_q, self.norm_k = (
            HeadNorm(features // num_heads, **policy) if qk_norm else None for _ in range(2)
        )

    def __call__(self, x: Float[ArrayLike, "B N D"]) -> tuple[Array, Array, Array]:
        """q, k, v, each [B, H, N, D / H]; q is scaled by the root of D / H already."""
        q, k, v = (to_heads(p, x, self.num_heads) for p in (self.to_q, self.to_k, self.to_v))
        scale = q.shape[-1] ** -0.5
        if self.norm_q is None:
            return q * scale, k, v
        return self.norm_q(q, scale), self.norm_k(k), v

    def back(self, found: Float[ArrayLike, "B H N D2"]) -> Float[Array, "B N D"]:
        """The heads' findings in the stream's features."""
        return from_heads(self.to_out, found)


class MLP(nnx.Module):
    """Linear, GELU (its tanh form), linear; four times as wide inside."""

    def __init__(self, features: int, **policy: Any):
        self.proj_in = linear(features, 4 * features, **policy)
        self.proj_out = linear(4 * features, features, **policy)

    def __call__(self, x: Float[ArrayLike, "B N D"]) -> Float[Array, "B N D"]:
        return self.proj_out(gelu_tanh(self.proj_in(x)))


class Stream(nnx.Module):
    """One stream's weights in a joint block.

    `modulation` gives of the time, in this order: shift, scale and gate of the attention; shift,
    scale and gate of the MLP; with `dual` shift, scale and gate of a second attention, of the
    stream alone. A stream that is `read_only`, because nobody reads it afterwards, has but a scale
    and a shift. All start at 0, so that a new block changes nothing; gates that are `open` at 1.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        qk_norm: bool = False,
        dual: bool = False,
        read_only: bool = False,
        open_gates: bool = False,
        **policy: Any,
    ):
        heads = dict(qk_norm=qk_norm, **policy)
        self.parts = 2 if read_only else 9 if dual else 6
        self.modulation = linear(features, self.parts * features, zero_init=True, **policy)
        if open_gates:
            gates = jnp.arange(self.parts) % 3 == 2
            self.modulation.bias[...] = jnp.repeat(gates, features).astype(policy["param_dtype"])
        self.attn = HeadProjections(features, num_heads, back=not read_only, **heads)
        self.attn2 = HeadProjections(features, num_heads, **heads) if dual else None
        self.ff = None if read_only else MLP(features, **policy)

    def modulations(self, time: Float[ArrayLike, "B D"]) -> list[Float[Array, "B D"]]:
        """The parts named above."""
        parts = jnp.split(self.modulation(time), self.parts, axis=-1)
        return parts[::-1] if self.ff is None else parts  # as the weights of diffusers lie

    def finish(
        self,
        x: Float[ArrayLike, "B N D"],
        found: Float[ArrayLike, "B H N D2"],
        parts: list[Float[Array, "B D"]],
        attend: Callable[[Array, Array, Array], Array],
    ) -> Float[Array, "B N D"]:
        """x after the block, from what its queries found; `attend(q, k, v)`: what those of the
        second attention find.
        """
        gate, shift_mlp, scale_mlp, gate_mlp, *second = parts[2:]
        alone = None
        if self.attn2 is not None:
            alone = self.attn2.back(attend(*self.attn2(modulate(x, *second[:2]))))
        x = x + gate[:, None] * self.attn.back(found)
        if alone is not None:
            x = x + second[2][:, None] * alone
        return x + gate_mlp[:, None] * self.ff(modulate(x, shift_mlp, scale_mlp))


class JointBlock(nnx.Module):
    """Attention over both streams' tokens, then an MLP in each.

    `last`: the text is read and goes no further. `self_attention`: what computes the attention
    (models.flash).
    """

    self_attention = "auto"

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        qk_norm: bool = False,
        dual: bool = False,
        last: bool = False,
        open_gates: bool = False,
        **policy: Any,
    ):
        heads = dict(qk_norm=qk_norm, open_gates=open_gates, **policy)
        self.picture = Stream(features, num_heads, dual=dual, **heads)
        self.text = Stream(features, num_heads, read_only=last, **heads)

    def __call__(
        self,
        x: Float[ArrayLike, "B N D"],
        text: Float[ArrayLike, "B L D"],
        time: Float[ArrayLike, "B D"],
        mask: Bool[ArrayLike, "B L"] | None = None,
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B L D"]]:
        """Both streams' tokens after the block; `time`: its embedding, after the activation;
        `mask`: True where a token of the text counts (None: all do).
        """
        choice = self.self_attention
        x, text = laid(x, ("batch", "rows", None)), laid(text, ("batch", None, None))
        joint = functools.partial(joint_attention, mask=mask, choice=choice)
        return self.through(x, text, time, joint, functools.partial(heads_attention, choice=choice))

    def through(
        self,
        x: Float[ArrayLike, "B N D"],
        text: Float[ArrayLike, "B L D"],
        time: Float[ArrayLike, "B D"],
        joint: Callable[..., tuple[Array, Array | None]],
        alone: Callable[[Array, Array, Array], Array],
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B L D"]]:
        """The block by other attentions: `joint(picture, text, both=)` as `joint_attention`, and
        `alone(q, k, v)`, as `heads_attention`, of the picture to itself.
        """
        last = self.text.ff is None
        of_picture, of_text = self.picture.modulations(time), self.text.modulations(time)
        picture = self.picture.attn(modulate(x, *of_picture[:2]))
        caption = self.text.attn(modulate(text, *of_text[:2]))
        found, read = joint(picture, caption, both=not last)
        x = self.picture.finish(x, found, of_picture, alone)
        return x, text if last else self.text.finish(text, read, of_text, alone)
