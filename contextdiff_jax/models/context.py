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
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Real

from contextdiff_jax.models.context_kinds import KINDS, Kind
from contextdiff_jax.models.layers import TimestepEmbedding, linear, timestep_embedding
from contextdiff_jax.models.patches import patches, unpatch
from contextdiff_jax.models.precision import Precision
from contextdiff_jax.runtime.fields import check_choice

TOKENS = ("patches", "clip")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """Sizes of the relational network; `kind` is a name in `KINDS`.

    `tokens`: what of x0 queries the text, `patches` of x0 or, as in the paper, the patch tokens of
    a frozen `clip` image encoder in the folder `clip`; x0's grid of patches must then be as large
    as its, or `fit_tokens` resizes its.
    """

    kind: str = "cross_attention"  # the relational network, by name
    max_gain: float = 0.2  # largest size of r; the learned gain lies within
    time_dependent: bool = False  # r reads t
    patch_size: int = 4  # side of a patch of x0, in values of x0
    width: int = 64  # of its tokens
    num_blocks: int = 2  # blocks of kind=cross_attention and joint
    num_heads: int = 4  # heads of their attention
    text_width: int = 128  # of the text's tokens
    in_channels: int = 3  # of x0
    tokens: str = "patches"  # what of x0 queries the text: its patches, or a CLIP encoder's tokens
    clip: str = ""  # folder of that encoder, for tokens=clip
    fit_tokens: bool = False  # resizes its grid of tokens (bilinear) to that of x0's patches
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
    def is_known(self) -> bool:
        """Whether r is known before x0 is: a function of the text, of an upsampler's low-resolution
        picture, and of t.
        """
        return not (self.network.reads_x0 or self.network.reads_noise)

    @property
    def moves(self) -> bool:
        """Whether r depends on t."""
        return self.time_dependent or self.network.moves

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


def fitted(tokens: Float[ArrayLike, "B N V"], grid: tuple[int, int]) -> Float[Array, "B K V"]:
    """The tokens of a square grid, bilinear on another grid of rows and columns."""
    B, N, V = tokens.shape
    side = math.isqrt(N)
    square = tokens.reshape(B, side, N // side, V)
    return jax.image.resize(square, (B, *grid, V), "bilinear").reshape(B, -1, V)


@runtime_checkable
class MixFn(Protocol):
    """`mix(tokens)` lets tokens of several pictures see each other."""

    def __call__(self, tokens: Float[ArrayLike, "B N D"]) -> Float[Array, "B N D"]: ...


def _rms(x: Float[Array, "B H W C"]) -> Float[Array, "B 1 1 1"]:
    # eps inside the root: finite value and gradient at x = 0.
    return jnp.sqrt(jnp.mean(x**2, axis=(1, 2, 3), keepdims=True) + 1e-8)


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
        parts = config.network.parts
        self.gamma = nnx.Param(jnp.zeros((parts,) if parts > 1 else (), precision.params))
        self.raw = config.network(config, **policy)
        patch = config.patch_size**2 * config.in_channels
        self.unembed = linear(config.width, parts * patch, **policy)
        self.time = (
            TimestepEmbedding(config.width, config.width, **policy)
            if config.time_dependent
            else None
        )

    @property
    def gain(self) -> Float[Array, "*parts"]:
        """g, the context's root mean square, of each of its parts if they are several; its bound if
        the kind is `linear_in_x0`.
        """
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
        noise: Float[ArrayLike, "B H W C"] | None = None,
        low: Float[ArrayLike, "B H W C"] | None = None,
    ) -> Float[Array, "B H W C"]:
        """r, float32. `t`, 0..1000 as networks read it, matters only if r `moves`, `visual` (CLIP's
        tokens of x0) only if `tokens` is `clip`, `noise` only if the kind `reads_noise`, `low` (a
        low-resolution picture, enlarged) only if it `reads_low`; `mix` lets the tokens of a clip's
        frames see each other. ValueError if patches or CLIP's tokens don't fit the picture.
        """
        config = self.config
        if config.network.is_zero:
            return jnp.zeros(x0.shape, jnp.float32)
        p = config.patch_size
        seen = low if config.network.reads_low else x0
        tokens = patches(seen, p, "context.patch_size")  # [B, N, p*p*C]
        if config.tokens == "clip":
            grid = x0.shape[1] // p, x0.shape[2] // p
            if config.fit_tokens and visual is not None:
                visual = fitted(visual, grid)
            found = None if visual is None else visual.shape[1]
            if found != tokens.shape[1]:
                raise ValueError(
                    f"context.patch_size={p}: gives {tokens.shape[1]} patches of x0; "
                    f"CLIP has {found} tokens; context.fit_tokens=True resizes their grid"
                )
            tokens = visual
        position = position_embedding(x0.shape[1] // p, x0.shape[2] // p, config.width)
        temb = None
        if self.time is not None:
            temb = self.time(timestep_embedding(t, config.width))  # [B, D]
        conditions = (position, text_tokens, text_mask, temb)
        raw = self.unembed(mix(self.raw(tokens, *conditions)))  # [B, N, parts*p*p*C]
        kind = config.network
        if kind.linear_in_x0:
            sized = unpatch(self._largest(jnp.zeros_like(tokens), conditions), p, x0.shape)
            raw = unpatch(raw, p, x0.shape).astype(jnp.float32)
            return self.gain * raw / _rms(sized)
        parts = [
            unpatch(part, p, x0.shape).astype(jnp.float32)
            for part in jnp.split(raw, kind.parts, -1)
        ]
        gains = jnp.atleast_1d(self.gain)
        sized = tuple(g * part / _rms(part) for g, part in zip(gains, parts, strict=True))
        return kind.combine(sized, None if t is None else jnp.asarray(t) / 1000, noise)

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
