"""Stable Diffusion 1.5's UNet (859.5 M parameters) on 512x512 pictures' 64x64x4 latents: the step
that peers are compared by.

Like sd21_512 the shapes of a run, compiled for TPUs but never run here; what is trained in practice
is configs/sd15_latent.py.

    python -m contextdiff_jax.benchmark --mode=aot --topology=v5e:2x2 --config=configs/sd15_512.py
    --batch_per_chip=8
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import sd21_512


def get_config() -> ConfigDict:
    """sd21_512 with the older network's heads, text width and target."""
    config = sd21_512.get_config()
    config.train.update(batch_size=32, remat="products")
    config.diffusion.update(zero_terminal_snr=False, prediction_type="epsilon", prior_kl=1.0)
    config.text.update(width=768, num_layers=12, num_heads=12)
    config.model.update(
        cross_attention_dim=768, attention_head_dim=(8,) * 4, use_linear_projection=False
    )
    config.mesh.update(data=1, fsdp=-1)
    config.sample.guidance_rescale = 0.0
    return config
