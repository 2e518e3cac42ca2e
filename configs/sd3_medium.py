"""Stable Diffusion 3 medium's transformer (24 layers, 24 heads of 64, 2.0 B parameters) on 512x512
pictures' 64x64x16 latents, with the context of joint blocks.

Never run here: the shapes and the mesh of such a run, from nothing and with our text encoder, which
are compiled for TPUs. Half of each of the attention kernel's products is padding, 64 features to
128: `configs/mmdit_128.py` is the same size without it.

    python -m contextdiff_jax.benchmark --mode=aot --topology=v5p:2x2x1 --batch_per_chip=8
    --config=configs/sd3_medium.py
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import base
from contextdiff_jax.configs.sd21_512 import TRAIN


def get_config() -> ConfigDict:
    """base at Stable Diffusion 3's sizes, on the straight path."""
    config = base.get_config()
    config.train.update(TRAIN, tpu_scoped_memory=65536)
    config.data.update(source="folder", image_size=64, max_length=333, num_workers=16)
    config.diffusion.update(
        schedule="flow", prediction_type="velocity", timestep_sampling="logit_normal"
    )
    config.context.update(kind="joint", estimate="velocity", patch_size=4, width=384, num_heads=6)
    config.text.update(max_length=333, width=1024, num_layers=2, num_heads=16)
    config.model = base.backbone(
        "mmdit",
        sample_size=128,
        num_layers=24,
        num_attention_heads=24,
        attention_head_dim=64,
        caption_projection_dim=1536,
        joint_attention_dim=1024,
        pooled_projection_dim=1024,
        pos_embed_max_size=192,
    )
    config.mesh.update(data=-1, fsdp=4)
    return config
