"""Stable Diffusion 3 medium's transformer (24 layers, 24 heads of 64, 2.0 B parameters) on 512x512
pictures' 64x64x16 latents, with the context of joint blocks.

Never run here: the shapes and the mesh of such a run, from nothing and with our text encoder, which
are compiled for TPUs. Half of each of the attention kernel's products is padding, 64 features to
128: `configs/mmdit_128.py` is the same size without it.

    python -m contextdiff_jax.benchmark --mode=aot --topology=v5p:2x2x1 --batch_per_chip=8
    --config=configs/sd3_medium.py
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """base at Stable Diffusion 3's sizes, on the straight path."""
    config = base.get_config()
    config.train.update(
        steps=50_000,
        batch_size=2048,
        learning_rate=2e-5,
        warmup_steps=1000,
        decay="constant",
        weight_decay=0.01,
        b2=0.999,
        ema_decay=0.9999,
        precision="bfloat16",
        tpu_scoped_memory=65536,
        checkpoint_every=1000,
        sample_every=5000,
    )
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
