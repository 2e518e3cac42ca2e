"""The context-shifted process (ContextDiff, Yang et al. 2024, section 3), on any Gaussian path.

With r_t = r_phi(x0, c, t) the cross-modal context, k_t its coefficient, a_t and b_t the schedule's:

marginal    q(x_t | x0, c) = N(a_t x0 + k_t r_t, b_t^2 I)                                       (2)
posterior   q(x_s | x_t, x0, c) = N(a_s x0 + k_s r_s
                + sqrt(b_s^2 - sigma^2) / b_t (x_t - a_t x0 - k_t r_t), sigma^2 I),  s < t      (3)
            sigma^2 = eta^2 b_s^2 / b_t^2 (b_t^2 - a_t^2 b_s^2 / a_s^2)                         (4)
targets     e = (x_t - a_t x0) / b_t,  v = a_t e - b_t x0                                       (5)
velocity    u = a' x0 + k' r + k dr/dt + b' (x_t - a_t x0 - k_t r_t) / b_t                     (11)

(3) keeps (2) exact at s for every eta: eta = 1 is DDPM's posterior, eta = 0 is DDIM; on `flow`
eta = 0 and r = 0 are Euler's step. e is the *effective* noise, it contains the shift: so x0 is
explicit in every target of (5), and r = 0 is plain diffusion.

u is the derivative of x_t at fixed x0 and noise, so E[u | x_t, c] moves the marginals (2) with no
estimate of r. What is the least-squares answer to u gives the data prediction M of the same motion:

M = (b u - b' x_t) / (a' b - a b'),  d(x / b) = M d(a / b)                                     (12)
M = E[x0 | x_t] + rho E[r | x_t] + (k / b) / (a / b)' E[dr/dt | x_t],  rho = (k / b)' / (a / b)'
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from contextdiff_jax.diffusion.paths import Time
from contextdiff_jax.diffusion.schedule import Schedule
from contextdiff_jax.runtime.fields import check_choice

Samples = Float[ArrayLike, "B *D"]  # pictures or latents of a batch, jax's or numpy's


# What r reads where the denoiser's caption is hidden.
CAPTIONS = ("true", "dropped")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Process:
    """The process that a model was trained on.

    `estimates_context`: whether its denoise function has an estimate of r. One of the motion alone
    (`velocity_denoise`) has none: it is for sampling without noise. `caption`: where the denoiser
    reads the empty caption, r reads the `true` one, as the forward process of a picture with a
    caption has it, or with `dropped` the empty one, too: then the denoiser without a caption is
    that of a process without one.
    """

    schedule: Schedule
    prediction_type: str
    shift: str
    estimates_context: bool = True
    caption: str = "true"


class Gaussian(NamedTuple):
    """An isotropic Gaussian per sample; `variance` broadcasts against `mean`."""

    mean: Float[Array, "B *D"]
    variance: Float[Array, "..."]


# Each of a and of `rest`, 1 - a^2 to full precision.


def _quadratic(a: Float[Array, "*B"], rest: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return a * rest / (1 + a)  # a (1 - a), without the cancellation in 1 - a


def _prior(a: Float[Array, "*B"], rest: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return rest / (1 + a)  # 1 - a


def _data_normalization(a: Float[Array, "*B"], rest: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return -a


def _constant(a: Float[Array, "*B"], rest: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return jnp.ones_like(rest)


def _none(a: Float[Array, "*B"], rest: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return jnp.zeros_like(rest)


SHIFTS = {
    "quadratic": _quadratic,
    "prior": _prior,
    "data_normalization": _data_normalization,
    "constant": _constant,
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


def shift_coefficient(schedule: Schedule, t: Time, shift: str = "quadratic") -> Float[Array, "*B"]:
    """k_t: `quadratic` a(1-a) (ContextDiff), `prior` 1-a and `data_normalization` -a (ShiftDDPM,
    Zhang et al. 2023; only for a context of the text alone), `constant` 1 (for a context that moves
    from one end of the path to the other by itself), `none` 0. Always 0 on clean data.

    Raises ValueError for an unknown shift.
    """
    check_choice("context.shift", shift, SHIFTS)
    k = SHIFTS[shift](schedule.alpha(t), schedule.rest(t))
    return jnp.where(schedule.variance(t) > 0, k, 0.0)


def shift_rate(schedule: Schedule, t: Time, shift: str = "quadratic") -> Float[Array, "*B"]:
    """k', the derivative of k_t in the parameter of `schedule.rates`, for t > 0.

    Raises ValueError for an unknown shift.
    """
    check_choice("context.shift", shift, SHIFTS)
    a, (da, _) = schedule.alpha(t), schedule.rates(t)
    return jax.jvp(SHIFTS[shift], (a, schedule.rest(t)), (da, -2 * a * da))[1]


def drift_coefficient(schedule: Schedule, t: Time, shift: str = "quadratic") -> Float[Array, "*B"]:
    """rho of (12), r's coefficient in M: on variance-preserving schedules (1 - a) (1 - a - a^2)
    for `quadratic`, on `flow` (1 - a)^2.

    Raises ValueError for an unknown shift.
    """
    (da, db), k = schedule.rates(t), shift_coefficient(schedule, t, shift)
    a, b = schedule.alpha(t), schedule.sigma(t)
    return (shift_rate(schedule, t, shift) * b - k * db) / (da * b - a * db)


def marginal_mean(
    schedule: Schedule,
    x0: Samples,
    context: Samples,
    t: Time,
    shift: str = "quadratic",
) -> Float[Array, "B *D"]:
    """a_t x0 + k_t r_t, the mean of (2)."""
    a = bcast(schedule.alpha(t), x0)
    return a * x0 + bcast(shift_coefficient(schedule, t, shift), x0) * context


def q_sample(
    schedule: Schedule,
    x0: Samples,
    context: Samples,
    t: Time,
    noise: Samples,
    shift: str = "quadratic",
) -> Float[Array, "B *D"]:
    """x_t from (2), reparameterised by standard normal `noise`."""
    return marginal_mean(schedule, x0, context, t, shift) + bcast(schedule.sigma(t), x0) * noise


def posterior_scales(
    schedule: Schedule, t: Time, s: Time, eta: float | Float[Array, ""]
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """The residual's factor in the mean (3), and sigma^2, (4)."""
    abar_t, abar_s = schedule.alpha_bar(t), schedule.alpha_bar(s)
    var_t, var_s = schedule.variance(t), schedule.variance(s)
    sigma2 = eta**2 * var_s / var_t * schedule.transition_variance(t, s)
    # b_s^2 - sigma^2, rearranged into a sum of non-negative terms: nothing cancels, the root is
    # real.
    direction = (1 - eta**2) * var_s + eta**2 * var_s**2 * abar_t / (abar_s * var_t)
    return jnp.sqrt(direction / var_t), sigma2


def q_posterior(
    schedule: Schedule,
    x0: Samples,
    x_t: Samples,
    context_t: Samples,
    context_s: Samples,
    t: Time,
    s: Time,
    eta: float | Float[Array, ""] = 1.0,
    shift: str = "quadratic",
) -> Gaussian:
    """q(x_s | x_t, x0, c) of (3), (4), for s < t and eta in [0, 1].

    `context_t`, `context_s`: r at t and at s. The variance has shape [B, 1, ...] (or is a scalar).
    """
    keep, sigma2 = posterior_scales(schedule, t, s, eta)
    residual = x_t - marginal_mean(schedule, x0, context_t, t, shift)
    mean = marginal_mean(schedule, x0, context_s, s, shift) + bcast(keep, x0) * residual
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
    return a * x_t - b * output  # (a^2 + b^2) x0


# Those that x0 is explicit in, whatever r is.
PREDICTION_TYPES = {
    "x0": (_x0_target, _x0_from_x0),
    "epsilon": (_epsilon_target, _x0_from_epsilon),
    "v": (_v_target, _x0_from_v),
}
# Those that r is in: they say how x moves, and x0 only together with r.
MOTIONS = ("velocity", "data")
TARGETS = (*PREDICTION_TYPES, *MOTIONS)


def check_prediction_type(prediction_type: str) -> None:
    """Raises ValueError unless `prediction_type` is a name in `TARGETS`."""
    check_choice("diffusion.prediction_type", prediction_type, TARGETS)


def _needs_context(prediction_type: str, context, shift: str) -> None:
    if context is None and shift != "none":
        raise ValueError(
            f"prediction_type={prediction_type!r}: needs context= under context.shift={shift!r}; "
            "without a context shift='none'"
        )


def training_target(
    schedule: Schedule,
    x0: Samples,
    x_t: Samples,
    t: Time,
    prediction_type: str,
    *,
    context: Samples | None = None,
    context_rate: Samples | None = None,
    shift: str = "quadratic",
) -> Samples:
    """The network's target at t: `x0`, the effective noise `epsilon`, or `v`, (5); or `velocity`,
    (11), or the `data` M of (12) that it amounts to, which need `context`, r at t, unless shift is
    `none`.

    `context_rate` is dr/dt (None: r doesn't depend on t). (11)'s derivatives are in the schedule's
    own parameter: t on a path; on a discrete schedule the angle whose cosine is a_t, so that
    without a context `velocity` is `v` there.

    Raises ValueError for an unknown prediction type, or a velocity without its context.
    """
    check_prediction_type(prediction_type)
    a, b = bcast(schedule.alpha(t), x0), bcast(schedule.sigma(t), x0)
    if prediction_type not in MOTIONS:
        target, _ = PREDICTION_TYPES[prediction_type]
        return target(x0, (x_t - a * x0) / b, a, b)
    _needs_context(prediction_type, context, shift)
    if prediction_type == "data":
        return x0 if context is None else x0 + _carried(schedule, context, context_rate, t, shift)
    da, db = (bcast(rate, x0) for rate in schedule.rates(t))
    if context is None:
        return da * x0 + db / b * (x_t - a * x0)
    k, dk = (bcast(f(schedule, t, shift), x0) for f in (shift_coefficient, shift_rate))
    moved = 0.0 if context_rate is None else k * context_rate
    return da * x0 + dk * context + moved + db / b * (x_t - a * x0 - k * context)


def predict_x0(
    schedule: Schedule,
    output: Samples,
    x_t: Samples,
    t: Time,
    prediction_type: str,
    *,
    context: Samples | None = None,
    context_rate: Samples | None = None,
    shift: str = "quadratic",
) -> Samples:
    """x0 from the network's output at t, the inverse of `training_target`. An `epsilon` output
    where a = 0 carries no x0: the result is 0 there (use `v` or `x0` with zero terminal SNR).
    `velocity` and `data` give x0 with r alone; `motion_data` gives what solvers need of them
    without.

    Raises ValueError for an unknown prediction type, or a velocity without its context.
    """
    check_prediction_type(prediction_type)
    a, b = bcast(schedule.alpha(t), x_t), bcast(schedule.sigma(t), x_t)
    if prediction_type not in MOTIONS:
        _, inverse = PREDICTION_TYPES[prediction_type]
        x0 = inverse(output, x_t, a, b)
        scaled = prediction_type == "v" and not schedule.variance_preserving
        return x0 / (a**2 + b**2) if scaled else x0
    _needs_context(prediction_type, context, shift)
    data = motion_data(schedule, output, x_t, t, prediction_type)
    if context is None:
        return data
    return data - _carried(schedule, context, context_rate, t, shift)


def _carried(schedule, context, context_rate, t, shift):
    """M - x0, the part of r in (12)."""
    carried = bcast(drift_coefficient(schedule, t, shift), context) * context
    if context_rate is None:
        return carried
    a, b = schedule.alpha(t), schedule.sigma(t)
    (da, db), k = schedule.rates(t), shift_coefficient(schedule, t, shift)
    return carried + bcast(k * b / (da * b - a * db), context) * context_rate


def velocity_data(
    schedule: Schedule, velocity: Samples, x_t: Samples, t: Time
) -> Float[Array, "B *D"]:
    """M of (12), the data prediction that moves x as `velocity` does."""
    da, db = (bcast(rate, x_t) for rate in schedule.rates(t))
    a, b = bcast(schedule.alpha(t), x_t), bcast(schedule.sigma(t), x_t)
    return (b * velocity - db * x_t) / (da * b - a * db)


def with_rate(
    context_fn: Callable[[Array], Array], t: Float[Array, "B"]
) -> tuple[Float[Array, "B *D"], Float[Array, "B *D"]]:
    """(r, dr/dt) of r = context_fn(t), each sample by its own t.

    By the transpose of the derivative that goes backwards: layers with a gradient of their own have
    no other, and `jax.jvp` refuses them.
    """
    r, pull = jax.vjp(context_fn, t)
    push = jax.linear_transpose(lambda cotangent: pull(cotangent)[0], r)
    return r, push(jnp.ones_like(t))[0]


def motion_data(
    schedule: Schedule, output: Samples, x_t: Samples, t: Time, prediction_type: str
) -> Float[Array, "B *D"]:
    """M of (12) from a `velocity`, or from a `data` output, which is M."""
    return output if prediction_type == "data" else velocity_data(schedule, output, x_t, t)
