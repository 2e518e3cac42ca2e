"""An upsampler of animated 3D emoji, 64x64 to 256x256, trained on pieces of 64x64.

    bash launch/emoji_data.sh data
    python -m contextdiff_jax.train --config=configs/emoji_sr.py --workdir=runs/emoji_sr

6,000 steps take about 40 minutes on one CPU core. What it is and how to use it: docs/cascade.md.
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import base


def get_config() -> ConfigDict:
    """base with Imagen's efficient UNet, convolutions and text attention alone, on 4x4 patches: its
    finest level is as large as the low-resolution picture.
    """
    config = base.get_config()
    config.train.update(
        steps=6000,
        batch_size=16,
        learning_rate=1e-3,
        warmup_steps=200,
        ema_decay=0.999,
        log_every=50,
        sample_every=2000,
        checkpoint_every=500,
    )
    config.data.update(
        source="emoji",
        path="data/emoji3d",
        image_size=256,
        crop="random",
        crop_size=64,
        max_length=24,
    )
    config.diffusion.prediction_type = "x0"  # the noise of 48 values wouldn't pass 64 channels
    config.super_resolution.update(factor=4, max_level=0.5)
    config.context.update(kind="low_resolution", max_gain=0.4, patch_size=8)
    config.text.width = 96
    config.model = base.backbone(
        "efficient_unet",
        block_out_channels=(64, 96),
        layers_per_block=(2, 1),
        attention=("none", "text"),
        num_attention_heads=4,
        cross_attention_dim=96,
        pooled_projection_dim=96,
        norm_num_groups=8,
        patch_size=4,
    )
    config.sample.update(sampler="ddim", steps=16, guidance=1.0)
    return config
