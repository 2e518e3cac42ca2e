"""Training objectives: timestep sampling, weights by signal-to-noise ratio, L_T, and the exact
bound.

bound    L = L_T + sum_{t=1}^{T-1} KL_t + L_0,  in bits per dimension                           (7)
KL_t     |mu(x_t, x0, r) - mu(x_t, x0_hat, r_hat)|^2 / (2 sigma_t^2),
             mu and sigma of (3) at eta = 1                                                     (8)
L_0      -log of a Gaussian around x0_hat, integrated over the pixel's 2/255-wide bin
             (Ho et al., eq. 13)                                                                (9)
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from contextdiff_jax.diffusion.paths import Time
from contextdiff_jax.diffusion.process import (
    Samples,
    check_prediction_type,
    marginal_mean,
    q_posterior,
    q_sample,
)
from contextdiff_jax.diffusion.protocols import ContextFn, DenoiseFn
from contextdiff_jax.diffusion.schedule import NoiseSchedule, Schedule, index_of_share
from contextdiff_jax.runtime.fields import check_choice


def snr(schedule: Schedule, t: Time) -> Float[Array, "*B"]:
    """a_t^2 / b_t^2, finite on clean data too: b_t^2 counts as 1e-8 at least."""
    return schedule.alpha_bar(t) / jnp.maximum(schedule.variance(t), 1e-8)


# Each of the SNR, and of |e error|^2 / |error of the network's target|^2: one loss, many scales.


def _uniform(ratio, share, gamma):
    return jnp.ones_like(ratio)


def _min_snr(ratio, share, gamma):
    return gamma / jnp.maximum(ratio, gamma) * share


def _p2(ratio, share, gamma):
    return (1 + ratio) ** -gamma * share


def _epsilon_share(schedule, t, ratio, prediction_type):
    if prediction_type == "data":  # (12): the same motion's error in x0's units
        return ratio
    if prediction_type == "velocity":  # |u error| = |a'b - ab'| / b |M error|, (12)
        (da, db), a, b = schedule.rates(t), schedule.alpha(t), schedule.sigma(t)
        return (a / (da * b - a * db)) ** 2
    share = {"epsilon": 1.0, "x0": ratio, "v": ratio / (1 + ratio)}[prediction_type]
    if prediction_type == "v" and not schedule.variance_preserving:
        share = share / (schedule.alpha_bar(t) + schedule.variance(t))
    return share


WEIGHTINGS = {"uniform": _uniform, "min_snr": _min_snr, "p2": _p2}


def loss_weight(
    schedule: Schedule,
    t: Time,
    prediction_type: str,
    weighting: str = "uniform",
    gamma: float = 5.0,
) -> Float[Array, "*B"]:
    """The weight of the squared error on the target at t: `uniform` 1; `min_snr` min(snr,
    gamma)/snr on epsilon (Hang et al. 2023); `p2` (1 + snr)^-gamma on epsilon (Choi et al. 2022, k
    = 1); both carried over to the same loss on x0, v and velocity. Finite at SNR 0. Raises
    ValueError for an unknown weighting or prediction type.
    """
    check_prediction_type(prediction_type)
    check_choice("diffusion.weighting", weighting, WEIGHTINGS)
    ratio = snr(schedule, t)
    return WEIGHTINGS[weighting](ratio, _epsilon_share(schedule, t, ratio, prediction_type), gamma)


# Each gives shares of the path in [0, 1], 1 the noise.


def _uniform_share(key, batch_size, scale):
    return jax.random.uniform(key, (batch_size,))


def _stratified_share(key, batch_size, scale):
    # One draw in each of B equal strata (VDM, Kingma et al. 2021, app. I.1), in random order.
    u = (jnp.arange(batch_size) + jax.random.uniform(key)) / batch_size
    return jax.random.permutation(jax.random.fold_in(key, 1), u)


def _antithetic_share(key, batch_size, scale):
    u = jax.random.uniform(key, ((batch_size + 1) // 2,))
    return jnp.concatenate([u, 1 - u])[:batch_size]


def _logit_normal_share(key, batch_size, scale):
    # The uniform strata through the quantile function.
    u = _stratified_share(key, batch_size, scale)
    return jax.nn.sigmoid(scale * jax.scipy.stats.norm.ppf(jnp.clip(u, 1e-6, 1 - 1e-6)))


def _mode_share(key, batch_size, scale):
    u = _stratified_share(key, batch_size, scale)
    return 1 - u - scale * (jnp.cos(jnp.pi / 2 * u) ** 2 - 1 + u)


TIMESTEP_SAMPLINGS = {
    "uniform": _uniform_share,
    "stratified": _stratified_share,
    "antithetic": _antithetic_share,
    "logit_normal": _logit_normal_share,
    "mode": _mode_share,
    "independent": _uniform_share,  # the first edition's name of `uniform`
}


def sample_shares(
    key: PRNGKeyArray, batch_size: int, sampling: str = "stratified", scale: float = 1.0
) -> Float[Array, "B"]:
    """Shares of a path in [0, 1], 1 its noise. `uniform`; `stratified`, one in each of B equal
    strata; `antithetic`, u and 1 - u; and from such strata `logit_normal`, the sigmoid of a normal
    draw times `scale`, and `mode`, which at a `scale` above 0 has the middle more often, under 0
    the ends (Esser et al. 2024, eq. 19-20).

    Raises ValueError for an unknown sampling.
    """
    check_choice("diffusion.timestep_sampling", sampling, TIMESTEP_SAMPLINGS)
    return TIMESTEP_SAMPLINGS[sampling](key, batch_size, scale)


def sample_timesteps(
    key: PRNGKeyArray,
    batch_size: int,
    num_timesteps: int,
    sampling: str = "stratified",
    scale: float = 1.0,
) -> Int[Array, "B"]:
    """Indices in 0..T-1 at `sample_shares`. ValueError for an unknown sampling."""
    return index_of_share(sample_shares(key, batch_size, sampling, scale), num_timesteps)


def prior_kl(
    schedule: Schedule,
    x0: Samples,
    context: Samples,
    shift: str = "quadratic",
) -> Float[Array, "B"]:
    """L_T: KL(q(x_T | x0, c) || N(0, I)) in bits/dim at the noisiest time; `context` is r there.
    Its weight in the loss keeps x_T standard normal where k_T is not 0. (On `edm` both variances
    are sigma_max^2.)
    """
    T, scale = jnp.full(x0.shape[:1], schedule.t_max), schedule.noise_scale
    mean = marginal_mean(schedule, x0, context, T, shift) / scale
    variance = schedule.variance(schedule.t_max) / scale**2
    return _bits_per_dim(0.5 * (variance + mean**2 - 1 - jnp.log(variance)))


def _bits_per_dim(nats: Float[Array, "B *D"]) -> Float[Array, "B"]:
    return nats.mean(tuple(range(1, nats.ndim))) / math.log(2)


def discretised_gaussian_nll(
    x0: Samples, mean: Samples, variance: Float[Array, "..."]
) -> Float[Array, "B *D"]:
    """-log of N(mean, variance) integrated over x0's bin; the outermost bins reach to infinity,
    (9).
    """
    inverse_std = jax.lax.rsqrt(variance)
    upper, lower = ((x0 - mean + d / 255) * inverse_std for d in (1, -1))
    # Log of a difference of CDFs through log CDFs, mirrored into the left tail where they keep
    # their digits.
    mirrored = upper + lower > 0
    upper, lower = jnp.where(mirrored, -lower, upper), jnp.where(mirrored, -upper, lower)
    log_upper, log_lower = jax.scipy.stats.norm.logcdf(upper), jax.scipy.stats.norm.logcdf(lower)
    # The difference is bounded away from 0 because the bin has width 2/255; the clip only guards
    # its gradient.
    inner = log_upper + jnp.log(-jnp.expm1(jnp.minimum(log_lower - log_upper, -1e-12)))
    first = jax.scipy.stats.norm.logcdf((x0 - mean + 1 / 255) * inverse_std)
    last = jax.scipy.stats.norm.logcdf(-(x0 - mean - 1 / 255) * inverse_std)
    return -jnp.where(x0 < -0.999, first, jnp.where(x0 > 0.999, last, inner))


def _denoised_at(denoise, x0, context_fn, schedule, key, t, shift):
    r_t, r_s = context_fn(x0, t), context_fn(x0, jnp.maximum(t - 1, 0))
    x_t = q_sample(schedule, x0, r_t, t, jax.random.normal(key, x0.shape, x0.dtype), shift)
    return x_t, r_t, r_s, denoise(x_t, t, t - 1)


def vlb_kl(
    denoise: DenoiseFn,
    x0: Samples,
    context_fn: ContextFn,
    schedule: NoiseSchedule,
    key: PRNGKeyArray,
    t: Int[Array, "B"],
    shift: str = "quadratic",
) -> Float[Array, "B"]:
    """(8) at t in 1..T-1, each sample's own, with one noise draw, in bits/dim."""
    x_t, r_t, r_s, hat = _denoised_at(denoise, x0, context_fn, schedule, key, t, shift)
    true = q_posterior(schedule, x0, x_t, r_t, r_s, t, t - 1, shift=shift)
    model = q_posterior(schedule, hat.x0, x_t, hat.context_t, hat.context_s, t, t - 1, shift=shift)
    return _bits_per_dim((true.mean - model.mean) ** 2 / (2 * true.variance))


def vlb_ends(
    denoise: DenoiseFn,
    x0: Samples,
    context_fn: ContextFn,
    schedule: NoiseSchedule,
    key: PRNGKeyArray,
    shift: str = "quadratic",
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """(L_T, L_0) of (7) in bits/dim; L_0 (9) with one noise draw and the posterior variance of t =
    1 (Nichol & Dhariwal 2021), as DDPM's own is 0 at t = 0.
    """
    t = jnp.zeros(x0.shape[:1], jnp.int32)
    *_, hat = _denoised_at(denoise, x0, context_fn, schedule, key, t, shift)
    decoder_variance = q_posterior(schedule, x0, x0, x0, x0, jnp.int32(1), jnp.int32(0)).variance
    decoder = _bits_per_dim(discretised_gaussian_nll(x0, hat.x0, decoder_variance))
    prior = prior_kl(
        schedule, x0, context_fn(x0, jnp.full_like(t, schedule.num_timesteps - 1)), shift
    )
    return prior, decoder


def vlb(
    denoise: DenoiseFn,
    x0: Samples,
    context_fn: ContextFn,
    schedule: NoiseSchedule,
    key: PRNGKeyArray,
    shift: str = "quadratic",
) -> dict[str, Float[Array, "..."]]:
    """The bound (7) on -log2 p(x0 | c) a dimension, one noise draw for each t; x0 holds pixels in
    {-1, ..., 1}, 256 levels. With a shift, (8) contains the errors of the context too.

    Returns `total` [B], `prior` [B] (L_T), `kl` [T, B] (row 0 is 0: that step is the decoder) and
    `decoder` [B] (L_0).
    """
    batch = x0.shape[:1]

    def row(_, index):
        step_key = jax.random.fold_in(key, index)
        return None, vlb_kl(
            denoise, x0, context_fn, schedule, step_key, jnp.full(batch, index), shift
        )

    _, kl = jax.lax.scan(row, None, jnp.arange(1, schedule.num_timesteps))
    kl = jnp.concatenate([jnp.zeros((1, *batch)), kl])
    prior, decoder = vlb_ends(denoise, x0, context_fn, schedule, jax.random.fold_in(key, 0), shift)
    return {"total": prior + kl.sum(0) + decoder, "prior": prior, "kl": kl, "decoder": decoder}
