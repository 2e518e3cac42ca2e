"""Parts of both UNets (`unet`, `efficient_unet`): a residual block of a config, and the second
output.
"""

from __future__ import annotations

from typing import Any

from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from contextdiff_jax.models.efficient_unet_config import EfficientUNetConfig
from contextdiff_jax.models.layers import ACTIVATIONS, GroupNorm, ResnetBlock, conv3x3
from contextdiff_jax.models.unet_config import UNetConfig

AnyUNetConfig = UNetConfig | EfficientUNetConfig


def resnet_of(
    config: AnyUNetConfig, in_channels: int, out_channels: int, policy: dict, scale: float = 1.0
) -> ResnetBlock:
    """A residual block, whose sum is multiplied by `scale`."""
    return ResnetBlock(
        in_channels,
        out_channels,
        config.time_features,
        num_groups=config.norm_num_groups,
        eps=config.norm_eps,
        act_fn=config.act_fn,
        time_scale_shift=config.resnet_time_scale_shift,
        scale=scale,
        **policy,
    )


class ContextHead(nnx.Module):
    """Own resnet, GroupNorm, activation and zero-initialised convolution: the context estimate
    starts at 0.

    It reads the trunk's features and doesn't train them: the context is as large as the picture and
    moves while phi learns, and a head that pulled at the trunk spoiled the denoiser
    (docs/results/README.md). So its resnet is its own.
    """

    def __init__(self, config: AnyUNetConfig, **policy: Any):
        width = config.block_out_channels[0]
        self.act = ACTIVATIONS[config.act_fn]
        self.resnet = resnet_of(config, width, width, policy)
        self.norm = GroupNorm(width, config.norm_num_groups, eps=config.norm_eps, **policy)
        channels = config.patch_size**2 * config.in_channels
        self.conv = conv3x3(width, channels, zero_init=True, **policy)

    def __call__(
        self, h: Float[ArrayLike, "B H W C"], temb: Float[ArrayLike, "clips E"]
    ) -> Float[Array, "B H W I"]:
        return self.conv(self.act(self.norm(self.resnet(h, temb))))
