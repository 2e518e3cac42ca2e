"""Animated 3D emoji at 64x64: people in five skin tones, animals and faces.

    bash launch/emoji_data.sh data
    python -m contextdiff_jax.train --config=configs/emoji3d.py --workdir=runs/emoji3d

The model that ships with the package (`sample --model=emoji`) was trained by it; its card is
contextdiff_jax/shipped/emoji/README.md.
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import base


def get_config() -> ConfigDict:
    """base on 4x4 patches that predicts x0, with text attention at the two lower levels."""
    config = base.get_config()
    config.train.update(
        steps=14000,
        batch_size=16,
        learning_rate=1e-3,
        warmup_steps=100,
        ema_decay=0.999,
        log_every=50,
        sample_every=1000,
        checkpoint_every=500,
    )
    config.data.update(
        source="emoji",
        path="data/emoji3d",
        metadata="frames_train.jsonl",
        heldout_metadata="frames_test.jsonl",
        image_size=64,
        max_length=24,
    )
    config.diffusion.prediction_type = "x0"
    config.context.update(kind="linear", max_gain=0.4, patch_size=8)
    config.text.width = 96
    config.model.update(
        patch_size=4,
        block_out_channels=(64, 80, 96),
        cross_attention_dim=96,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=96 + 6 * 8,
    )
    config.sample.update(
        sampler="ddpm",
        steps=50,
        guidance=2.0,
        prompts=(
            "woman running, medium skin tone, 3d style",
            "man running, dark skin tone, 3d style",
            "dog, 3d style",
            "cat face, 3d style",
            "grinning face, 3d style",
            "panda face, 3d style",
            "woman scientist, light skin tone, 3d style",
            "octopus, 3d style",
        ),
    )
    return config
