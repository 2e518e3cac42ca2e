"""Edits a clip without any pretrained model: a small network of pixels learns the clip alone, with
its prompt.

It knows no other words than the clip's, so an edit shows that the pipeline runs (inversion,
reconstruction, attention control), not a porsche. Takes about a second a step for eight frames of
48 x 64 on one CPU core.

    python -m contextdiff_jax.edit --config=configs/edit_clip.py --workdir=runs/jeep
    --config.video.path=jeep
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import base
from contextdiff_jax.configs.edit_shapes import video_sections


def get_config() -> ConfigDict:
    """All parameters from scratch; text attention at a quarter of the resolution."""
    config = base.get_config()
    config.update(video_sections())
    config.train.update(
        steps=300,
        batch_size=1,
        learning_rate=1e-3,
        warmup_steps=20,
        ema_decay=0.98,
        log_every=10,
        checkpoint_every=100,
    )
    config.model.update(
        block_out_channels=(32, 64, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 2 + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * 2,
    )
    config.video.update(
        path="clip",
        prompt="a silver jeep driving down a curvy road in the countryside",
        edit_prompts=("a porsche car driving down a curvy road in the countryside",),
        tune="all",
        size=(48, 64),
    )
    config.edit.update(steps=25, inversion="exact")
    return config
