"""Fine-tuning of Stable Diffusion 1.5 with context, on its own latents of 512x512 pictures.

Needs the folder of its diffusers pipeline (model_index.json, unet, vae, text_encoder, tokenizer,
scheduler), captioned pictures or a cache of their latents, and an accelerator: UNet, its average
and Adam's moments are 13.8 GB in float32. Not run here at this size: the tests run the same program
on a tiny pipeline. `model.*`, `diffusion.*` and the steps of sampling are the folder's.

    python -m contextdiff_jax.cache_latents --config=configs/sd15_latent.py
    --config.model.pretrained=FOLDER \\
        --config.data.path=PICTURES --out=CACHE
    python -m contextdiff_jax.train --config=configs/sd15_latent.py --config.model.pretrained=FOLDER
    --workdir=runs/sd15 \\
        --config.data.source=cache --config.data.path=CACHE
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import base
from contextdiff_jax.configs.sd21_512 import TRAIN


def get_config() -> ConfigDict:
    """base with the folder's networks, and L_T's weight: SD's schedule doesn't end in pure noise
    (docs/pretrained.md).
    """
    config = base.get_config()
    config.model.pretrained = "stable-diffusion-v1-5"
    config.train.update(
        TRAIN,
        steps=20_000,
        batch_size=64,
        learning_rate=1e-5,
        warmup_steps=500,
        sample_every=1000,
    )
    config.data.update(source="folder", image_size=512, num_workers=8)
    config.diffusion.prior_kl = 1.0
    config.context.update(patch_size=4, width=768, num_blocks=4, num_heads=12)
    config.mesh.update(data=1, fsdp=-1)
    config.sample.guidance = 7.5
    return config
