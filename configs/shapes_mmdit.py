"""`shapes` by a multimodal transformer on the straight path, as Stable Diffusion 3 is trained.

    python -m contextdiff_jax.train --config=configs/shapes_mmdit.py --workdir=runs/mmdit

The context is made of joint blocks too, and the network predicts the velocity of the shifted path.
A transformer from nothing learns slower than the UNet of `configs/shapes.py`: take that one for a
first picture.
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import base, shapes


def get_config() -> ConfigDict:
    """shapes, with the other backbone, path and context."""
    config = shapes.get_config()
    width = config.text.width
    config.model = base.backbone(
        "mmdit",
        sample_size=config.data.image_size,
        patch_size=4,
        in_channels=3,
        out_channels=3,
        num_layers=6,
        num_attention_heads=4,
        attention_head_dim=32,
        caption_projection_dim=128,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        pos_embed_max_size=64,
        qk_norm="rms_norm",
    )
    config.diffusion.update(
        schedule="flow", prediction_type="velocity", timestep_sampling="logit_normal"
    )
    config.context.update(kind="joint", estimate="velocity")
    config.train.update(batch_size=64, learning_rate=1e-3)
    config.sample.update(sampler="ddim", steps=25)  # without an estimate of r: no noise
    return config
