"""Emoji in the 16x16x4 latents of the autoencoder of configs/vae_emoji.py: a small latent model
from nothing.

What it reaches, and the commands with their data: docs/pretrained.md. A plain base, then 200 steps
with context from it:

    python -m contextdiff_jax.train_vae --config=configs/vae_emoji.py --config.data.path=FOLDER
    --workdir=runs/vae python -m contextdiff_jax.train --config=configs/emoji_latent.py
    --config.data.path=FOLDER --workdir=runs/plain \\
        --config.context.kind=none --config.context.shift=none
    python -m contextdiff_jax.train --config=configs/emoji_latent.py --config.data.path=FOLDER
    --workdir=runs/context \\
        --config.train.init_from=runs/plain --config.train.steps=200
        --config.train.learning_rate=1e-3
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import base


def get_config() -> ConfigDict:
    """base on latents, x0-prediction and text attention where they are 8x8 and 4x4."""
    config = base.get_config()
    config.train.update(
        steps=3000, batch_size=16, learning_rate=2e-3, warmup_steps=50, ema_decay=0.998
    )
    config.data.update(source="emoji", image_size=64)
    config.latent.vae = "runs/vae/vae"
    config.diffusion.prediction_type = "x0"
    config.context.patch_size = 2
    config.model.update(
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96, 128),
        norm_num_groups=8,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=128 + 6 * 8,
    )
    config.sample.update(
        guidance=2.0,
        steps=25,
        prompts=(
            # Of the training set, then of held-out pairs of person and skin tone.
            "woman, dark skin tone, noto style",
            "baby, light skin tone, twemoji style",
            "girl, medium skin tone, noto style",
            "boy, noto style",
            "man: blond hair, dark skin tone, twemoji style",
            "woman: red hair, light skin tone, noto style",
            "person: curly hair, dark skin tone, noto style",
            "woman: beard, medium skin tone, twemoji style",
            "man: red hair, medium-dark skin tone, noto style",
            "older woman, medium-dark skin tone, twemoji style",
            "woman: bald, dark skin tone, twemoji style",
            "person with blond hair, medium skin tone, twemoji style",
            "man: white hair, medium-light skin tone, noto style",
            "woman: curly hair, medium-light skin tone, noto style",
            "man: bald, light skin tone, noto style",
            "child, medium-dark skin tone, twemoji style",
        ),
    )
    return config
