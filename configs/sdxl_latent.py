"""Fine-tuning of Stable Diffusion XL with context, on its own latents of 1024x1024 pictures.

Needs what configs/sd15_latent.py needs, of the XL base, and was as little run here: UNet, its
average and Adam's moments are 41 GB in float32. Each picture's own size and its crop are read, as
XL was trained. LoRA and the context alone (`--config.train.trainable=lora|context`) need no moments
of the UNet.

    python -m contextdiff_jax.train --config=configs/sdxl_latent.py --config.model.pretrained=FOLDER
    \\
        --config.data.path=PICTURES --workdir=runs/sdxl
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import sd15_latent


def get_config() -> ConfigDict:
    """sd15_latent at XL's size, cropped anywhere, since the network is told where."""
    config = sd15_latent.get_config()
    config.model.pretrained = "stable-diffusion-xl-base-1.0"
    config.data.update(image_size=1024, crop="random")
    config.sample.guidance = 5.0
    return config
