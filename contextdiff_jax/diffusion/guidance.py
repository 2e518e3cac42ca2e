"""The way from networks to denoise functions: estimates of the context, guidance, thresholding.

A wrapper is a function from denoise functions to one. They compose:

    branches = classifier_free(branches, 4.0)               of 2 B rows to B
    denoise = within(branches, conditional, schedule, (0.2, 0.8))
    denoise = bounded(scale_context(denoise, 0.9), percentile=99.5)

Guidance is linear in its branches, with weights that sum to 1, and the same for x0 and for both
contexts: so a x0 + k r, which is what the score of the shifted process knows, is guided as x0 is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real, Shaped

from contextdiff_jax.diffusion.process import Samples, bcast, motion_data, predict_x0, with_rate
from contextdiff_jax.diffusion.protocols import ContextFn, Denoised, DenoiseFn
from contextdiff_jax.diffusion.schedule import Schedule

ALWAYS = (0.0, 1.0)  # the interval of `within` that leaves no step out


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


def interleave(*branches: Shaped[ArrayLike, "B *D"]) -> Shaped[Array, "R *D"]:
    """The rows of guidance's branches as one batch, side by side: an example's rows stay on its
    device.
    """
    return jnp.stack(branches, 1).reshape(-1, *branches[0].shape[1:])


def separate(rows: Shaped[Array, "R *D"], count: int) -> tuple[Shaped[Array, "B *D"], ...]:
    """The inverse of `interleave` of `count` branches."""
    rows = rows.reshape(-1, count, *rows.shape[1:])
    return tuple(rows[:, i] for i in range(count))


def pair(
    first: Shaped[ArrayLike, "B *D"], second: Shaped[ArrayLike, "B *D"]
) -> Shaped[Array, "2*B *D"]:
    """`interleave` of guidance's usual two."""
    return interleave(first, second)


def unpair(both: Shaped[Array, "R *D"]) -> tuple[Shaped[Array, "B *D"], Shaped[Array, "B *D"]]:
    """The inverse of `pair`."""
    return separate(both, 2)


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
    return rescale_to(conditional, guided, rescale)


def rescale_to(reference: Denoised, guided: Denoised, rescale: float) -> Denoised:
    """`guided`, mixed with itself at the standard deviation of the reference's x0 (see `guide`)."""
    if not rescale:
        return guided
    axes = tuple(range(1, guided.x0.ndim))
    std, target = guided.x0.std(axes), reference.x0.std(axes)
    factor = 1 + rescale * (target / jnp.maximum(std, 1e-8) - 1)
    return guided._replace(x0=bcast(factor, guided.x0) * guided.x0)


def turn_away(
    conditional: Denoised, unconditional: Denoised, negative: Denoised, weight: float
) -> Denoised:
    """The conditional branch, turned away from a negative text (Perp-Neg, Armandpour et al.
    2023): c - w (d - <d, e> / <e, e> e), with d = n - u and e = c - u.

    What the negative text has in common with the prompt stays. The products are of x0, per sample.
    """
    prompt, away = conditional.x0 - unconditional.x0, negative.x0 - unconditional.x0
    axes = tuple(range(1, prompt.ndim))
    along = (away * prompt).sum(axes) / jnp.maximum((prompt**2).sum(axes), 1e-12)
    turned = (
        c - weight * ((n - u) - bcast(along, c) * (c - u))
        for c, u, n in zip(conditional, unconditional, negative, strict=True)
    )
    return Denoised(*turned)


def _combined(
    branches: DenoiseFn,
    combine: Callable[..., Denoised],
    count: int,
    join: Callable[..., Array],
    split: Callable[[Array], Sequence[Array]],
) -> DenoiseFn:
    """`combine` of the `count` branches of each row: `branches` denoises them as one batch."""

    def denoise(x_t, t, s, *kept):
        every = branches(*(join(*[a] * count) for a in (x_t, t, s)), *kept)
        return combine(*(Denoised(*part) for part in zip(*map(split, every), strict=True)))

    return denoise


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

    def combine(conditional, unconditional):
        return guide(conditional, unconditional, guidance_scale, rescale)

    return _combined(branches, combine, 2, join, split)


def perpendicular_negative(
    branches: DenoiseFn,
    guidance_scale: float | Float[ArrayLike, ""],
    rescale: float = 0.0,
    weight: float = 1.0,
    join: Callable[..., Array] = interleave,
    split: Callable[[Array], Sequence[Array]] = lambda rows: separate(rows, 3),
) -> DenoiseFn:
    """Guidance towards the prompt and away from a negative text (`turn_away`). `branches` denoises
    3 B rows: those of the prompt, of the empty and of the negative text.
    """

    def combine(conditional, unconditional, negative):
        turned = turn_away(conditional, unconditional, negative, weight)
        guided = guide(turned, unconditional, guidance_scale)
        return rescale_to(conditional, guided, rescale)

    return _combined(branches, combine, 3, join, split)


def autoguided(
    denoise: DenoiseFn,
    weaker: DenoiseFn,
    guidance_scale: float | Float[ArrayLike, ""],
    rescale: float = 0.0,
) -> DenoiseFn:
    """Guidance (`guide`) by a weaker model of the same text (autoguidance, Karras et al. 2024): a
    smaller one, or one of fewer steps, of the same process. What was kept is a pair, one for each.
    """

    def guided(x_t, t, s, *kept):
        strong = denoise(x_t, t, s, *(one[0] for one in kept))
        weak = weaker(x_t, t, s, *(one[1] for one in kept))
        return guide(strong, weak, guidance_scale, rescale)

    return guided


def noise_share(schedule: Schedule, t: Real[ArrayLike, "*B"]) -> Float[Array, "*B"]:
    """b / (a + b), from 0 for clean data to 1 for noise: t itself on `flow`, sigma / (1 + sigma)
    where sigma = b / a is the noise on data of scale 1. The same on every schedule.
    """
    a, b = schedule.alpha(t), schedule.sigma(t)
    return b / (a + b)


def within(
    denoise: DenoiseFn, outside: DenoiseFn, schedule: Schedule, interval: tuple[float, float]
) -> DenoiseFn:
    """`denoise` where the share of noise (`noise_share`) is in `interval`, above its first and up
    to its second number; `outside` elsewhere. Guidance in an interval alone (Kynkäänniemi et al.
    2024) is this of the guided function and of the conditional one.

    Only the one that is needed is computed, so t has to be the same for the whole batch, as it is
    in every sampler; under `vmap` each of the mapped ones has its own.
    """
    if interval == ALWAYS:
        return denoise
    low, high = interval

    def chosen(x_t, t, s, *kept):
        share = noise_share(schedule, t[0])
        inside = (low < share) & (share <= high)
        return jax.lax.cond(inside, denoise, outside, x_t, t, s, *kept)

    return chosen


def scale_context(denoise: DenoiseFn, factor: float | Float[ArrayLike, ""]) -> DenoiseFn:
    """`denoise` with an estimate of r `factor` times as large, at t and at s."""

    def scaled(x_t, t, s, *kept):
        out = denoise(x_t, t, s, *kept)
        return Denoised(out.x0, factor * out.context_t, factor * out.context_s)

    return scaled


def bounded(denoise: DenoiseFn, percentile: float = 0.0) -> DenoiseFn:
    """`denoise` with x0 bounded to the pictures' range [-1, 1]: by clipping, or by dynamic
    thresholding (`dynamic_threshold`) at that percentile.
    """

    def inside(x_t, t, s, *kept):
        out = denoise(x_t, t, s, *kept)
        x0 = dynamic_threshold(out.x0, percentile) if percentile else jnp.clip(out.x0, -1, 1)
        return out._replace(x0=x0)

    return inside


def dynamic_threshold(x0: Samples, percentile: float = 99.5) -> Float[Array, "B *D"]:
    """Imagen's dynamic thresholding (Saharia et al. 2022, section 2.3): with s the percentile (in
    0..100) of |x0| per sample and s >= 1, x0 is clipped to [-s, s] and divided by s.
    """
    s = jnp.percentile(jnp.abs(x0).reshape(x0.shape[0], -1), percentile, axis=-1)
    s = bcast(jnp.maximum(s, 1.0), x0)
    return jnp.clip(x0, -s, s) / s
