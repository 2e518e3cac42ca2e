"""Real captioned pictures at 64x64 from a folder: emoji in two styles, 7,240 in training.

Takes about 1.5 s a step on 2 CPU cores. What it reaches: docs/emoji.md.

    python -m contextdiff_jax.train --config=configs/emoji.py --config.data.path=FOLDER
    --workdir=runs/emoji
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import base


def get_config() -> ConfigDict:
    """base with four levels, text attention where the picture is 8x8."""
    config = base.get_config()
    config.train.update(
        steps=1500,
        batch_size=24,
        learning_rate=1e-3,
        ema_decay=0.997,
        sample_every=250,
        checkpoint_every=250,
    )
    config.data.update(source="emoji", image_size=64)
    config.context.patch_size = 8
    config.model.update(
        block_out_channels=(16, 32, 96, 128),
        down_block_types=("DownBlock2D",) * 3 + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * 3,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=128 + 6 * 8,
    )
    config.sample.update(
        guidance=2.0,
        prompts=(
            "horse, noto style",
            "horse, twemoji style",
            "grinning face, noto style",
            "grinning face, twemoji style",
            "flag of france, noto style",
            "flag of japan, twemoji style",
            "red apple, noto style",
            "slice of pizza, noto style",
            "waving hand sign, dark skin tone, noto style",
            "waving hand sign, light skin tone, noto style",
            "waving hand sign, dark skin tone, twemoji style",
            "waving hand sign, light skin tone, twemoji style",
            "woman, medium skin tone, noto style",
            "man, medium-dark skin tone, twemoji style",
            "clock face three oclock, twemoji style",
            "blue book, twemoji style",
        ),
    )
    return config
