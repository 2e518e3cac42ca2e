"""The denoising networks by the name that a config gives them in `model.kind`."""

from __future__ import annotations

from typing import NamedTuple

from flax import nnx

from contextdiff_jax.models.efficient_unet import EfficientUNet
from contextdiff_jax.models.efficient_unet_config import EfficientUNetConfig
from contextdiff_jax.models.mmdit import MMDiT
from contextdiff_jax.models.mmdit_config import MMDiTConfig
from contextdiff_jax.models.precision import Precision
from contextdiff_jax.models.unet import UNet
from contextdiff_jax.models.unet_config import UNetConfig

Backbone = UNet | MMDiT | EfficientUNet
BackboneConfig = UNetConfig | MMDiTConfig | EfficientUNetConfig


class Kind(NamedTuple):
    """A kind of backbone.

    A new one's config has `in_channels`, `out_channels`, `text_width`, `pooled_features`,
    `sample_size`, `granularity`, `context_head`, `low_resolution`, `from_dict` and `to_dict`; its
    network `name`, `keeps_coarse` and `predict` as those here.
    """

    config: type[BackboneConfig]
    network: type[Backbone]


BACKBONES = {
    "unet": Kind(UNetConfig, UNet),
    "mmdit": Kind(MMDiTConfig, MMDiT),
    "efficient_unet": Kind(EfficientUNetConfig, EfficientUNet),
}


def kind_of(config: BackboneConfig) -> str:
    """The name of the config's kind."""
    return next(name for name, kind in BACKBONES.items() if type(config) is kind.config)


def build_backbone(
    config: BackboneConfig, *, rngs: nnx.Rngs, precision: Precision = Precision()
) -> Backbone:
    """A newly initialised network."""
    return BACKBONES[kind_of(config)].network(config, rngs=rngs, precision=precision)
