"""The kinds of context: from visual tokens of x0 and a text to raw tokens of r.

A new kind is a subclass of `Kind` and a line in `KINDS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from contextdiff_jax.models.captions import pool
from contextdiff_jax.models.joint import JointBlock
from contextdiff_jax.models.layers import linear
from contextdiff_jax.models.transformer import Attention, FeedForward

if TYPE_CHECKING:
    from contextdiff_jax.models.context import ContextConfig


class Block(nnx.Module):
    """Visual tokens attend to the text, then an MLP; time, if any, enters by adaptive layer norm
    (DiT).
    """

    def __init__(self, config: ContextConfig, **policy):
        width = config.width
        self.norm1, self.norm2 = (nnx.LayerNorm(width, **policy) for _ in range(2))
        self.attention = Attention(
            width, config.num_heads, context_features=config.text_width, **policy
        )
        self.ff = FeedForward(width, **policy)
        self.modulation = (
            linear(width, 4 * width, zero_init=True, **policy) if config.time_dependent else None
        )

    def __call__(self, x, text, mask, temb):
        modulation = (0.0,) * 4
        if self.modulation is not None:
            modulation = jnp.split(
                self.modulation(jax.nn.silu(temb))[:, None], 4, axis=-1
            )  # 4 x [B, 1, D]
        shift1, scale1, shift2, scale2 = modulation
        x = x + self.attention(self.norm1(x) * (1 + scale1) + shift1, text, mask)
        return x + self.ff(self.norm2(x) * (1 + scale2) + shift2)


class Kind(nnx.Module):
    """A kind of context: from visual tokens and text to raw tokens, and what the rest may rely on.

    A new kind is a subclass, `Kind(config, **policy)` and a call with these arguments, and a line
    in `KINDS`:

      tokens: of x0; position: their embedding; text, mask: of the caption; temb: of the time, if
          the context is `time_dependent`.

    Attributes:
      reads_x0: whether r depends on x0; if not, it is known before x0 is.
      reads_noise: whether r depends on the noise of x_t: it shapes the noise itself.
      reads_low: whether the tokens are an upsampler's low-resolution picture, enlarged, not x0.
      moves: whether r depends on t, beside what `time_dependent` adds.
      parts: how many outputs r is made of, by `combine`.
      linear_in_x0: whether r is linear in x0. The only map of the tokens must then be `embed`, from
          which the size that (1) divides by is read.
      is_zero: whether r is 0: plain diffusion, without parameters.
    """

    reads_x0 = True
    reads_noise = False
    reads_low = False
    moves = False
    parts = 1
    linear_in_x0 = False
    is_zero = False

    @staticmethod
    def combine(
        parts: tuple[Float[Array, "B H W C"], ...],
        share: Float[Array, "B"] | None,
        noise: Float[ArrayLike, "B H W C"] | None,
    ) -> Float[Array, "B H W C"]:
        """r of its parts, of the share of the path that lies before t, and of the noise of x_t."""
        return parts[0]

    def __call__(
        self,
        tokens: Float[ArrayLike, "B N P"],
        position: Float[ArrayLike, "N D"],
        text: Float[ArrayLike, "B L E"],
        mask: Bool[ArrayLike, "B L"],
        temb: Float[ArrayLike, "B D"] | None,
    ) -> Float[Array, "B N D"]:
        raise NotImplementedError


class NoContext(Kind):
    """Plain diffusion: r = 0. It is never built."""

    reads_x0 = False
    is_zero = True


class CrossAttention(Kind):
    """The paper's kind: patch tokens of x0 query the text tokens in N blocks."""

    def __init__(self, config: ContextConfig, **policy):
        self.embed = linear(config.token_width, config.width, **policy)
        self.blocks = nnx.List([Block(config, **policy) for _ in range(config.num_blocks)])
        self.norm = nnx.LayerNorm(config.width, **policy)

    def __call__(self, tokens, position, text, mask, temb):
        x = self.embed(tokens) + position
        for block in self.blocks:
            x = block(x, text, mask, temb)
        return self.norm(x)


class JointAttention(Kind):
    """Patch tokens of x0 and the text's tokens are two streams that see each other, as in the
    multimodal transformer (models.mmdit).
    """

    def __init__(self, config: ContextConfig, **policy):
        self.embed = linear(config.token_width, config.width, **policy)
        self.text = linear(config.text_width, config.width, **policy)
        last = config.num_blocks - 1
        self.blocks = nnx.List(
            JointBlock(
                config.width,
                config.num_heads,
                qk_norm=True,
                last=i == last,
                open_gates=True,
                **policy,
            )
            for i in range(config.num_blocks)
        )
        self.norm = nnx.LayerNorm(config.width, **policy)

    def __call__(self, tokens, position, text, mask, temb):
        x, text = self.embed(tokens) + position, self.text(text)
        time = jnp.zeros_like(x[:, 0]) if temb is None else jax.nn.silu(temb)
        for block in self.blocks:
            x, text = block(x, text, time, mask)
        return self.norm(x)


class TextOnly(CrossAttention):
    """r(c): positions query the text, x0 is never read (ShiftDDPM)."""

    reads_x0 = False

    def __init__(self, config: ContextConfig, **policy):
        super().__init__(config, **policy)
        self.embed = None

    def __call__(self, tokens, position, text, mask, temb):
        x = jnp.broadcast_to(position, (*tokens.shape[:2], position.shape[-1]))
        for block in self.blocks:
            x = block(x, text, mask, temb)
        return self.norm(x)


class LowResolutionContext(CrossAttention):
    """r(y, c) of an upsampler: patches of the low-resolution picture y query the text. Both are
    known before x0 is, so the reverse process has r itself and no estimate. Without an embedding of
    places: pieces are trained on, and larger pictures are made.
    """

    reads_x0 = False
    reads_low = True

    def __call__(self, tokens, position, text, mask, temb):
        return super().__call__(tokens, jnp.zeros_like(position), text, mask, temb)


class TwoEnds(TextOnly):
    """A shift of the data and one of the noise, each of the text alone; between them r goes in a
    straight line: CAR-Flow (Chen et al. 2025) on the path `flow` with the shift `constant`.
    """

    moves = True
    parts = 2

    @staticmethod
    def combine(parts, share, noise):
        of_data, of_noise = parts
        return of_data + share[:, None, None, None] * (of_noise - of_data)


class GaussianSource(TextOnly):
    """r = mu + (sigma - 1) noise: with the shift `prior` the path begins at N(mu, sigma^2) of the
    text (CSFM, Kim et al. 2026). log sigma is bounded as mu is, by the gain.
    """

    reads_noise = True
    parts = 2

    @staticmethod
    def combine(parts, share, noise):
        mean, log_sigma = parts
        return mean + jnp.expm1(log_sigma) * noise


class Linear(Kind):
    """A linear map of patch token, position, pooled text and time, divided by its size: the
    ablation without interaction.
    """

    def __init__(self, config: ContextConfig, **policy):
        self.embed = linear(config.token_width, config.width, **policy)
        self.text = linear(config.text_width, config.width, **policy)

    def __call__(self, tokens, position, text, mask, temb):
        x = self.embed(tokens) + position + self.text(pool(text, mask))
        return x if temb is None else x + temb[:, None]


class Affine(Linear):
    """`Linear`'s map divided by the largest size that it can have, so that r is linear in x0."""

    linear_in_x0 = True


def count_sketch(x: Float[ArrayLike, "*B D"], width: int, seed: int) -> Float[Array, "*B W"]:
    """Random signed sums of x's entries into `width` bins; E<cs(x), cs(y)> = <x, y> (Charikar et
    al. 2002).
    """
    rng = np.random.default_rng(seed)
    projection = np.zeros((x.shape[-1], width), np.float32)
    projection[np.arange(x.shape[-1]), rng.integers(width, size=x.shape[-1])] = rng.choice(
        [-1, 1], x.shape[-1]
    )
    return x @ jnp.asarray(projection, x.dtype)


def compact_bilinear(
    x: Float[ArrayLike, "*#B D"], y: Float[ArrayLike, "*#B E"], width: int
) -> Float[Array, "*#B W"]:
    """The count sketch of the outer product of x and y: circular convolution of theirs (Gao et al.
    2016).
    """
    fx, fy = (
        jnp.fft.rfft(count_sketch(z.astype(jnp.float32), width, i)) for i, z in enumerate((x, y))
    )
    return jnp.fft.irfft(fx * fy, width)


class Bilinear(Linear):
    """Compact bilinear pooling of patch token and pooled text, then a linear map."""

    def __init__(self, config: ContextConfig, **policy):
        super().__init__(config, **policy)
        self.out = linear(config.width, config.width, **policy)

    def __call__(self, tokens, position, text, mask, temb):
        x = self.embed(tokens) + position
        x = self.out(compact_bilinear(x, self.text(pool(text, mask)), x.shape[-1]).astype(x.dtype))
        return x if temb is None else x + temb[:, None]


KINDS: dict[str, type[Kind]] = {
    "cross_attention": CrossAttention,
    "joint": JointAttention,
    "linear": Linear,
    "affine": Affine,
    "bilinear": Bilinear,
    "text": TextOnly,
    "low_resolution": LowResolutionContext,
    "two_ends": TwoEnds,
    "gaussian_source": GaussianSource,
    "none": NoContext,
}
