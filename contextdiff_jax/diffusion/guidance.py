"""The way from networks to denoise functions: estimates of the context, guidance, thresholding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real, Shaped

from contextdiff_jax.diffusion.process import Samples, bcast, motion_data, predict_x0, with_rate
from contextdiff_jax.diffusion.protocols import ContextFn, Denoised, DenoiseFn
from contextdiff_jax.diffusion.schedule import Schedule


@runtime_checkable
class PredictFn(Protocol):
    """`predict(x_t, t)` is a network with its text bound: x0, epsilon, v, velocity; with a context
    head the pair of that and E[r | x_t, c].
    """

    def __call__(
        self, x_t: Float[Array, "B *D"], t: Real[Array, "B"]
    ) -> Float[Array, "B *D"] | tuple[Float[Array, "B *D"], Float[Array, "B *D"]]: ...


def plugin_denoise(
    predict: PredictFn,
    context_fn: ContextFn,
    schedule: Schedule,
    prediction_type: str,
    clip: float | None = None,
) -> DenoiseFn:
    """The paper's estimate: r_hat = r_phi(x0_hat, c, .) at t and at s. `clip` bounds |x0_hat|."""

    def denoise(x_t, t, s):
        x0 = _clip(predict_x0(schedule, predict(x_t, t), x_t, t, prediction_type), clip)
        # k = 0 on clean data, whatever r is: this keeps the network inside the times it knows.
        return Denoised(x0, context_fn(x0, t), context_fn(x0, jnp.maximum(s, schedule.t_min)))

    return denoise


def posterior_mean_denoise(
    predict: PredictFn,
    schedule: Schedule,
    prediction_type: str,
    clip: float | None = None,
    shift: str = "quadratic",
) -> DenoiseFn:
    """Our estimate: `predict` returns (output, E[r | x_t, c]), the second head's regression; r
    doesn't depend on t. With an output of the motion, (12), x0 is what it leaves beside r: an error
    of that estimate then moves x0 and r against each other, and x hardly.
    """

    def denoise(x_t, t, s):
        output, context = predict(x_t, t)
        x0 = predict_x0(schedule, output, x_t, t, prediction_type, context=context, shift=shift)
        return Denoised(_clip(x0, clip), context, context)

    return denoise


def known_context_denoise(
    predict: PredictFn,
    context_fn: Callable[[Array], Array],
    schedule: Schedule,
    prediction_type: str,
    shift: str,
    clip: float | None = None,
) -> DenoiseFn:
    """The way where r needs no estimate: `context_fn(t)` is a context of the text alone, or 0, so
    that x0 stands in every output by itself.
    """

    def denoise(x_t, t, s):
        context, rate = with_rate(context_fn, t) if schedule.continuous else (context_fn(t), None)
        x0 = predict_x0(
            schedule,
            predict(x_t, t),
            x_t,
            t,
            prediction_type,
            context=context,
            context_rate=rate,
            shift=shift,
        )
        return Denoised(_clip(x0, clip), context, context_fn(jnp.maximum(s, schedule.t_min)))

    return denoise


def velocity_denoise(
    predict: PredictFn, schedule: Schedule, prediction_type: str = "velocity"
) -> DenoiseFn:
    """The way without an estimate of r: `predict` returns E[u | x_t, c], the `velocity`, or the
    `data` M that it amounts to.

    The x0 of the result is M of (12), which isn't bounded to the pictures' range, and its contexts
    are 0: M is what moves x along the marginals. So it is for samplers without noise; those with
    noise need E[a x0 + k r], which u doesn't say.
    """

    def denoise(x_t, t, s):
        data = motion_data(schedule, predict(x_t, t), x_t, t, prediction_type)
        return Denoised(data, jnp.zeros_like(data), jnp.zeros_like(data))

    return denoise


def _clip(x0: Float[Array, "B *D"], clip: float | None) -> Float[Array, "B *D"]:
    return x0 if clip is None else jnp.clip(x0, -clip, clip)


def pair(
    first: Shaped[ArrayLike, "B *D"], second: Shaped[ArrayLike, "B *D"]
) -> Shaped[Array, "2*B *D"]:
    """The rows of guidance's two branches as one batch, side by side: an example's two rows stay on
    its device.
    """
    return jnp.stack([first, second], 1).reshape(-1, *first.shape[1:])


def unpair(both: Shaped[Array, "R *D"]) -> tuple[Shaped[Array, "B *D"], Shaped[Array, "B *D"]]:
    """The inverse of `pair`."""
    rows = both.reshape(-1, 2, *both.shape[1:])
    return rows[:, 0], rows[:, 1]


def guide(
    conditional: Denoised,
    unconditional: Denoised,
    guidance_scale: float | Float[ArrayLike, ""],
    rescale: float = 0.0,
) -> Denoised:
    """Classifier-free guidance (Ho & Salimans 2022) of x0 and of both contexts: u + g (c - u).

    `rescale` in [0, 1] mixes in the guided x0 with its standard deviation per sample set back to
    the conditional's (Lin et al. 2023, eq. 15-16). guidance_scale 1 is the conditional branch.
    """
    guided = Denoised(
        *(u + guidance_scale * (c - u) for c, u in zip(conditional, unconditional, strict=True))
    )
    axes = tuple(range(1, guided.x0.ndim))
    std, target = guided.x0.std(axes), conditional.x0.std(axes)
    factor = 1 + rescale * (target / jnp.maximum(std, 1e-8) - 1)
    return guided._replace(x0=bcast(factor, guided.x0) * guided.x0) if rescale else guided


def classifier_free(
    branches: DenoiseFn,
    guidance_scale: float | Float[ArrayLike, ""],
    rescale: float = 0.0,
    join: Callable[[Array, Array], Array] = pair,
    split: Callable[[Array], Sequence[Array]] = unpair,
) -> DenoiseFn:
    """Guidance (`guide`) as a denoise function of B rows. `branches` denoises 2 B: the conditional
    and the unconditional branch of each, as `join` lays them out and `split` takes them apart.
    """

    def denoise(x_t, t, s, *kept):
        both = branches(*(join(a, a) for a in (x_t, t, s)), *kept)
        conditional, unconditional = (
            Denoised(*part) for part in zip(*map(split, both), strict=True)
        )
        return guide(conditional, unconditional, guidance_scale, rescale)

    return denoise


def dynamic_threshold(x0: Samples, percentile: float = 99.5) -> Float[Array, "B *D"]:
    """Imagen's dynamic thresholding (Saharia et al. 2022, section 2.3): with s the percentile (in
    0..100) of |x0| per sample and s >= 1, x0 is clipped to [-s, s] and divided by s.
    """
    s = jnp.percentile(jnp.abs(x0).reshape(x0.shape[0], -1), percentile, axis=-1)
    s = bcast(jnp.maximum(s, 1.0), x0)
    return jnp.clip(x0, -s, s) / s
