"""Real captioned pictures at 64x64 from a folder: emoji in two styles, 7,240 in training.

Takes about 1.5 s a step on 2 CPU cores. What it reaches: docs/emoji.md.

    python -m contextdiff_jax.train --config=configs/emoji.py --config.data.path=FOLDER --workdir=runs/emoji
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """base with four levels, text attention where the picture is 16x16 and 8x8."""
    config = base.get_config()
    config.train.update(steps=2000, batch_size=24, learning_rate=1e-3, ema_decay=0.997, sample_every=400)
    config.data.update(source="emoji", image_size=64)
    config.context.patch_size = 8
    config.model.update(
        block_out_channels=(16, 32, 96, 128),
        down_block_types=("DownBlock2D",) * 2 + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",) * 2,
        norm_num_groups=8,
    )
    config.sample.update(
        guidance=2.0,
        prompts=(
            "horse, noto style", "horse, twemoji style", "grinning face, noto style", "grinning face, twemoji style",
            "flag of france, noto style", "flag of japan, twemoji style", "red heart, noto style", "pizza, noto style",
            "waving hand, dark skin tone, noto style", "waving hand, light skin tone, noto style",
            "waving hand, dark skin tone, twemoji style", "waving hand, light skin tone, twemoji style",
            "woman, medium skin tone, noto style", "man, medium skin tone, noto style",
            "three o’clock, noto style", "blue book, twemoji style",
        ),
    )
    return config
