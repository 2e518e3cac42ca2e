"""The context-shifted process (ContextDiff, Yang et al. 2024, section 3).

With r_t = r_phi(x0, c, t) the cross-modal context and k_t its coefficient:

marginal    q(x_t | x0, c) = N(a_t x0 + k_t r_t, b_t^2 I)                                       (2)
posterior   q(x_s | x_t, x0, c) = N(a_s x0 + k_s r_s
                + sqrt(1 - abar_s - sigma^2) / b_t (x_t - a_t x0 - k_t r_t), sigma^2 I),  s < t (3)
            sigma^2 = eta^2 (1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s)                   (4)
targets     e = (x_t - a_t x0) / b_t,  v = a_t e - b_t x0                                       (5)

(3) keeps (2) exact at s for every eta: eta = 1 is DDPM's posterior, eta = 0 is DDIM. e is the
*effective* noise, it contains the shift: so x0 is explicit in every target, and r = 0 is plain
diffusion.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from contextdiff_jax.diffusion.schedule import Index, NoiseSchedule
from contextdiff_jax.runtime.fields import check_choice

Samples = Float[ArrayLike, "B *D"]  # pictures or latents of a batch, jax's or numpy's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Process:
    """The process that a model was trained on."""

    schedule: NoiseSchedule
    prediction_type: str
    shift: str


class Gaussian(NamedTuple):
    """An isotropic Gaussian per sample; `variance` broadcasts against `mean`."""

    mean: Float[Array, "B *D"]
    variance: Float[Array, "..."]


def _quadratic(a: Float[Array, "*B"], variance: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return a * variance / (1 + a)  # a (1 - a), without the cancellation in 1 - a


def _prior(a: Float[Array, "*B"], variance: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return variance / (1 + a)  # 1 - a


def _data_normalization(a: Float[Array, "*B"], variance: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return jnp.where(variance > 0, -a, 0.0)  # k = 0 on clean data (s = -1) for every shift


def _none(a: Float[Array, "*B"], variance: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return jnp.zeros_like(variance)


SHIFTS = {
    "quadratic": _quadratic,
    "prior": _prior,
    "data_normalization": _data_normalization,
    "none": _none,
}


def bcast(coefficient: Float[ArrayLike, "*B"], x: Samples) -> Float[Array, "..."]:
    """Appends axes to a per-sample coefficient (or a scalar) so that it multiplies x."""
    coefficient = jnp.asarray(coefficient)
    return (
        coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))
        if coefficient.ndim
        else coefficient
    )


def shift_coefficient(
    schedule: NoiseSchedule, t: Index, shift: str = "quadratic"
) -> Float[Array, "*B"]:
    """k_t: `quadratic` a(1-a) (ContextDiff), `prior` 1-a and `data_normalization` -a (ShiftDDPM,
    Zhang et al. 2023; only for a context of the text alone), `none` 0. Always 0 at t = -1.

    Raises ValueError for an unknown shift.
    """
    check_choice("context.shift", shift, SHIFTS)
    return SHIFTS[shift](jnp.sqrt(schedule.alpha_bar(t)), schedule.variance(t))


def marginal_mean(
    schedule: NoiseSchedule,
    x0: Samples,
    context: Samples,
    t: Index,
    shift: str = "quadratic",
) -> Float[Array, "B *D"]:
    """a_t x0 + k_t r_t, the mean of (2)."""
    a = bcast(jnp.sqrt(schedule.alpha_bar(t)), x0)
    return a * x0 + bcast(shift_coefficient(schedule, t, shift), x0) * context


def q_sample(
    schedule: NoiseSchedule,
    x0: Samples,
    context: Samples,
    t: Index,
    noise: Samples,
    shift: str = "quadratic",
) -> Float[Array, "B *D"]:
    """x_t from (2), reparameterised by standard normal `noise`."""
    return (
        marginal_mean(schedule, x0, context, t, shift)
        + bcast(jnp.sqrt(schedule.variance(t)), x0) * noise
    )


def q_posterior(
    schedule: NoiseSchedule,
    x0: Samples,
    x_t: Samples,
    context_t: Samples,
    context_s: Samples,
    t: Index,
    s: Index,
    eta: float | Float[Array, ""] = 1.0,
    shift: str = "quadratic",
) -> Gaussian:
    """q(x_s | x_t, x0, c) of (3), (4), for -1 <= s < t and eta in [0, 1].

    `context_t`, `context_s`: r at t and at s. The variance has shape [B, 1, ...] (or is a scalar).
    """
    abar_t, abar_s = schedule.alpha_bar(t), schedule.alpha_bar(s)
    var_t, var_s = schedule.variance(t), schedule.variance(s)
    # 1 - abar_t/abar_s, by whichever difference keeps its digits in float32: near clean data or
    # near noise.
    gap = jnp.where(abar_s > 0.5, (var_t - var_s) / abar_s, 1 - abar_t / abar_s)
    sigma2 = eta**2 * var_s / var_t * gap
    # 1 - abar_s - sigma^2, rearranged into a sum of non-negative terms: nothing cancels, the root
    # is real.
    direction = (1 - eta**2) * var_s + eta**2 * var_s**2 * abar_t / (abar_s * var_t)
    residual = x_t - marginal_mean(schedule, x0, context_t, t, shift)
    mean = (
        marginal_mean(schedule, x0, context_s, s, shift)
        + bcast(jnp.sqrt(direction / var_t), x0) * residual
    )
    return Gaussian(mean, bcast(sigma2, x0))


def _x0_target(x0, e, a, b):
    return x0


def _epsilon_target(x0, e, a, b):
    return e


def _v_target(x0, e, a, b):
    return a * e - b * x0


def _x0_from_x0(output, x_t, a, b):
    return output


def _x0_from_epsilon(output, x_t, a, b):
    # Where a = 0 (zero terminal SNR) e = x_t says nothing of x0; its conditional mean given nothing
    # is 0.
    return jnp.where(a > 0, (x_t - b * output) / jnp.where(a > 0, a, 1.0), 0.0)


def _x0_from_v(output, x_t, a, b):
    return a * x_t - b * output


PREDICTION_TYPES = {
    "x0": (_x0_target, _x0_from_x0),
    "epsilon": (_epsilon_target, _x0_from_epsilon),
    "v": (_v_target, _x0_from_v),
}


def check_prediction_type(prediction_type: str) -> None:
    """Raises ValueError unless `prediction_type` is a name in `PREDICTION_TYPES`."""
    check_choice("diffusion.prediction_type", prediction_type, PREDICTION_TYPES)


def training_target(
    schedule: NoiseSchedule,
    x0: Samples,
    x_t: Samples,
    t: Index,
    prediction_type: str,
) -> Samples:
    """The network's target at t: `x0`, the effective noise `epsilon`, or `v`, (5).

    Raises ValueError for an unknown prediction type.
    """
    check_prediction_type(prediction_type)
    target, _ = PREDICTION_TYPES[prediction_type]
    a, b = bcast(jnp.sqrt(schedule.alpha_bar(t)), x0), bcast(jnp.sqrt(schedule.variance(t)), x0)
    return target(x0, (x_t - a * x0) / b, a, b)


def predict_x0(
    schedule: NoiseSchedule,
    output: Samples,
    x_t: Samples,
    t: Index,
    prediction_type: str,
) -> Samples:
    """x0 from the network's output at t, the inverse of `training_target`. An `epsilon` output at
    an index with abar = 0 carries no x0: the result is 0 there (use `v` or `x0` with zero terminal
    SNR).

    Raises ValueError for an unknown prediction type.
    """
    check_prediction_type(prediction_type)
    _, inverse = PREDICTION_TYPES[prediction_type]
    return inverse(
        output,
        x_t,
        bcast(jnp.sqrt(schedule.alpha_bar(t)), x_t),
        bcast(jnp.sqrt(schedule.variance(t)), x_t),
    )
