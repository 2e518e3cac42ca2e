"""The embedded default: captioned scenes of one object at 32x32, nothing to download.

Reaches: see README.md (`bash launch/quickstart.sh`). Takes about 7 minutes of training on 2 CPU cores.

    python -m contextdiff_jax.train --config=configs/shapes.py --workdir=runs/shapes
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """base at a width that two cores train in minutes: attention only where the picture is 4x4."""
    config = base.get_config()
    config.train.update(
        steps=1000, batch_size=32, learning_rate=2e-3, warmup_steps=50, ema_decay=0.995, sample_every=500
    )
    config.data.update(image_size=32, num_objects=(1, 1), max_length=24)
    config.text.width = config.model.cross_attention_dim = 96
    config.model.update(
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownBlock2D",) * 3 + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * 3,
        norm_num_groups=8,
    )
    config.sample.steps = 25
    return config
