"""The embedded text encoder: a small bidirectional transformer, trained from scratch with the
rest.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from contextdiff_jax.models.attention import HIDDEN
from contextdiff_jax.models.precision import Precision
from contextdiff_jax.models.transformer import Attention, FeedForward


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Sizes of the text encoder; with `pretrained`, the folder of a frozen CLIP text or T5 encoder
    or of a pipeline with several, that is read instead.
    """

    pretrained: str = ""  # folder of a frozen encoder; empty: the small one below is trained
    vocab_size: int = 4096  # rows of the token table
    max_length: int = 32  # longest caption, in tokens
    width: int = 128  # of the token states
    num_layers: int = 2  # transformer blocks
    num_heads: int = 4  # heads of their attention
    directed: bool = False  # half of the heads read what precedes a word, half what follows
    t5_length: int = 256  # of a text in a Stable Diffusion 3 pipeline, the tokens that T5 reads

    def __post_init__(self):
        sizes = ("vocab_size", "max_length", "width", "num_layers", "num_heads", "t5_length")
        for field in sizes:
            if getattr(self, field) < 1:
                raise ValueError(f"text.{field}={getattr(self, field)}: must be at least 1")
        if self.width % self.num_heads:
            raise ValueError(
                f"text.width={self.width}: must be a multiple of num_heads={self.num_heads}"
            )
        if self.directed and self.num_heads % 2:
            raise ValueError(
                f"text.num_heads={self.num_heads}: must be even with text.directed, whose heads "
                "read half in one direction, half in the other"
            )


def directions(num_heads: int, length: int) -> Float[Array, "H L L"]:
    """The bias of attention whose heads read in one direction each: the first half a word and what
    precedes it, the other half what follows. A word d places away loses slope * d, with slopes of
    1, 1/4, 1/16, ... in each half (Press et al. 2022, arXiv 2108.12409).

    So what a word may learn from its order ("circle" *before* "left of") is there from the first
    step; by positions alone no gradient points to it (Shen et al. 2018, arXiv 1709.04696).
    """
    half = num_heads // 2
    place = jnp.arange(length)
    distance = place[:, None] - place  # to what precedes a word: 0 and more
    slopes = 0.25 ** jnp.arange(half, dtype=jnp.float32)[:, None, None]
    before = jnp.where(distance >= 0, -slopes * distance, HIDDEN)
    return jnp.concatenate([before, jnp.swapaxes(before, 1, 2)])


class TextBlock(nnx.Module):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, config: TextConfig, **policy):
        self.norm1, self.norm2 = (nnx.LayerNorm(config.width, **policy) for _ in range(2))
        self.attention = Attention(
            config.width, config.num_heads, zero_init=not config.directed, **policy
        )
        self.ff = FeedForward(config.width, zero_init=True, **policy)

    def __call__(
        self,
        x: Float[ArrayLike, "B L D"],
        mask: Bool[ArrayLike, "B L"],
        bias: Float[ArrayLike, "H L L"] | None = None,
    ) -> Float[Array, "B L D"]:
        x = x + self.attention(self.norm1(x), mask=mask, bias=bias)
        return x + self.ff(self.norm2(x))


class TextEncoder(nnx.Module):
    """Token ids to token states; padding has no influence on the tokens that count."""

    reads_padding, zeros_for_empty = False, False

    def __init__(
        self,
        config: TextConfig,
        *,
        rngs: nnx.Rngs,
        precision: Precision = Precision(),
    ):
        policy = precision.policy(rngs)
        self.config = config
        # With blocks that start as nothing and embeddings of unit size the encoder starts as a
        # lookup of its words. With 0.02 and random blocks, trained runs mapped "top left" and
        # "bottom right" to nearly one state.
        normal = jax.nn.initializers.normal(1.0)
        self.tokens = nnx.Embed(config.vocab_size, config.width, embedding_init=normal, **policy)
        self.positions = nnx.Param(
            0.1 * normal(rngs.params(), (config.max_length, config.width), precision.params)
        )
        self.blocks = nnx.List([TextBlock(config, **policy) for _ in range(config.num_layers)])
        self.norm = nnx.LayerNorm(config.width, **policy)

    def __call__(
        self, token_ids: Int[ArrayLike, "B L"], token_mask: Bool[ArrayLike, "B L"]
    ) -> Float[Array, "B L D"]:
        """States of the tokens; those of padding are meaningless and masked by every reader."""
        length = token_ids.shape[1]
        x = self.tokens(token_ids)
        x = x + self.positions[:length].astype(x.dtype)
        bias = directions(self.config.num_heads, length) if self.config.directed else None
        for block in self.blocks:
            x = block(x, token_mask, bias)
        return self.norm(x)
