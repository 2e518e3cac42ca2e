"""The relational network r_phi: the cross-modal context of a picture and its text (ContextDiff,
section 3.1).

    r = g * raw / rms(raw),   g = max_gain * tanh(gamma),   gamma = 0 at the start          (1)

An unbounded r could carry x0 through the shift and drive the loss to zero. In (1) its size is
bounded and is one number, the gain, which is logged; at gain 0 the model is plain diffusion.

The division makes r nonlinear in x0, whatever raw is: r(E[x0 | x_t]) isn't E[r | x_t]. A kind that
is `linear_in_x0` divides by the largest size that raw can have for any x0 in [-1, 1], so that r is
linear in x0, and the plugged in estimate is the posterior mean; g then bounds the root mean square
(of latents, which go beyond [-1, 1], it can be more).
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Real

from contextdiff_jax.models.layers import TimestepEmbedding, linear, timestep_embedding
from contextdiff_jax.models.precision import Precision
from contextdiff_jax.models.transformer import Attention, FeedForward
from contextdiff_jax.runtime.fields import check_choice

TOKENS = ("patches", "clip")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """Sizes of the relational network; `kind` is a name in `KINDS`.

    `tokens`: what of x0 queries the text, `patches` of x0 or, as in the paper, the patch tokens of
    a frozen `clip` image encoder in the folder `clip`; x0's grid of patches must then be as large
    as its.
    """

    kind: str = "cross_attention"
    max_gain: float = 0.2
    time_dependent: bool = False
    patch_size: int = 4
    width: int = 64
    num_blocks: int = 2
    num_heads: int = 4
    text_width: int = 128
    in_channels: int = 3
    tokens: str = "patches"
    clip: str = ""
    visual_width: int = 0  # of CLIP's tokens

    def __post_init__(self):
        check_choice("context.kind", self.kind, KINDS)
        check_choice("context.tokens", self.tokens, TOKENS)
        if self.tokens == "clip" and not (self.clip and self.network.reads_x0):
            raise ValueError(
                "context.tokens='clip': needs context.clip, the folder of a CLIP image encoder, "
                "and a context.kind that reads x0"
            )
        if self.tokens == "clip" and self.network.linear_in_x0:
            raise ValueError(
                f"context.tokens='clip': isn't linear in x0, as context.kind={self.kind!r} is; "
                "patches, or another kind"
            )
        if self.max_gain < 0:
            raise ValueError(f"context.max_gain={self.max_gain}: must not be negative")
        for field in ("patch_size", "width", "num_blocks", "num_heads"):
            if getattr(self, field) < 1:
                raise ValueError(f"context.{field}={getattr(self, field)}: must be at least 1")
        if self.width % 4 or self.width % self.num_heads:
            raise ValueError(
                f"context.width={self.width}: must be a multiple of 4 and of "
                f"num_heads={self.num_heads}"
            )

    @property
    def network(self) -> type[Kind]:
        """The class of its kind, which says what the context is (`reads_x0`, ...)."""
        return KINDS[self.kind]

    @property
    def token_width(self) -> int:
        """Width of the visual tokens."""
        return self.visual_width if self.tokens == "clip" else self.patch_size**2 * self.in_channels


def position_embedding(height: int, width: int, features: int) -> Float[Array, "N D"]:
    """Sine-cosine embedding of a grid's rows and columns (row-major), for grids of any size."""
    frequencies = 10000.0 ** (-np.arange(features // 4) / (features // 4))

    def encode(n):
        angles = np.arange(n)[:, None] * frequencies  # [n, D/4]
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    rows, columns = np.repeat(encode(height), width, axis=0), np.tile(encode(width), (height, 1))
    return jnp.asarray(np.concatenate([rows, columns], axis=-1), jnp.float32)


def patches(x: Float[ArrayLike, "B H W C"], p: int) -> Float[ArrayLike, "B N P"]:
    """Non-overlapping p x p patches, row-major; ValueError if p doesn't divide height and width."""
    H, W = x.shape[1:3]
    if H % p or W % p:
        raise ValueError(
            f"context.patch_size={p}: must divide the picture's height and width, {H} x {W}"
        )
    return rearrange(x, "B (h p) (w q) C -> B (h w) (p q C)", p=p, q=p)


def unpatch(
    tokens: Float[ArrayLike, "B N P"], p: int, shape: tuple[int, ...]
) -> Float[Array, "B H W C"]:
    """The inverse of `patches`; `shape` is that of the picture."""
    return rearrange(tokens, "B (h w) (p q C) -> B (h p) (w q) C", h=shape[1] // p, p=p, q=p)


def pool(tokens: Float[ArrayLike, "B L D"], mask: Bool[ArrayLike, "B L"]) -> Float[Array, "B 1 D"]:
    """Mean over the tokens that count."""
    weight = mask[..., None].astype(tokens.dtype)
    return (tokens * weight).sum(1, keepdims=True) / jnp.maximum(weight.sum(1, keepdims=True), 1)


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
      linear_in_x0: whether r is linear in x0. The only map of the tokens must then be `embed`, from
          which the size that (1) divides by is read.
      is_zero: whether r is 0: plain diffusion, without parameters.
    """

    reads_x0 = True
    linear_in_x0 = False
    is_zero = False

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
    "linear": Linear,
    "affine": Affine,
    "bilinear": Bilinear,
    "text": TextOnly,
    "none": NoContext,
}


@runtime_checkable
class MixFn(Protocol):
    """`mix(tokens)` lets tokens of several pictures see each other."""

    def __call__(self, tokens: Float[ArrayLike, "B N D"]) -> Float[Array, "B N D"]: ...


class RelationalNetwork(nnx.Module):
    """r_phi(x0, c[, t]), (1). A kind that `is_zero` has no parameters and returns 0."""

    def __init__(
        self,
        config: ContextConfig,
        *,
        rngs: nnx.Rngs,
        precision: Precision = Precision(),
    ):
        self.config = config
        if config.network.is_zero:
            return
        policy = precision.policy(rngs)
        self.gamma = nnx.Param(jnp.zeros((), precision.params))
        self.raw = config.network(config, **policy)
        self.unembed = linear(config.width, config.patch_size**2 * config.in_channels, **policy)
        self.time = (
            TimestepEmbedding(config.width, config.width, **policy)
            if config.time_dependent
            else None
        )

    @property
    def gain(self) -> Float[Array, ""]:
        """g, the context's root mean square; its bound if the kind is `linear_in_x0`."""
        if self.config.network.is_zero:
            return jnp.zeros(())
        return self.config.max_gain * jnp.tanh(self.gamma[...])

    def __call__(
        self,
        x0: Float[ArrayLike, "B H W C"],
        text_tokens: Float[ArrayLike, "B L D"],
        text_mask: Bool[ArrayLike, "B L"],
        t: Real[ArrayLike, "B"] | None = None,
        visual: Float[ArrayLike, "B N V"] | None = None,
        mix: MixFn = lambda tokens: tokens,
    ) -> Float[Array, "B H W C"]:
        """r, float32. `t` is read only if `time_dependent`, `visual` (CLIP's tokens of x0) only if
        `tokens` is `clip`; `mix` lets the tokens of a clip's frames see each other. ValueError if
        patches or CLIP's tokens don't fit the picture.
        """
        config = self.config
        if config.network.is_zero:
            return jnp.zeros(x0.shape, jnp.float32)
        p = config.patch_size
        tokens = patches(x0, p)  # [B, N, p*p*C]
        if config.tokens == "clip":
            found = None if visual is None else visual.shape[1]
            if found != tokens.shape[1]:
                raise ValueError(
                    f"context.patch_size={p}: gives {tokens.shape[1]} patches of x0; "
                    f"CLIP has {found} tokens"
                )
            tokens = visual
        position = position_embedding(x0.shape[1] // p, x0.shape[2] // p, config.width)
        temb = None
        if self.time is not None:
            temb = self.time(timestep_embedding(t, config.width))  # [B, D]
        conditions = (position, text_tokens, text_mask, temb)
        raw = self.unembed(mix(self.raw(tokens, *conditions)))  # [B, N, p*p*C]
        sized = raw = unpatch(raw, p, x0.shape).astype(jnp.float32)
        if config.network.linear_in_x0:
            sized = unpatch(self._largest(jnp.zeros_like(tokens), conditions), p, x0.shape)
        # eps inside the root: finite value and gradient at raw = 0.
        rms = jnp.sqrt(jnp.mean(sized**2, axis=(1, 2, 3), keepdims=True) + 1e-8)
        return self.gain * raw / rms

    def _largest(
        self, empty: Float[ArrayLike, "B N P"], conditions: tuple
    ) -> Float[Array, "B N P"]:
        """The largest that the absolute values of affine tokens can be, x0 anywhere in [-1, 1]:
        |constant| + sum_i |M_ij|. M is read off the layers, which know how they are sharded and
        cast.
        """
        constant = self.unembed(self.raw(empty, *conditions)).astype(jnp.float32)
        units = jnp.eye(empty.shape[-1], dtype=empty.dtype)
        with_units, without = (
            self.unembed(self.raw.embed(x)).astype(jnp.float32)
            for x in (units, jnp.zeros_like(units))
        )
        return jnp.abs(constant) + jnp.abs(with_units - without).sum(0)
