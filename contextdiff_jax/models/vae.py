"""The autoencoder of latent diffusion (Rombach et al., 2022), NHWC, in Flax NNX.

The topology, the config's field names and the function are those of diffusers' `AutoencoderKL`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from contextdiff_jax.models.config import known_fields
from contextdiff_jax.models.layers import (
    ACTIVATIONS,
    Downsample,
    GroupNorm,
    ResnetBlock,
    Upsample,
    conv3x3,
    linear,
)
from contextdiff_jax.models.precision import Precision
from contextdiff_jax.models.tiling import sliced, tiled
from contextdiff_jax.models.transformer import Attention
from contextdiff_jax.runtime.fields import check_choice, no_type_check

_OVERLAP = 0.25  # of neighbouring tiles, as in diffusers

# diffusers' options that we don't have: a config file may hold them at the value that switches them
# off.
_OFF: dict[str, tuple] = {"latents_mean": (None,), "latents_std": (None,)}


@no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """diffusers' `AutoencoderKL` config (names and defaults).

    `force_upcast` changes nothing here: `load_pipeline` chooses the products' type. `sample_size`
    is the side of a tile; as in diffusers, a quarter of it must be whole in pixels and in latent
    pixels, or tiled pictures come out larger. Raises ValueError, one line with field, value and
    what is allowed.
    """

    in_channels: int = 3  # of a picture
    out_channels: int = 3  # of a decoded picture
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)  # one a level
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)  # one a level
    block_out_channels: tuple[int, ...] = (64,)  # channels of each level, from the finest
    layers_per_block: int = 1  # residual blocks a level
    act_fn: str = "silu"  # activation
    latent_channels: int = 4  # of a latent
    norm_num_groups: int = 32  # of the group norms
    sample_size: int | tuple[int, int] = 32  # side of a tile, in pixels
    scaling_factor: float = 0.18215  # latents are multiplied by it for diffusion
    shift_factor: float | None = None  # is taken off before (Stable Diffusion 3)
    force_upcast: bool = True  # float16 pipelines decode in float32
    use_quant_conv: bool = True  # a 1x1 convolution after the encoder
    use_post_quant_conv: bool = True  # a 1x1 convolution before the decoder
    mid_block_add_attention: bool = True  # self-attention at the coarsest level

    def __post_init__(self):
        check_choice("vae.act_fn", self.act_fn, ACTIVATIONS)
        for field, only in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            value, levels = getattr(self, field), len(self.block_out_channels)
            if tuple(value) != (only,) * levels or not levels:
                raise ValueError(
                    f"vae.{field}={value}: must be {only!r} for each of the {levels} levels"
                )
        for channels in self.block_out_channels:
            if self.norm_num_groups < 1 or channels % self.norm_num_groups:
                raise ValueError(
                    f"vae.norm_num_groups={self.norm_num_groups}: must divide "
                    f"vae.block_out_channels={self.block_out_channels}"
                )
        if self.layers_per_block < 1:
            raise ValueError(f"vae.layers_per_block={self.layers_per_block}: must be at least 1")

    @property
    def downscale(self) -> int:
        """Pixels a latent pixel along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VAEConfig:
        """A config from a diffusers config.json. Keys with a leading underscore are metadata.

        Raises ValueError for an unknown key (with the nearest names) and for an option that we
        lack.
        """
        return cls(**known_fields(cls, "vae", values, _OFF))

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`."""
        return dataclasses.asdict(self)


class LatentGaussian(NamedTuple):
    """q(z | image): a diagonal Gaussian [B, H/f, W/f, Z]; `logvar` lies in [-30, 20]."""

    mean: Float[ArrayLike, "B H W Z"]
    logvar: Float[ArrayLike, "B H W Z"]

    def sample(self, key: PRNGKeyArray) -> Float[Array, "B H W Z"]:
        """One draw."""
        return self.mean + jnp.exp(0.5 * self.logvar) * jax.random.normal(
            key, self.mean.shape, self.mean.dtype
        )


class _Parts:
    """The parts of encoder and decoder, for one config and precision."""

    def __init__(self, config: VAEConfig, policy: dict):
        self.config, self.policy = config, policy

    def norm(self, channels: int) -> GroupNorm:
        return GroupNorm(channels, self.config.norm_num_groups, eps=1e-6, **self.policy)

    def resnets(self, widths: list[int]) -> nnx.List:
        options = dict(
            num_groups=self.config.norm_num_groups,
            eps=1e-6,
            act_fn=self.config.act_fn,
            **self.policy,
        )
        return nnx.List(ResnetBlock(a, b, None, **options) for a, b in itertools.pairwise(widths))


class PixelAttention(nnx.Module):
    """Self-attention with one head over the H W pixels, after a norm, with a residual."""

    def __init__(self, parts: _Parts, channels: int):
        self.group_norm = parts.norm(channels)
        self.attention = Attention(channels, 1, qkv_bias=True, **parts.policy)

    def __call__(self, x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B H W C"]:
        h = self.attention(rearrange(self.group_norm(x), "B H W C -> B (H W) C"))
        return x + rearrange(h, "B (H W) C -> B H W C", H=x.shape[1])


class Level(nnx.Module):
    """Resnets, attention after the first if any (the middle), then a resampling if any."""

    def __init__(
        self,
        parts: _Parts,
        widths: list[int],
        *,
        attention: bool = False,
        resample: type | None = None,
        **options,
    ):
        self.resnets = parts.resnets(widths)
        self.attentions = nnx.List(PixelAttention(parts, widths[-1]) for _ in range(attention))
        sampler = [] if resample is None else [resample(widths[-1], **options, **parts.policy)]
        self.downsamplers = nnx.List(sampler if resample is Downsample else [])
        self.upsamplers = nnx.List(sampler if resample is Upsample else [])

    def __call__(self, x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B H2 W2 D"]:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x)
            if i < len(self.attentions):
                x = self.attentions[i](x)
        for resample in (*self.downsamplers, *self.upsamplers):
            x = resample(x)
        return x


class Coder(nnx.Module):
    """Convolution, levels, norm, activation, convolution: the encoder (`down_blocks`) or decoder
    (`up_blocks`).
    """

    def __init__(self, parts: _Parts, in_channels: int, out_channels: int, *, decoder: bool):
        config = parts.config
        widths = config.block_out_channels[::-1] if decoder else config.block_out_channels
        layers = config.layers_per_block + decoder
        options = dict(resample=Upsample) if decoder else dict(resample=Downsample, pad_end=True)
        levels = [
            Level(parts, [before] + [width] * layers, **(options if i < len(widths) - 1 else {}))
            for i, (before, width) in enumerate(itertools.pairwise((widths[0], *widths)))
        ]
        middle = config.block_out_channels[-1]
        self.decoder = decoder
        self.conv_in = conv3x3(in_channels, widths[0], **parts.policy)
        self.down_blocks = nnx.List([] if decoder else levels)
        self.mid_block = Level(parts, [middle] * 3, attention=config.mid_block_add_attention)
        self.up_blocks = nnx.List(levels if decoder else [])
        self.conv_norm_out = parts.norm(widths[-1])
        self.conv_out = conv3x3(widths[-1], out_channels, **parts.policy)

    def __call__(self, x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B H2 W2 D"]:
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            x = block(x)
        # silu whatever act_fn is, as in diffusers
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class VAE(nnx.Module):
    """Pictures in [-1, 1] <-> latents.

    Args:
      config: topology and widths.
      precision: of the parameters, the products and what is returned.
    """

    def __init__(
        self,
        config: VAEConfig,
        *,
        rngs: nnx.Rngs,
        precision: Precision = Precision(),
    ):
        policy = precision.policy(rngs)
        parts = _Parts(config, policy)
        z = config.latent_channels
        self.config, self.precision = config, precision
        self.encoder = Coder(parts, config.in_channels, 2 * z, decoder=False)
        self.decoder = Coder(parts, z, config.out_channels, decoder=True)
        self.quant_conv = linear(2 * z, 2 * z, **policy) if config.use_quant_conv else None
        self.post_quant_conv = linear(z, z, **policy) if config.use_post_quant_conv else None

    def encode(
        self, images: Float[ArrayLike, "B H W C"], *, tile: bool = False, slices: bool = False
    ) -> LatentGaussian:
        """q(z | images), float32. `tile`: pictures larger than the config's `sample_size` in
        blended tiles of that size (diffusers' `enable_tiling`); `slices`: one picture after
        another.
        """
        side, latent_side = self._tile_sides()
        fn = functools.partial(
            tiled, self._encode, tile_in=side, tile_out=latent_side, overlap=_OVERLAP
        )
        fn = fn if tile else self._encode
        moments = (sliced(fn, images) if slices else fn(images)).astype(self.precision.output)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return LatentGaussian(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(
        self, z: Float[ArrayLike, "B H W Z"], *, tile: bool = False, slices: bool = False
    ) -> Float[Array, "B H2 W2 O"]:
        """Pictures of z, float32, not clipped; `tile` and `slices` as in `encode`."""
        side, latent_side = self._tile_sides()
        fn = functools.partial(
            tiled, self._decode, tile_in=latent_side, tile_out=side, overlap=_OVERLAP
        )
        fn = fn if tile else self._decode
        return (sliced(fn, z) if slices else fn(z)).astype(self.precision.output)

    def to_diffusion(self, z: Float[ArrayLike, "*S"]) -> Float[ArrayLike, "*S"]:
        """z as the diffusion model sees it: about unit variance, by the config's shift and scaling
        factors.
        """
        return (z - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def from_diffusion(self, latents: Float[ArrayLike, "*S"]) -> Float[ArrayLike, "*S"]:
        """The inverse of `to_diffusion`."""
        return latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)

    def _encode(self, images: ArrayLike) -> Array:
        moments = self.encoder(images)  # [B, H/f, W/f, 2 Z]
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def _decode(self, z: ArrayLike) -> Array:
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def _tile_sides(self) -> tuple[int, int]:
        size = self.config.sample_size
        size = size[0] if isinstance(size, tuple) else size
        return size, int(size / self.config.downscale)
