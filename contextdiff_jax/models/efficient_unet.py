"""The efficient UNet of Imagen's upsamplers (Saharia et al., 2022, appendix B), NHWC, in Flax NNX.

As a UNet's, its levels halve height and width. What differs saves memory and time where a picture
is large: few channels and blocks at high resolutions, many at low ones; a level's downsampling
comes before its blocks and its upsampling after them, so that they run on fewer pixels; one skip a
level; and the sum of a residual block is divided by sqrt(2). It attends to the text where the
config says, and to its own pixels only at levels that will see as many of them in sampling: without
that it is convolutions and can be trained on pieces of pictures.

The blocks are those of `models.layers` and `models.transformer`.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Shaped

from contextdiff_jax.models.captions import Captions, pooled_text
from contextdiff_jax.models.efficient_unet_config import EfficientLevel, EfficientUNetConfig
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
from contextdiff_jax.models.unet_parts import ContextHead, resnet_of


class EfficientBlock(nnx.Module):
    """The residual blocks of one level, on one of the two ways, and its attention if it has one."""

    def __init__(
        self, config: EfficientUNetConfig, level: EfficientLevel, in_channels: int, **policy
    ):
        widths = [in_channels, *[level.channels] * (level.num_layers - 1)]
        self.resnets = nnx.List(
            resnet_of(config, width, level.channels, policy, scale=0.5**0.5) for width in widths
        )
        self.attentions = nnx.List(
            SpatialTransformer(
                level.channels,
                level.num_heads,
                config.cross_attention_dim,
                depth=level.depth,
                num_groups=config.norm_num_groups,
                text_alone=level.attention == "text",
                **policy,
            )
            for _ in range(level.attention != "none")
        )

    def __call__(
        self,
        x: Float[ArrayLike, "B H W C"],
        temb: Float[ArrayLike, "B E"],
        text: Float[ArrayLike, "B L D"],
        mask: Bool[ArrayLike, "B L"] | None,
    ) -> Float[Array, "B H W K"]:
        for resnet in self.resnets:
            x = resnet(x, temb)
        for attention in self.attentions:
            x = attention(x, text, mask)
        return x


class EfficientUNet(nnx.Module):
    """Denoiser of x_t given t and text; see the module docstring.

    Args:
      config: topology and widths.
      rngs: initialisation; residual branches and both outputs start at zero.
      precision: of the parameters, the products and what is returned.
    """

    name = "unet"  # of its parameters
    keeps_coarse = False  # whether a step can reuse another's coarser levels

    def __init__(
        self,
        config: EfficientUNetConfig,
        *,
        rngs: nnx.Rngs,
        precision: Precision = Precision(),
    ):
        policy = precision.policy(rngs)
        self.config, self.precision = config, precision
        widths, time_features = config.block_out_channels, config.time_features
        values = config.patch_size**2  # of a channel in a patch
        self.conv_in = conv3x3(
            values * config.in_channels * (1 + config.low_resolution), widths[0], **policy
        )

        def embedding(features: int, exists: bool = True) -> TimestepEmbedding | None:
            return TimestepEmbedding(features, time_features, **policy) if exists else None

        self.time_embedding = embedding(widths[0])
        self.level_embedding = embedding(widths[0], config.low_resolution)
        pooled = config.pooled_projection_dim
        self.pooled_embedding = embedding(pooled or 0, pooled is not None)
        levels, steps = config.levels(), list(itertools.pairwise(widths))
        self.downsamplers = nnx.List(Downsample(fine, coarse, **policy) for fine, coarse in steps)
        self.down_blocks = nnx.List(
            EfficientBlock(config, level, level.channels, **policy) for level in levels
        )
        # From the coarsest: all but that read the way up beside the skip.
        self.up_blocks = nnx.List(
            EfficientBlock(config, level, level.channels * (1 + (i > 0)), **policy)
            for i, level in enumerate(reversed(levels))
        )
        self.upsamplers = nnx.List(
            Upsample(coarse, fine, **policy) for fine, coarse in reversed(steps)
        )
        self.conv_norm_out = GroupNorm(
            widths[0], config.norm_num_groups, eps=config.norm_eps, **policy
        )
        self.conv_out = conv3x3(widths[0], values * config.out_channels, zero_init=True, **policy)
        self.context_head = ContextHead(config, **policy) if config.context_head else None

    def predict(
        self,
        x: Float[ArrayLike, "B H W C"],
        t: Shaped[ArrayLike, "*B"],
        captions: Captions,
        seen: Bool[ArrayLike, "B L"] | None,
        size: tuple[int, int],
    ) -> Float[Array, "B H W O"] | tuple[Float[Array, "B H W O"], Float[Array, "B H W R"]]:
        """The network's prediction, float32; with a context head the pair (prediction, context).

        Args:
          x: noisy picture or latent, and after its channels an upsampler's low-resolution picture.
          t: timestep, one a sample or one for all; integer or fractional.
          captions: tokens to attend to, of which those in `seen` count (None: all); `size` isn't
              read.
        """
        temb, text = self.time(t, captions), captions.tokens
        h = self.conv_in(space_to_depth(x, self.config.patch_size, "model.patch_size"))
        skips = []
        for i, block in enumerate(self.down_blocks):
            h = block(self.downsamplers[i - 1](h) if i else h, temb, text, seen)
            skips.append(h)
        h = self.up_blocks[0](skips.pop(), temb, text, seen)
        for upsample, block in zip(self.upsamplers, self.up_blocks[1:], strict=True):
            skip = skips.pop()
            h = upsample(h, skip.shape[1:3])
            h = block(jnp.concatenate([h, skip], axis=-1), temb, text, seen)
        out = self._picture(self.conv_out(ACTIVATIONS[self.config.act_fn](self.conv_norm_out(h))))
        if self.context_head is None:
            return out
        return out, self._picture(self.context_head(*jax.lax.stop_gradient((h, temb))))

    def time(self, t: Shaped[ArrayLike, "*B"], captions: Captions) -> Float[Array, "N E"]:
        """The embedding of t, and of the pooled text and the low-resolution picture's level where
        they are read.
        """
        width = self.config.block_out_channels[0]
        t = jnp.broadcast_to(jnp.asarray(t), captions.tokens.shape[:1])
        temb = self.time_embedding(timestep_embedding(t, width))
        if self.level_embedding is not None:
            temb = temb + self.level_embedding(embed_level(captions.low.level, width))
        if self.pooled_embedding is not None:
            temb = temb + self.pooled_embedding(pooled_text(captions))
        return temb

    def _picture(self, patches: ArrayLike) -> Array:
        """An output [B, H, W, C], of its patches."""
        return depth_to_space(patches, self.config.patch_size).astype(self.precision.output)
