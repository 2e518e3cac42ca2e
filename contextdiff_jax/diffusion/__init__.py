"""The mathematics of contextualized diffusion: pure functions on arrays (jax only)."""

from contextdiff_jax.diffusion.grids import time_grid
from contextdiff_jax.diffusion.guidance import (
    classifier_free,
    dynamic_threshold,
    guide,
    pair,
    plugin_denoise,
    posterior_mean_denoise,
    unpair,
    velocity_denoise,
)
from contextdiff_jax.diffusion.inversion import ddim_invert, invert
from contextdiff_jax.diffusion.losses import (
    loss_weight,
    prior_kl,
    sample_timesteps,
    snr,
    vlb,
    vlb_ends,
    vlb_kl,
)
from contextdiff_jax.diffusion.optimised import local_errors, optimised_grid
from contextdiff_jax.diffusion.paths import EDM, CosineContinuous, Flow
from contextdiff_jax.diffusion.process import (
    Gaussian,
    Process,
    drift_coefficient,
    marginal_mean,
    predict_x0,
    q_posterior,
    q_sample,
    shift_coefficient,
    shift_rate,
    training_target,
    velocity_data,
)
from contextdiff_jax.diffusion.samplers import (
    Denoised,
    Reuse,
    ddim_sample,
    ddpm_sample,
    get_sampler,
)
from contextdiff_jax.diffusion.schedule import (
    NoiseSchedule,
    Schedule,
    make_schedule,
    spaced_timesteps,
)

__all__ = [
    "EDM",
    "CosineContinuous",
    "Denoised",
    "Flow",
    "Gaussian",
    "NoiseSchedule",
    "Process",
    "Reuse",
    "Schedule",
    "classifier_free",
    "ddim_invert",
    "ddim_sample",
    "ddpm_sample",
    "drift_coefficient",
    "dynamic_threshold",
    "get_sampler",
    "guide",
    "invert",
    "local_errors",
    "loss_weight",
    "make_schedule",
    "marginal_mean",
    "optimised_grid",
    "pair",
    "plugin_denoise",
    "posterior_mean_denoise",
    "predict_x0",
    "prior_kl",
    "q_posterior",
    "q_sample",
    "sample_timesteps",
    "shift_coefficient",
    "shift_rate",
    "snr",
    "spaced_timesteps",
    "time_grid",
    "training_target",
    "unpair",
    "velocity_data",
    "velocity_denoise",
    "vlb",
    "vlb_ends",
    "vlb_kl",
]
