"""Settings of a tiny autoencoder's training."""

from __future__ import annotations

from typing import Any

from contextdiff_jax.configs.vae_emoji import get_config
from contextdiff_jax.settings.autoencoder import AutoencoderSettings, parse_autoencoder


def autoencoder_settings(**train: Any) -> AutoencoderSettings:
    """One level of eight channels, four pictures a step; `train`: what differs in that section."""
    config = get_config()
    config.train.update(batch_size=4, **train)
    config.vae.update(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return parse_autoencoder(config.to_dict())
