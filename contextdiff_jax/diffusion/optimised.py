"""A time grid for one model: the steps whose local errors, as they are measured, sum to the least.

A path through the model's fine trajectory is chosen by dynamic programming (Watson et al. 2021,
"Learning to efficiently sample"; Chen et al. 2024, "On the trajectory regularity", whose local
errors these are): the error of one step of DDIM from each state to the time of each later one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real

from contextdiff_jax.diffusion.process import Samples
from contextdiff_jax.diffusion.protocols import DenoiseFn
from contextdiff_jax.diffusion.schedule import Schedule
from contextdiff_jax.diffusion.solvers import Grid, combine, dpmpp_2m, make_rows, parts_of


def local_errors(
    denoise: DenoiseFn,
    x_T: Samples,
    schedule: Schedule,
    times: Real[ArrayLike, "N"],
    shift: str = "quadratic",
) -> Float[Array, "N N1"]:
    """errors[i, j]: the root mean square by which one step of DDIM from the trajectory at times[i]
    misses it at times[j] (j = N: at clean data); infinite for j <= i.

    The trajectory is that of `dpmpp_2m` over the descending `times`, with one call of `denoise` at
    each. An error counts in x / sqrt(a^2 + b^2 / v), its part in x0 for Gaussian data of the
    trajectory's own variance v at its end. r is taken as it is at times[i].
    """
    grid = Grid.of(schedule, shift, times)
    plan = dpmpp_2m.make_plan(grid)

    def along(carry, inputs):
        x, older = carry
        t, s, rows = inputs
        B = x.shape[:1]
        estimates = (parts_of(denoise(x, jnp.full(B, t), jnp.full(B, s)), shift), *older)
        return (combine(rows, x, estimates), estimates[:2]), (x, estimates[0])

    x_T = jnp.asarray(x_T)
    nothing = (jnp.zeros_like(x_T),) * plan.rows.estimates.shape[-1]
    start = x_T, (nothing, nothing)
    (x0, _), (states, estimates) = jax.lax.scan(along, start, (grid.t, grid.s, plan.rows))
    targets = jnp.concatenate([states[1:], x0[None]])
    scale = jnp.sqrt(schedule.alpha_bar(grid.s) + schedule.variance(grid.s) / jnp.var(x0))

    def errors_from(inputs):
        i, x, estimate = inputs
        steps = grid._replace(t=jnp.full_like(grid.t, grid.t[i]))
        rows, _ = make_rows(steps, (jnp.ones(len(grid.t)),), moves=(0.0, 0.0, 0.0))

        def miss(inputs):
            row, target = inputs
            return jnp.sqrt(jnp.mean((combine(row, x, (estimate,)) - target) ** 2))

        rows = rows._replace(estimates=rows.estimates[:, :1])
        found = jax.lax.map(miss, (rows, targets)) / scale
        return jnp.where(jnp.arange(len(grid.t)) < i, jnp.inf, found)

    found = jax.lax.map(errors_from, (jnp.arange(len(grid.t)), states, estimates))
    return jnp.concatenate([jnp.full_like(found[:, :1], jnp.inf), found], 1)


def optimised_grid(errors: Float[ArrayLike, "N N1"], num_steps: int) -> tuple[int, ...]:
    """Which of N descending times begin the `num_steps` steps, from the first time to clean data,
    whose errors[i, j] (from time i to time j, j = N: clean data) sum to the least.

    Raises ValueError for a number of steps outside 1..N.
    """
    errors = np.asarray(errors, np.float64)
    N = len(errors)
    if not 1 <= num_steps <= N:
        raise ValueError(f"steps={num_steps}: must lie in 1..{N}, the number of candidate times")
    upper = np.triu(np.ones((N, N + 1), bool), 1)
    costs = np.where(upper, errors, np.inf)
    least = costs[:, N]  # from each time to clean data in one step
    following = []
    for _ in range(num_steps - 1):
        through = costs[:, :N] + least  # to each later time, and on from there
        following.append(through.argmin(1))
        least = through.min(1)
    chosen = [0]
    for best in reversed(following):
        chosen.append(int(best[chosen[-1]]))
    return tuple(chosen)
