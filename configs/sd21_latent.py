"""Fine-tuning of Stable Diffusion 2.1 (v-prediction) with context, on its own latents of 768x768
pictures.

Needs what configs/sd15_latent.py needs, and was as little run here at this size. The schedule is
rescaled to end in pure noise (Lin et al., 2023), which a v network can be fine-tuned to; the other
way, the folder's own schedule with L_T's weight, is `--config.diffusion.zero_terminal_snr=False
--config.diffusion.prior_kl=1`. When to take which: docs/pretrained.md.

    python -m contextdiff_jax.train --config=configs/sd21_latent.py --config.model.pretrained=FOLDER
    \\
        --config.data.path=PICTURES --workdir=runs/sd21
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import sd15_latent


def get_config() -> ConfigDict:
    """sd15_latent with the rescaled schedule and, against its washed-out colours, rescaled
    guidance.
    """
    config = sd15_latent.get_config()
    config.model.pretrained = "stable-diffusion-2-1"
    config.data.image_size = 768
    config.diffusion.update(prior_kl=0.0, zero_terminal_snr=True)
    config.sample.guidance_rescale = 0.7
    return config
