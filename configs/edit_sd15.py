"""Edits a clip with a Stable Diffusion 1.x or 2.x folder (diffusers' layout), whose context is new
and tuned with it.

    python -m contextdiff_jax.edit --config=configs/edit_sd15.py --workdir=runs/jeep
    --config.video.model=FOLDER \\
        --config.video.path=jeep --config.video.prompt="a silver jeep driving down a curvy road" \\
        --config.video.edit_prompts="('a porsche car driving down a curvy road',)"

Run so far with a folder of tiny random networks only (tests/test_edit.py): no weights are to be had
here. For 16 GB keep `remat`, or fewer frames.
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import base
from contextdiff_jax.configs.edit_shapes import video_sections


def get_config() -> ConfigDict:
    """Tune-A-Video's settings: 300 steps at 3e-5, 50 DDIM steps, guidance 7.5."""
    config = base.get_config()
    config.update(video_sections())
    config.train.update(
        steps=300,
        batch_size=1,
        learning_rate=3e-5,
        warmup_steps=10,
        decay="constant",
        ema_decay=0.99,
        log_every=10,
        checkpoint_every=100,
    )
    config.context.update(patch_size=2, width=256, num_heads=8)
    config.video.update(
        path="clip",
        prompt="a silver jeep driving down a curvy road in the countryside",
        edit_prompts=("a porsche car driving down a curvy road in the countryside",),
        model="stable-diffusion-v1-5",
        size=(512, 512),
        remat=True,
    )
    config.edit.update(guidance=7.5, control="refine", inversion="exact", iterations=5)
    return config
