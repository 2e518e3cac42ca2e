"""The relational network r_phi: the cross-modal context of a picture and its text (ContextDiff,
section 3.1).

    r = g * raw / rms(raw),   g = max_gain * tanh(gamma),   gamma = 0 at the start                          (1)

An unbounded r could carry x0 through the shift and drive the loss to zero. In (1) its size is
bounded and is one number, the gain, which is logged; at gain 0 the model is plain diffusion.

The division makes r nonlinear in x0, whatever raw is: r(E[x0 | x_t]) isn't E[r | x_t]. Kind
`affine` divides by the largest size that raw can have for any x0 in [-1, 1], so that it is linear
in x0, and the plugged in estimate is the posterior mean; g then bounds the root mean square (of
latents, which go beyond [-1, 1], it can be more).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from contextdiff_jax.models.layers import TimestepEmbedding, linear, timestep_embedding
from contextdiff_jax.models.transformer import Attention, FeedForward

TOKENS = ("patches", "clip")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """Sizes of the relational network; `kind` is a name in `KINDS` or `none`.

    `tokens`: what of x0 queries the text, `patches` of x0 or, as in the paper, the patch tokens of
        a frozen `clip` image
    encoder in the folder `clip`; x0's grid of patches must then be as large as its.
    """

    kind: str = "cross_attention"
    max_gain: float = 1.0
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
        if self.tokens not in TOKENS:
            raise ValueError(f"context.tokens={self.tokens!r}: unknown; one of {', '.join(TOKENS)}")
        if self.tokens == "clip" and (not self.clip or self.kind in ("text", "none")):
            raise ValueError(
                "context.tokens='clip': needs context.clip, the folder of a CLIP image encoder, and a context.kind that reads x0"
            )
        if self.tokens == "clip" and self.kind == "affine":
            raise ValueError(
                "context.tokens='clip': isn't linear in x0, as context.kind='affine' is; patches, or another kind"
            )
        if self.kind != "none" and self.kind not in KINDS:
            raise ValueError(
                f"context.kind={self.kind!r}: unknown; one of {', '.join([*KINDS, 'none'])}"
            )
        if self.max_gain < 0:
            raise ValueError(f"context.max_gain={self.max_gain}: must not be negative")
        for field in ("patch_size", "width", "num_blocks", "num_heads"):
            if getattr(self, field) < 1:
                raise ValueError(f"context.{field}={getattr(self, field)}: must be at least 1")
        if self.width % 4 or self.width % self.num_heads:
            raise ValueError(
                f"context.width={self.width}: must be a multiple of 4 and of num_heads={self.num_heads}"
            )

    @property
    def token_width(self) -> int:
        """Of the visual tokens."""
        return self.visual_width if self.tokens == "clip" else self.patch_size**2 * self.in_channels


def position_embedding(height: int, width: int, features: int) -> Float[Array, "N D"]:
    """Fixed sine-cosine embedding of a grid's rows and columns (row-major), for grids of any size."""
    frequencies = 10000.0 ** (-np.arange(features // 4) / (features // 4))

    def encode(n):
        angles = np.arange(n)[:, None] * frequencies  # [n, D/4]
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    rows, columns = np.repeat(encode(height), width, axis=0), np.tile(encode(width), (height, 1))
    return jnp.asarray(np.concatenate([rows, columns], axis=-1), jnp.float32)


def patches(x: Float[Array, "B H W C"], p: int) -> Float[Array, "B N P"]:
    """Non-overlapping p x p patches, row-major; ValueError if p does not divide height and width."""
    B, H, W, C = x.shape
    if H % p or W % p:
        raise ValueError(
            f"context.patch_size={p}: must divide the picture's height and width, {H} x {W}"
        )
    return (
        x.reshape(B, H // p, p, W // p, p, C)
        .swapaxes(2, 3)
        .reshape(B, (H // p) * (W // p), p * p * C)
    )


def unpatch(
    tokens: Float[Array, "B N P"], p: int, shape: tuple[int, ...]
) -> Float[Array, "B H W C"]:
    """The inverse of `patches`; `shape` is that of the picture."""
    B, H, W, C = shape
    return tokens.reshape(B, H // p, W // p, p, p, C).swapaxes(2, 3).reshape(shape)


def pool(tokens: Float[Array, "B L D"], mask: Bool[Array, "B L"]) -> Float[Array, "B 1 D"]:
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


class CrossAttention(nnx.Module):
    """The paper's: patch tokens of x0 query the text tokens in N blocks."""

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

    def __init__(self, config: ContextConfig, **policy):
        super().__init__(config, **policy)
        self.embed = None

    def __call__(self, tokens, position, text, mask, temb):
        x = jnp.broadcast_to(position, (*tokens.shape[:2], position.shape[-1]))
        for block in self.blocks:
            x = block(x, text, mask, temb)
        return self.norm(x)


class Linear(nnx.Module):
    """A linear map of patch token, position, pooled text and time: the ablation without
    interaction. Divided by its size it is `linear`; by the largest that it can have, `affine`.
    """

    def __init__(self, config: ContextConfig, **policy):
        self.embed = linear(config.token_width, config.width, **policy)
        self.text = linear(config.text_width, config.width, **policy)

    def __call__(self, tokens, position, text, mask, temb):
        x = self.embed(tokens) + position + self.text(pool(text, mask))
        return x if temb is None else x + temb[:, None]


def count_sketch(x: Float[Array, "*B D"], width: int, seed: int) -> Float[Array, "*B W"]:
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
    x: Float[Array, "*B D"], y: Float[Array, "*B E"], width: int
) -> Float[Array, "*B W"]:
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


KINDS = {
    "cross_attention": CrossAttention,
    "linear": Linear,
    "affine": Linear,
    "bilinear": Bilinear,
    "text": TextOnly,
}


class RelationalNetwork(nnx.Module):
    """r_phi(x0, c[, t]), (1). Kind `none` has no parameters and returns 0."""

    def __init__(
        self,
        config: ContextConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        self.config = config
        if config.kind == "none":
            return
        policy = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.gamma = nnx.Param(jnp.zeros((), param_dtype))
        self.raw = KINDS[config.kind](config, **policy)
        self.unembed = linear(config.width, config.patch_size**2 * config.in_channels, **policy)
        self.time = (
            TimestepEmbedding(config.width, config.width, **policy)
            if config.time_dependent
            else None
        )

    @property
    def gain(self) -> Float[Array, ""]:
        """g, the context's root mean square; its bound if the kind is `affine`."""
        return (
            jnp.zeros(())
            if self.config.kind == "none"
            else self.config.max_gain * jnp.tanh(self.gamma[...])
        )

    def __call__(
        self,
        x0: Float[Array, "B H W C"],
        text_tokens: Float[Array, "B L D"],
        text_mask: Bool[Array, "B L"],
        t: Int[Array, B] | None = None,
        visual: Float[Array, "B N V"] | None = None,
        mix: Callable[[Float[Array, "B N D"]], Float[Array, "B N D"]] = lambda tokens: tokens,
    ) -> Float[Array, "B H W C"]:
        """r, float32. `t` is read only if `time_dependent`, `visual` (CLIP's tokens of x0) only if
        `tokens` is `clip`; `mix` lets the tokens of a clip's frames see each other. ValueError if
        patches or CLIP's tokens don't fit the picture.
        """
        config = self.config
        if config.kind == "none":
            return jnp.zeros(x0.shape, jnp.float32)
        p = config.patch_size
        tokens = patches(x0, p)  # [B, N, p*p*C]
        if config.tokens == "clip":
            found = None if visual is None else visual.shape[1]
            if found != tokens.shape[1]:
                raise ValueError(
                    f"context.patch_size={p}: gives {tokens.shape[1]} patches of x0; CLIP has {found} tokens"
                )
            tokens = visual
        position = position_embedding(x0.shape[1] // p, x0.shape[2] // p, config.width)
        temb = (
            self.time(timestep_embedding(t, config.width)) if self.time is not None else None
        )  # [B, D]
        conditions = (position, text_tokens, text_mask, temb)
        raw = unpatch(self.unembed(mix(self.raw(tokens, *conditions))), p, x0.shape).astype(
            jnp.float32
        )
        sized = (
            unpatch(self._largest(jnp.zeros_like(tokens), conditions), p, x0.shape)
            if config.kind == "affine"
            else raw
        )
        # eps inside the root: finite value and gradient at raw = 0.
        rms = jnp.sqrt(jnp.mean(sized**2, axis=(1, 2, 3), keepdims=True) + 1e-8)
        return self.gain * raw / rms

    def _largest(self, empty: Float[Array, "B N P"], conditions: tuple) -> Float[Array, "B N P"]:
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
