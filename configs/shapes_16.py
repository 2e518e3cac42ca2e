"""Captioned scenes of one object at 16x16, as the experiments of docs/results, the straight path of
docs/mathematics.md and the edited clips of docs/video.md were measured. `shapes` is at 32x32.

    python -m contextdiff_jax.train --config=configs/shapes_16.py --workdir=runs/shapes

About 7 minutes of training on 2 CPU cores. Captions state no place: with
`--config.data.position_fraction=0.5 --config.diffusion.schedule=linear` it was obeyed in 40% of the
samples after 64,000 pictures.
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import base


def get_config() -> ConfigDict:
    """base at a width that two cores train in minutes: text attention where the picture is 4x4."""
    config = base.get_config()
    config.train.update(
        steps=3000,
        batch_size=16,
        learning_rate=3e-3,
        warmup_steps=50,
        ema_decay=0.998,
        sample_every=1000,
    )
    config.data.update(image_size=16, num_objects=(1, 1), position_fraction=0.0, max_length=24)
    config.diffusion.prediction_type = (
        "x0"  # its loss has its weight where the caption decides: at much noise
    )
    config.text.width = config.model.cross_attention_dim = 96
    config.model.update(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D",) * 2 + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * 2,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=96 + 6 * 8,
    )
    config.sample.steps = 25
    return config
