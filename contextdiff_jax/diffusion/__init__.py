"""The mathematics of contextualized diffusion: pure functions on arrays (jax only)."""

from contextdiff_jax.diffusion.guidance import (
    classifier_free,
    dynamic_threshold,
    guide,
    pair,
    plugin_denoise,
    posterior_mean_denoise,
    unpair,
)
from contextdiff_jax.diffusion.losses import (
    loss_weight,
    prior_kl,
    sample_timesteps,
    snr,
    vlb,
    vlb_ends,
    vlb_kl,
)
from contextdiff_jax.diffusion.process import (
    Gaussian,
    Process,
    marginal_mean,
    predict_x0,
    q_posterior,
    q_sample,
    shift_coefficient,
    training_target,
)
from contextdiff_jax.diffusion.samplers import (
    Denoised,
    Reuse,
    ddim_invert,
    ddim_sample,
    ddpm_sample,
    get_sampler,
)
from contextdiff_jax.diffusion.schedule import NoiseSchedule, make_schedule, spaced_timesteps

__all__ = [
    "Denoised",
    "Gaussian",
    "NoiseSchedule",
    "Process",
    "Reuse",
    "classifier_free",
    "ddim_invert",
    "ddim_sample",
    "ddpm_sample",
    "dynamic_threshold",
    "get_sampler",
    "guide",
    "loss_weight",
    "make_schedule",
    "marginal_mean",
    "pair",
    "plugin_denoise",
    "posterior_mean_denoise",
    "predict_x0",
    "prior_kl",
    "q_posterior",
    "q_sample",
    "sample_timesteps",
    "shift_coefficient",
    "snr",
    "spaced_timesteps",
    "training_target",
    "unpair",
    "vlb",
    "vlb_ends",
    "vlb_kl",
]
