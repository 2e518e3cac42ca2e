"""A bound on -log2 p(picture | caption) of a trained flow, in bits/dim.

    -log p(x0) <= E_q [ -log p(x_d) - log p(x0 | x_d) + log q(x_d | x0) ]                    (1)

q(x_d | x0) is the process itself at a little noise, time d, p(x_d) the flow's density there (exact
up to the solver's error), and p(x0 | x_d) a Gaussian around the model's x0 with the deviation b / a
of a picture seen through that noise, integrated over the picture's bins. To follow the flow down to
clean data would score the network where it was never asked for more digits than pixels have.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from contextdiff_jax import diffusion
from contextdiff_jax.diffusion.likelihood import flow_velocity, follow_flow
from contextdiff_jax.diffusion.losses import discretised_gaussian_nll
from contextdiff_jax.diffusion.paths import PATHS
from contextdiff_jax.diffusion.process import Process
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.models.contextdiff import ContextDiffusion
from contextdiff_jax.models.denoising import make_denoise
from contextdiff_jax.settings import Settings

BEGIN = 0.05  # d of (1), as a share of the path


def check_flow(settings: Settings) -> None:
    """Raises ValueError for a run whose flow `model_bits` can't follow."""
    if not settings.process.schedule.continuous:
        raise ValueError(
            f"--metrics=likelihood: diffusion.schedule={settings.diffusion.schedule!r} has no "
            f"continuous time; one of {', '.join(PATHS)}, or --metrics=bound"
        )
    if settings.context.moves and not settings.context.is_known:
        raise ValueError(
            "--metrics=likelihood: context.time_dependent=True: the estimate of r says nothing of "
            "dr/dt"
        )


def flow_times(schedule: diffusion.Schedule, num_steps: int) -> Float[Array, "S"]:
    """Ascending times of `num_steps` steps from `BEGIN` of the path to its end, shorter where there
    is less noise: there the flow turns faster.
    """
    shares = BEGIN + (1 - BEGIN) * jnp.linspace(0, 1, num_steps + 1) ** 2
    return schedule.time_of_share(shares)


def model_bits(
    model: ContextDiffusion,
    process: Process,
    x0: Float[Array, "B *D"],
    captions: Captions,
    key: PRNGKeyArray,
    times: Float[Array, "S"],
) -> Float[Array, "B"]:
    """(1) of the model as it samples without guidance and without noise, one draw a picture."""
    schedule, shift = process.schedule, process.shift
    context, B = model.context.config, x0.shape[:1]
    denoise = make_denoise(
        model, schedule, captions, prediction_type=process.prediction_type, shift=shift
    )

    def relate(t, noise=None):
        return model.relate(x0, captions, schedule.network_time(t), noise=noise)

    def shifted(y, t):
        # y = x - k r of a known r moves as plain diffusion does, and its divergence is x's.
        if not context.is_known:
            return y
        return y + diffusion.marginal_mean(schedule, jnp.zeros_like(y), relate(t), t, shift)

    def velocity(y, t):
        out = denoise(shifted(y, t), t, t)
        return flow_velocity(schedule, out, y, t, "none" if context.is_known else shift)

    draw, probe = jax.random.split(key)
    noise = jax.random.normal(draw, x0.shape)
    d, T = (jnp.full(B, t) for t in (times[0], times[-1]))
    if context.is_known:
        begin = diffusion.q_sample(schedule, x0, jnp.zeros_like(x0), d, noise, "none")
    else:
        begin = diffusion.q_sample(schedule, x0, relate(d, noise), d, noise, shift)
    x, divergence = follow_flow(velocity, begin, times, probe)
    end, log_end, log_begin = x / schedule.noise_scale, math.log(schedule.noise_scale), 0.0
    if context.network.reads_noise:
        # Both ends are Gaussians of the text, value by value: e + r(e) is mu + sigma e.
        zero = jnp.zeros_like(x)
        mean, excess = jax.jvp(lambda e: relate(T, e), (zero,), (jnp.ones_like(x),))
        end, log_end = (x - mean) / (1 + excess), jnp.log1p(excess)
        log_begin = log_end
    a, b = schedule.alpha(d)[0], schedule.sigma(d)[0]
    log_q = -0.5 * (1 + math.log(2 * math.pi)) - jnp.log(b) - log_begin
    decoded = denoise(shifted(begin, d), d, d).x0
    decoder = discretised_gaussian_nll(x0, decoded, (b / a) ** 2)
    axes = tuple(range(1, x.ndim))
    log_prior = jax.scipy.stats.norm.logpdf(end) - log_end
    nats = jnp.sum(decoder - log_prior + log_q, axes) - divergence
    return nats / (math.prod(x.shape[1:]) * math.log(2))
