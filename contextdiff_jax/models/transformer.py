"""Attention as a layer, feed-forward, and the transformer over a picture's pixels.

Names and precision as in `layers`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from contextdiff_jax.models.attention import attention, self_attention
from contextdiff_jax.models.layers import GroupNorm, gelu, linear
from contextdiff_jax.models.remat import rematerialised


class Attention(nnx.Module):
    """Multi-head attention of tokens to `context_features` wide ones (None: to themselves).

    The heads are `features` wide together, unless `head_features` gives the width of each (T5).
    `scale`: of the logits, 1 / sqrt(head width) unless given. `self_attention`: what computes it
    (models.flash); attention to others is `xla` with it, else what suits the platform.
    """

    self_attention = "auto"

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        context_features: int | None = None,
        head_features: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = True,
        scale: float | None = None,
        zero_init: bool = False,
        **policy: Any,
    ):
        source = features if context_features is None else context_features
        inner = features if head_features is None else num_heads * head_features
        self.num_heads = num_heads
        self.scale = scale
        self.to_q = linear(features, inner, use_bias=qkv_bias, **policy)
        self.to_k = linear(source, inner, use_bias=qkv_bias, **policy)
        self.to_v = linear(source, inner, use_bias=qkv_bias, **policy)
        self.to_out = linear(inner, features, use_bias=out_bias, zero_init=zero_init, **policy)

    def __call__(
        self,
        x: Float[ArrayLike, "B N D"],
        context: Float[ArrayLike, "B M E"] | None = None,
        mask: Bool[ArrayLike, "#B *N M"] | None = None,
        bias: Float[ArrayLike, "H N M"] | None = None,
    ) -> Float[Array, "B N D"]:
        if context is None and mask is None and bias is None:
            return self.among(x, x)
        q, k, v = self._heads(x, x if context is None else context)
        if bias is None and (mask is None or mask.shape == k.shape[:2]):
            choice = "xla" if self.self_attention == "xla" else "auto"
            out = self_attention(q, k, v, self.scale, mask, choice=choice)
        else:
            out = attention(q, k, v, mask, bias=bias, scale=self.scale)
        return self.to_out(rearrange(out, "B N H D -> B N (H D)"))

    def among(
        self, x: Float[ArrayLike, "B N D"], pictures: Float[ArrayLike, "B M D"]
    ) -> Float[Array, "B N D"]:
        """To the tokens of `pictures`, its own or others': nothing is hidden or weighed, which is
        what the kernels compute.
        """
        q, k, v = self._heads(x, pictures)
        out = self_attention(q, k, v, self.scale, choice=self.self_attention)
        return self.to_out(rearrange(out, "B N H D -> B N (H D)"))

    def _heads(
        self, x: Float[ArrayLike, "B N D"], source: Float[ArrayLike, "B M E"]
    ) -> tuple[Array, Array, Array]:
        qkv = self.to_q(x), self.to_k(source), self.to_v(source)
        return tuple(rearrange(y, "B N (H D) -> B N H D", H=self.num_heads) for y in qkv)


class FeedForward(nnx.Module):
    """GEGLU feed-forward (Shazeer, 2020), four times as wide inside."""

    def __init__(self, features: int, *, mult: int = 4, zero_init: bool = False, **policy):
        self.proj_in = linear(features, 2 * mult * features, **policy)
        self.proj_out = linear(mult * features, features, zero_init=zero_init, **policy)

    def __call__(self, x: Float[ArrayLike, "B N D"]) -> Float[Array, "B N D"]:
        value, gate = jnp.split(self.proj_in(x), 2, axis=-1)
        return self.proj_out(value * gelu(gate))


class TransformerBlock(nnx.Module):
    """Pre-norm self-attention, cross-attention to the text, feed-forward, each with a residual.

    `only_cross_attention`: the first attends to the text, too; `text_alone`: there is no first.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        text_features: int,
        *,
        only_cross_attention: bool = False,
        text_alone: bool = False,
        **policy: Any,
    ):
        self.only_cross_attention, self.text_alone = only_cross_attention, text_alone
        if not text_alone:
            self.norm1 = nnx.LayerNorm(features, epsilon=1e-5, **policy)
            first = text_features if only_cross_attention else None
            self.attn1 = Attention(features, num_heads, context_features=first, **policy)
        self.norm2 = nnx.LayerNorm(features, epsilon=1e-5, **policy)
        self.attn2 = Attention(features, num_heads, context_features=text_features, **policy)
        self.norm3 = nnx.LayerNorm(features, epsilon=1e-5, **policy)
        self.ff = FeedForward(features, **policy)

    def __call__(
        self,
        x: Float[ArrayLike, "B N D"],
        text: Float[ArrayLike, "B L E"],
        mask: Bool[ArrayLike, "B L"] | None,
    ) -> Float[Array, "B N D"]:
        if not self.text_alone:
            first = (text, mask) if self.only_cross_attention else ()
            x = x + self.attn1(self.norm1(x), *first)
        x = x + self.attn2(self.norm2(x), text, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nnx.Module):
    """`depth` transformer blocks over the H W pixels as tokens, between two 1x1 projections, with a
    residual.

    diffusers' `use_linear_projection` only chooses how the projections' weights are stored (1x1
    convolution or linear): the function is the same. The last projection starts at zero. `remat`:
    as a ResnetBlock's.
    """

    remat = "none"

    def __init__(
        self,
        channels: int,
        num_heads: int,
        text_features: int,
        *,
        depth: int = 1,
        num_groups: int,
        only_cross_attention: bool = False,
        text_alone: bool = False,
        **policy: Any,
    ):
        block = dict(only_cross_attention=only_cross_attention, text_alone=text_alone, **policy)
        self.norm = GroupNorm(channels, num_groups, eps=1e-6, **policy)
        self.proj_in = linear(channels, channels, **policy)
        self.transformer_blocks = nnx.List(
            TransformerBlock(channels, num_heads, text_features, **block) for _ in range(depth)
        )
        self.proj_out = linear(channels, channels, zero_init=True, **policy)

    @rematerialised
    def __call__(
        self,
        x: Float[ArrayLike, "B H W C"],
        text: Float[ArrayLike, "B L E"],
        mask: Bool[ArrayLike, "B L"] | None,
    ) -> Float[Array, "B H W C"]:
        h = self.proj_in(rearrange(self.norm(x), "B H W C -> B (H W) C"))
        for block in self.transformer_blocks:
            h = block(h, text, mask)
        return x + rearrange(self.proj_out(h), "B (H W) C -> B H W C", H=x.shape[1])
