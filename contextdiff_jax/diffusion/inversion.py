"""Inversion: from clean data to the noise that a deterministic sampler leads back from.

The motion (12) goes both ways, so every solver of `solvers.py` on *ascending* times is an inversion
of its own order: the explicit one. Its steps take their estimates at other points than sampling
will, so the way back misses the data by the solver's error. The exact one solves for the states
that the sampler itself goes through:

x_s = G(x_t, h),   x_t <- x_t + (x_s - G(x_t, h))                                             (6')

from the clean end up, step by step, G one step of the sampler and h the estimates of the noisier
steps that a multistep solver remembers. h isn't known on the way up: it is that of the trajectory
found last, and the whole is repeated until the trajectory stays. One pass is enough without h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real

from contextdiff_jax.diffusion.process import Samples, bcast, marginal_mean, q_posterior
from contextdiff_jax.diffusion.protocols import DenoiseFn
from contextdiff_jax.diffusion.samplers import SAMPLERS, get_sampler
from contextdiff_jax.diffusion.schedule import Schedule
from contextdiff_jax.diffusion.solvers import Grid, Plan, combine, parts_of, run_plan


def invert(
    sampler: str,
    denoise: DenoiseFn,
    x0: Samples,
    schedule: Schedule,
    timesteps: Real[ArrayLike, "S"],
    shift: str = "quadratic",
    *,
    iterations: int = 0,
    passes: int = 20,
    tolerance: float = 1e-4,
) -> Float[Array, "B *D"]:
    """From clean data to x at the last of the *ascending* `timesteps`, by that deterministic
    sampler: explicit, or, with `iterations` > 0, exact to `tolerance`, by up to that many calls a
    step and, for a solver with a memory, that many `passes` over the trajectory.

    The picture is read as a sample at index 0 (a path's `t_min`), as in `ddim_invert`: the sampler
    leads back with `end` (`ddim`: `next_timesteps`) there.

    Raises ValueError for a sampler that has noise or isn't made by `solvers.linear`.
    """
    if sampler == "ddim":
        options = dict(iterations=iterations, tolerance=tolerance)
        return ddim_invert(denoise, x0, schedule, timesteps, shift, **options)
    make_plan = getattr(get_sampler(sampler), "make_plan", None)
    if make_plan is None:
        able = ", ".join(name for name, run in SAMPLERS.items() if hasattr(run, "make_plan"))
        raise ValueError(f"sampler={sampler!r}: can't be inverted; ddim or one of {able}")
    timesteps = jnp.asarray(timesteps)
    up = jnp.concatenate([jnp.full_like(timesteps[:1], schedule.t_min), timesteps])
    plan = make_plan(Grid.of(schedule, shift, up[:-1], up[-1]))
    if plan.noise is not None:
        raise ValueError(f"sampler={sampler!r}: adds noise; it has no inversion")
    if not iterations:
        return run_plan(plan, denoise, x0, schedule, None, shift, None, None)
    down = up[::-1]
    plan = make_plan(Grid.of(schedule, shift, down[:-1], down[-1]))
    _, path = ddim_invert(denoise, x0, schedule, timesteps, shift, keep=True)
    states = _Trajectory(plan, denoise, shift, iterations, tolerance, jnp.asarray(x0))
    return states.solve(path[::-1], passes)


class _Trajectory(NamedTuple):
    """The states that a plan goes through to `last`, to be found from there up."""

    plan: Plan
    denoise: DenoiseFn
    shift: str
    iterations: int
    tolerance: float
    last: Array

    def solve(self, path: Array, passes: int) -> Array:
        """The first state. `path`: guesses at the grid's times, the noisiest first."""
        if self.plan.stages > 1:
            return self._pairs(path)

        def unfinished(carry):
            i, _, change = carry
            return (i < passes) & (change > self.tolerance)

        def improve(carry):
            i, path, _ = carry
            new = self._pass(path)
            return i + 1, new, jnp.mean(jnp.abs(new[0] - path[0]))

        return jax.lax.while_loop(unfinished, improve, (0, path, jnp.inf))[1][0]

    def _parts(self, x: Array, t: Array, s: Array) -> tuple[Array, ...]:
        B = x.shape[:1]
        return parts_of(self.denoise(x, jnp.full(B, t), jnp.full(B, s)), self.shift)

    def _search(self, step: Callable[[Array], Array], to: Array, guess: Array) -> Array:
        return _least_residual(lambda x: to - step(x), guess, self.iterations, self.tolerance)

    def _nothing(self) -> tuple[Array, ...]:
        return (jnp.zeros_like(self.last),) * self.plan.rows.estimates.shape[-1]

    def _pairs(self, path: Array) -> Array:
        """Steps of two calls each, which remember nothing, and one or two at the end of one."""
        calls = self.plan.t, self.plan.s, self.plan.rows, self.plan.fresh
        pairs, nothing = (len(self.plan.t) - 1) // 2, self._nothing()
        times = 2 if len(path) == len(self.plan.t) else 1  # of the grid that a pair spans
        first, second = (jax.tree.map(lambda a, k=k: a[k : 2 * pairs : 2], calls) for k in (0, 1))

        def one(y, call):
            t, s, rows, _ = call
            estimate = self._parts(y, t, s)
            return combine(rows, y, (estimate, nothing, nothing)), estimate

        def single(to, inputs):
            call, guess = inputs
            return self._search(lambda y: one(y, call)[0], to, guess), None

        def double(to, inputs):
            call, (t, s, rows, fresh), guess = inputs

            def step(y):
                x, earlier = one(y, call)
                estimates = self._parts(x, t, s), earlier, nothing
                return combine(rows, jnp.where(fresh, x, y), estimates)

            return self._search(step, to, guess), None

        rest = jax.tree.map(lambda a: a[2 * pairs :], calls), path[times * pairs :]
        x, _ = jax.lax.scan(single, self.last, rest, reverse=True)
        return jax.lax.scan(
            double, x, (first, second, path[: times * pairs : times]), reverse=True
        )[0]

    def _pass(self, path: Array) -> Array:
        """The trajectory again, with the memory that the one before has. `path`: base points."""
        plan, nothing = self.plan, self._nothing()
        calls = plan.t, plan.s, plan.rows

        def along(carry, inputs):  # where the estimates are, and what they are
            x, older = carry
            base, call = inputs
            if plan.base is None:
                x = base
            estimates = (self._parts(x, *call[:2]), *older)
            return (combine(call[2], base, estimates), estimates[:2]), (x, estimates)

        start = path[0], (nothing, nothing)
        _, (points, memory) = jax.lax.scan(along, start, (path, calls))
        if plan.base is None:

            def solve(to, inputs):
                (t, s, rows), guess, (_, *older) = inputs
                y = self._search(
                    lambda y: combine(rows, y, (self._parts(y, t, s), *older)), to, guess
                )
                return y, y

            return jax.lax.scan(solve, self.last, (calls, path, memory), reverse=True)[1]
        return self._corrected(path, points, memory)

    def _corrected(self, path: Array, points: Array, memory: tuple) -> Array:
        """The same where a step's end is corrected by the estimate there: M moves with its base."""
        calls = self.plan.t, self.plan.s, self.plan.rows

        def moved(y, inputs):
            (t, s, rows), guess, point, (_, *older) = inputs
            own = self._parts(point + y - guess, t, s)
            return own, combine(rows, y, (own, *older))

        def solve(to, inputs):
            inputs, (t, s, base) = inputs

            def step(y):
                own, x = moved(y, inputs)
                return combine(base, y, (self._parts(x, t, s), own, inputs[3][1]))

            y = self._search(step, to, inputs[1])
            return y, y

        inputs = calls, path, points, memory
        final = jax.tree.map(lambda a: a[-1], inputs)
        y = self._search(lambda y: moved(y, final)[1], self.last, final[1])
        before = jax.tree.map(lambda a: a[:-1], inputs)
        after = jax.tree.map(lambda a: a[1:], (*calls[:2], self.plan.base))
        _, new = jax.lax.scan(solve, y, (before, after), reverse=True)
        return jnp.concatenate([new, y[None]])


def ddim_invert(
    denoise: DenoiseFn,
    x0: Samples,
    schedule: Schedule,
    timesteps: Real[ArrayLike, "S"],
    shift: str = "quadratic",
    *,
    iterations: int = 0,
    tolerance: float = 1e-4,
    keep: bool = False,
) -> Float[Array, "B *D"] | tuple[Float[Array, "B *D"], Float[Array, "S B *D"]]:
    """DDIM backwards, from clean data to x at the last of the *ascending* `timesteps`:

    x_t = a_t x0_hat + k_t r_t + b_t / b_s (x_s - a_s x0_hat - k_s r_s),                        (6)
    x0_hat and r_hat from (x_s, s).

    The first move starts on clean data, where b_s = 0 and the direction is 0/0: the picture is read
    as a sample at index 0 (a path's `t_min`), the least noisy one that the network knows.

    (6) is exact only for x0_hat and r_hat of (x_t, t), which sampling will use. `iterations` > 0
    solves for that x_t, from (6) on, up to that many steps of

    x_t <- x_t + (x_s - G(x_t)),   G: one step of DDIM from t to s,                            (6')

    until the mean of |x_s - G(x_t)| is below `tolerance`. Why not (6) with x0_hat(x_t) again and
    again (Pan et al. 2023): that map's slope is b_t / b_s - 1 times the denoiser's, above 1 in the
    first moves; that of (6') is 1 - b_s / b_t minus a share of the denoiser's, inside (-1, 1)
    wherever the denoiser's lies in [0, 1]. Where it doesn't, (6') may run away: the x_t of the
    smallest error is taken. With `keep` also x at each of the timesteps. The sampler that leads
    back ends at index 0, not at -1.
    """
    timesteps = jnp.asarray(timesteps)

    def explicit(x, s, t):
        denoised = denoise(x, s, t)
        direction = bcast(jnp.sqrt(schedule.variance(t) / schedule.variance(s)), x)
        residual = x - marginal_mean(schedule, denoised.x0, denoised.context_t, s, shift)
        return (
            marginal_mean(schedule, denoised.x0, denoised.context_s, t, shift)
            + direction * residual
        )

    def back(x, t, s):
        out = denoise(x, t, s)
        return q_posterior(schedule, out.x0, x, out.context_t, out.context_s, t, s, 0.0, shift).mean

    def step(x, inputs):
        s, t = (jnp.full(x.shape[:1], index) for index in inputs)
        x_t = explicit(x, s, t)
        if iterations:
            x_t = _least_residual(lambda x_t: x - back(x_t, t, s), x_t, iterations, tolerance)
        return x_t, x_t if keep else None

    starts = jnp.concatenate([jnp.full_like(timesteps[:1], schedule.t_min), timesteps[:-1]])
    last, path = jax.lax.scan(step, x0, (starts, timesteps))
    return (last, path) if keep else last


def _least_residual(
    residual: Callable[[Array], Array], x: Array, iterations: int, tolerance: float
) -> Array:
    """x <- x + residual(x), up to `iterations` times, until the mean of |residual(x)| is below
    `tolerance`; of all x the one where it is smallest, which isn't the last where this runs away.
    """

    def tried(x):
        error = residual(x)
        return x, error, jnp.mean(jnp.abs(error))

    def unfinished(carry):
        i, (_, _, size), _ = carry
        return (i < iterations) & (size > tolerance)  # NaN is not

    def improve(carry):
        i, (x, error, _), (best, least) = carry
        x, error, size = tried(x + error)
        return (
            i + 1,
            (x, error, size),
            (jnp.where(size < least, x, best), jnp.where(size < least, size, least)),
        )

    first = tried(x)
    return jax.lax.while_loop(unfinished, improve, (0, first, (x, first[2])))[2][0]
