"""The text-conditioned UNet of Stable Diffusion 1.x, 2.x and XL (Rombach et al., 2022), NHWC, in
Flax NNX.

The topology, the config's field names and the attribute names are those of diffusers'
`UNet2DConditionModel`, so that its weights load one to one (`contextdiff_jax.pretrained.unet`) and
the torch model is the same function. Every size, from two million parameters for a CPU to Stable
Diffusion's, is a `UNetConfig` of this one class.

Ours: an optional context head, which predicts E[r(x0, c) | x_t, c] from the last features;
`patch_size`: the network works on patches of the picture (`models/patches.py`); and
`low_resolution`: it reads a low-resolution picture after x's channels, and its noise's level.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Shaped

from contextdiff_jax.models.captions import Captions, text_and_size
from contextdiff_jax.models.layers import (
    ACTIVATIONS,
    Downsample,
    GroupNorm,
    TimestepEmbedding,
    Upsample,
    conv3x3,
    timestep_embedding,
)
from contextdiff_jax.models.low_resolution import embed_level
from contextdiff_jax.models.patches import depth_to_space, space_to_depth
from contextdiff_jax.models.precision import Precision
from contextdiff_jax.models.transformer import SpatialTransformer
from contextdiff_jax.models.unet_config import Level, UNetConfig
from contextdiff_jax.models.unet_parts import ContextHead, resnet_of

# Token states, or (video.VideoText) what an inflated network hands on to its transformers.
Text = Any


def _transformer(
    config: UNetConfig, level: Level, policy: dict, only_cross: bool
) -> SpatialTransformer:
    return SpatialTransformer(
        level.channels,
        level.num_heads,
        level.text_features,
        depth=level.depth,
        num_groups=config.norm_num_groups,
        only_cross_attention=only_cross,
        **policy,
    )


class DownBlock(nnx.Module):
    """Resnet (and transformer) layers of one level, then a downsampling: the skips, of which the
    last goes on.
    """

    def __init__(
        self,
        config: UNetConfig,
        level: Level,
        in_channels: int,
        *,
        cross_attention: bool,
        downsample: bool,
        **policy,
    ):
        widths = [in_channels] + [level.channels] * level.num_layers
        self.resnets = nnx.List(
            resnet_of(config, a, b, policy) for a, b in itertools.pairwise(widths)
        )
        self.attentions = nnx.List(
            _transformer(config, level, policy, level.only_cross_attention)
            for _ in range(level.num_layers if cross_attention else 0)
        )
        self.downsamplers = nnx.List(
            Downsample(level.channels, **policy) for _ in range(downsample)
        )

    def layers(
        self, x: ArrayLike, temb: ArrayLike, text: Text, mask: ArrayLike | None
    ) -> list[Array]:
        """The output of each layer, before the downsampling."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)  # [B, H, W, C]
            if self.attentions:
                x = self.attentions[i](x, text, mask)
            skips.append(x)
        return skips

    def downsample(self, x: ArrayLike) -> list[Array]:
        """The next level's input [B, ceil(H/2), ceil(W/2), C]; of the last level nothing."""
        return [downsample(x) for downsample in self.downsamplers]

    def __call__(
        self, x: ArrayLike, temb: ArrayLike, text: Text, mask: ArrayLike | None
    ) -> list[Array]:
        skips = self.layers(x, temb, text, mask)
        return skips + self.downsample(skips[-1])


class MidBlock(nnx.Module):
    """Resnet, transformer, resnet at the coarsest level; `UNetMidBlock2D` is, as in diffusers, one
    resnet.
    """

    def __init__(self, config: UNetConfig, **policy):
        level = config.levels()[-1]
        count = 2 if config.mid_block_type == "UNetMidBlock2DCrossAttn" else 1
        self.resnets = nnx.List(
            resnet_of(config, *[level.channels] * 2, policy) for _ in range(count)
        )
        # diffusers keeps the self-attention here even where `only_cross_attention` drops it
        # elsewhere.
        self.attentions = nnx.List(
            _transformer(config, level, policy, False) for _ in range(count - 1)
        )

    def __call__(self, x: ArrayLike, temb: ArrayLike, text: Text, mask: ArrayLike | None) -> Array:
        x = self.resnets[0](x, temb)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = resnet(attention(x, text, mask), temb)
        return x


class UpBlock(nnx.Module):
    """Resnet (and transformer) layers of one level, each fed one more skip, then an upsampling."""

    def __init__(
        self,
        config: UNetConfig,
        level: Level,
        in_channels: list[int],
        *,
        cross_attention: bool,
        upsample: bool,
        **policy,
    ):
        self.resnets = nnx.List(resnet_of(config, c, level.channels, policy) for c in in_channels)
        self.attentions = nnx.List(
            _transformer(config, level, policy, level.only_cross_attention)
            for _ in range(len(in_channels) if cross_attention else 0)
        )
        self.upsamplers = nnx.List(Upsample(level.channels, **policy) for _ in range(upsample))

    def __call__(
        self,
        x: ArrayLike,
        skips: list[Array],
        temb: ArrayLike,
        text: Text,
        mask: ArrayLike | None,
        size: tuple[int, int] | None,
    ) -> Array:
        for i, resnet in enumerate(self.resnets):
            x = resnet(jnp.concatenate([x, skips[-1 - i]], axis=-1), temb)  # [B, H, W, C]
            if self.attentions:
                x = self.attentions[i](x, text, mask)
        for upsample in self.upsamplers:
            x = upsample(x, size)  # [B, *size, C]
        return x


class UNet(nnx.Module):
    """Denoiser of x_t given t and text tokens; see the module docstring.

    Args:
      config: topology and widths.
      rngs: initialisation; residual branches and both outputs start at zero (Dhariwal & Nichol,
          2021).
      precision: of the parameters, the products and what is returned.
    """

    name = "unet"  # of its parameters, and of its folder in a pipeline's
    keeps_coarse = True  # whether a step can reuse another's coarser levels

    def __init__(
        self,
        config: UNetConfig,
        *,
        rngs: nnx.Rngs,
        precision: Precision = Precision(),
    ):
        policy = precision.policy(rngs)
        self.config = config
        self.precision = precision
        widths = config.block_out_channels
        pixels = config.patch_size**2
        channels = pixels * config.in_channels * (1 + config.low_resolution)
        self.conv_in = conv3x3(channels, widths[0], **policy)
        time_features, act_fn = config.time_features, config.act_fn
        self.time_embedding = TimestepEmbedding(widths[0], time_features, act_fn=act_fn, **policy)
        # diffusers builds this one with its default activation, silu, whatever act_fn is.
        self.add_embedding = (
            TimestepEmbedding(config.projection_class_embeddings_input_dim, time_features, **policy)
            if config.addition_embed_type == "text_time"
            else None
        )
        self.level_embedding = (
            TimestepEmbedding(widths[0], time_features, act_fn=act_fn, **policy)
            if config.low_resolution
            else None
        )
        self.down_blocks, skips = _down_blocks(config, policy)
        self.mid_block = MidBlock(config, **policy) if config.mid_block_type is not None else None
        self.up_blocks = _up_blocks(config, skips, policy)
        norm = dict(num_groups=config.norm_num_groups, eps=config.norm_eps)
        self.conv_norm_out = GroupNorm(widths[0], **norm, **policy)
        channels = pixels * config.out_channels
        self.conv_out = conv3x3(widths[0], channels, zero_init=True, **policy)
        self.context_head = ContextHead(config, **policy) if config.context_head else None

    def __call__(
        self,
        x: Float[ArrayLike, "B H W C"],
        t: Shaped[ArrayLike, "*B"],
        text_tokens: Float[ArrayLike, "B L D"],
        text_mask: Bool[ArrayLike, "B L"] | None = None,
        added: Mapping[str, ArrayLike] | None = None,
        deep: Float[ArrayLike, "B H W K"] | None = None,
    ) -> Float[Array, "B H W O"] | tuple[Float[Array, "B H W O"], Float[Array, "B H W R"]]:
        """The network's prediction, float32; with a context head the pair (prediction, context).

        Args:
          x: noisy image or latent; any height and width, odd ones included.
          t: timestep, one a sample or one for all; integer or fractional.
          text_tokens: encoder states to attend to. text_mask: True where a token counts; None: all
              count.
          added: for `addition_embed_type="text_time"` (XL) `text_embeds` [B, P] and `time_ids` [B,
              6]; for `low_resolution` the noise's `level` [B].
          deep: `deep_features` of a near x and t: then only the finest level is computed
              (DeepCache, Ma et al., 2024).
        """
        return self.forward(x, self.time(t, x.shape[0], added), text_tokens, text_mask, deep)

    def predict(
        self,
        x: Float[ArrayLike, "B H W C"],
        t: Shaped[ArrayLike, "*B"],
        captions: Captions,
        seen: Bool[ArrayLike, "B L"] | None,
        size: tuple[int, int],
        deep: Float[ArrayLike, "B H W K"] | None = None,
    ) -> Array | tuple[Array, Array]:
        """The call, of captions, whose tokens in `seen` count, and a picture's `size` in pixels."""
        return self(x, t, captions.tokens, seen, self.added(captions, size), deep)

    def deep_features(
        self,
        x: Float[ArrayLike, "B H W C"],
        t: Shaped[ArrayLike, "*B"],
        captions: Captions,
        seen: Bool[ArrayLike, "B L"] | None,
        size: tuple[int, int],
    ) -> Float[Array, "B H W K"]:
        """The part of the finest up block's input that comes from the coarser levels; arguments as
        `predict`'s.
        """
        text = self.time(t, x.shape[0], self.added(captions, size)), captions.tokens, seen
        return self._coarse(self._fine(x, *text)[-1], *text)

    def added(self, captions: Captions, size: tuple[int, int]) -> dict[str, Array] | None:
        """The conditions beside time and tokens, if there are any."""
        added = {} if self.add_embedding is None else text_and_size(captions, *size)
        level = {} if captions.low is None else {"level": captions.low.level}
        return added | level or None

    def forward(
        self,
        x: Float[ArrayLike, "B H W C"],
        temb: Float[ArrayLike, "clips E"],
        text_tokens: Text,
        text_mask: ArrayLike | None,
        deep: Float[ArrayLike, "B H W K"] | None = None,
    ) -> Float[Array, "B H W O"] | tuple[Float[Array, "B H W O"], Float[Array, "B H W R"]]:
        """The call, with time embedded (`time`): a row of it for each picture, or, where the blocks
        are inflated, for each clip. The text is only handed on to the transformers.
        """
        skips = self._fine(x, temb, text_tokens, text_mask)
        deep = self._coarse(skips[-1], temb, text_tokens, text_mask) if deep is None else deep
        h = self.up_blocks[-1](deep, skips, temb, text_tokens, text_mask, None)
        out = self._picture(self.conv_out(ACTIVATIONS[self.config.act_fn](self.conv_norm_out(h))))
        if self.context_head is None:
            return out
        return out, self._picture(self.context_head(*jax.lax.stop_gradient((h, temb))))

    def _picture(self, patches: ArrayLike) -> Array:
        """An output [B, H, W, C], of its patches."""
        return depth_to_space(patches, self.config.patch_size).astype(self.precision.output)

    def _fine(
        self, x: ArrayLike, temb: ArrayLike, text: Text, mask: ArrayLike | None
    ) -> list[Array]:
        """The skips of the finest level."""
        x = space_to_depth(x, self.config.patch_size, "model.patch_size")
        h = self.conv_in(x)  # [B, H/p, W/p, C0]
        return [h, *self.down_blocks[0].layers(h, temb, text, mask)]

    def _coarse(self, h: ArrayLike, temb: ArrayLike, text: Text, mask: ArrayLike | None) -> Array:
        """Goes from the finest level's last skip through all others to what its up block reads."""
        size, skips = h.shape[1:3], self.down_blocks[0].downsample(h)
        for block in self.down_blocks[1:]:
            skips += block(skips[-1], temb, text, mask)
        h = skips[-1] if skips else h
        if self.mid_block is not None:
            h = self.mid_block(h, temb, text, mask)
        for block in self.up_blocks[:-1]:
            count = len(block.resnets)
            own, skips = skips[-count:], skips[:-count]
            h = block(h, own, temb, text, mask, skips[-1].shape[1:3] if skips else size)
        return h

    def time(
        self, t: ArrayLike, batch: int, added: Mapping[str, ArrayLike] | None
    ) -> Float[Array, "B E"]:
        """The embedding of t (and of `added`) for `batch` samples."""
        config = self.config
        sinusoid = dict(flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift)
        t = jnp.broadcast_to(jnp.asarray(t), (batch,))
        temb = self.time_embedding(timestep_embedding(t, config.block_out_channels[0], **sinusoid))
        if self.level_embedding is not None:
            level = embed_level(added["level"], config.block_out_channels[0])
            temb = temb + self.level_embedding(level)
        if self.add_embedding is None:
            return temb
        missing = sorted({"text_embeds", "time_ids"} - set(added or ()))
        if missing:
            raise ValueError(
                f"added: lacks {', '.join(missing)}; addition_embed_type='text_time' needs it"
            )
        ids = timestep_embedding(
            added["time_ids"], config.addition_time_embed_dim, **sinusoid
        )  # [B, 6, A]
        pooled = jnp.concatenate([added["text_embeds"], ids.reshape(batch, -1)], axis=-1)
        return temb + self.add_embedding(pooled)


def _down_blocks(config: UNetConfig, policy: dict) -> tuple[nnx.List, list[int]]:
    """The down path and the widths of its skips, in order."""
    blocks, skips = nnx.List(), [config.block_out_channels[0]]
    width = skips[0]
    for i, (kind, level) in enumerate(zip(config.down_block_types, config.levels(), strict=True)):
        last = i == len(config.block_out_channels) - 1
        cross = kind == "CrossAttnDownBlock2D"
        blocks.append(
            DownBlock(config, level, width, cross_attention=cross, downsample=not last, **policy)
        )
        width = level.channels
        skips += [width] * (level.num_layers + (not last))
    return blocks, skips


def _up_blocks(config: UNetConfig, skips: list[int], policy: dict) -> nnx.List:
    """The up path, which consumes the skips from the last."""
    blocks, width = nnx.List(), config.block_out_channels[-1]
    for kind, level in zip(config.up_block_types, reversed(config.levels()), strict=True):
        count = level.num_layers + 1
        own, skips = skips[-count:][::-1], skips[:-count]
        below = [width] + [level.channels] * (count - 1)
        inputs = [skip + h for skip, h in zip(own, below, strict=True)]
        more = bool(skips)  # the last block has used them up
        cross = kind == "CrossAttnUpBlock2D"
        blocks.append(
            UpBlock(config, level, inputs, cross_attention=cross, upsample=more, **policy)
        )
        width = level.channels
    return blocks
