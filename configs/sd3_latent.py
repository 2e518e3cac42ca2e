"""Fine-tuning of Stable Diffusion 3 or 3.5 with context, on its own latents of 1024x1024 pictures.

Needs the folder of its diffusers pipeline (model_index.json, transformer, vae, text encoders and
tokenizers, scheduler), captioned pictures or a cache of their latents, and accelerators. Not run
here at this size: the tests run the same program on a tiny pipeline. `model.*`, the path and the
steps of sampling are the folder's. LoRA and the context alone
(`--config.train.trainable=lora|context`) need no moments of the transformer.

    python -m contextdiff_jax.train --config=configs/sd3_latent.py --config.model.pretrained=FOLDER
    \\
        --config.data.path=PICTURES --workdir=runs/sd3
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import sd15_latent


def get_config() -> ConfigDict:
    """sd15_latent on the path `flow`, its times drawn as Stable Diffusion 3's were."""
    config = sd15_latent.get_config()
    config.model.pretrained = "stable-diffusion-3.5-medium"
    config.data.update(image_size=1024, crop="random")
    config.diffusion.update(
        schedule="flow",
        prediction_type="velocity",
        timestep_sampling="logit_normal",
        prior_kl=0.0,
    )
    config.context.estimate = "velocity"
    config.sample.update(steps=28, guidance=4.5)
    return config
