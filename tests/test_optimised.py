"""The grid of the least local errors: against all grids, and against other grids of its length."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_inversion import SCHEDULES, mixture

from contextdiff_jax import diffusion


def test_the_grid_of_least_error_is_the_best_of_all():
    errors = np.random.default_rng(0).random((7, 8))
    for steps in range(1, 8):
        sums = {}
        for middle in itertools.combinations(range(1, 7), steps - 1):
            path = (0, *middle, 7)
            sums[path[:-1]] = sum(errors[i, j] for i, j in itertools.pairwise(path))
        assert diffusion.optimised_grid(errors, steps) == min(sums, key=sums.get)
    for steps in (0, 8):
        with pytest.raises(ValueError, match=f"steps={steps}: must lie in 1..7"):
            diffusion.optimised_grid(errors, steps)


def trajectory(schedule, denoise, x, times):
    """The states of DPM-Solver++(2M), a loop of its equation (16), and the end."""
    states, before = [x], None
    at = [*map(jnp.float32, times), jnp.float32(schedule.clean)]
    l = [float(jnp.log(schedule.alpha(t) / schedule.sigma(t))) for t in at[:-1]]  # noqa: E741
    for n, (t, s) in enumerate(itertools.pairwise(at)):
        out = denoise(x, jnp.full(len(x), t), jnp.full(len(x), s))
        w = 0.0
        if 0 < n < len(times) - 1:
            w = 0.5 * (l[n + 1] - l[n]) / (l[n] - l[n - 1])
        x0, r = out.x0, out.context_t
        if w:
            x0, r = (1 + w) * x0 - w * before.x0, (1 + w) * r - w * before.context_t
        K = schedule.sigma(s) / schedule.sigma(t)
        k = [diffusion.shift_coefficient(schedule, u) for u in (t, s)]
        x = K * x + (schedule.alpha(s) - schedule.alpha(t) * K) * x0 + (k[1] - k[0] * K) * r
        states, before = [*states, x], out
    return states


def test_local_errors_are_those_of_one_step_of_ddim_from_the_trajectory():
    schedule = SCHEDULES["flow"]
    times, denoise = np.float32([0.9, 0.6, 0.3, 0.1]), mixture(schedule)
    x_T = jax.random.normal(jax.random.key(0), (16, 1))
    found = np.asarray(diffusion.local_errors(denoise, x_T, schedule, times))
    states = trajectory(schedule, denoise, x_T, times)
    for i, j in itertools.combinations(range(5), 2):
        end = jnp.asarray([times[j] if j < 4 else schedule.clean], jnp.float32)
        x = diffusion.ddim_sample(
            denoise, states[i], schedule, times[i : i + 1], next_timesteps=end
        )
        scale = 1.0 if j == 4 else np.hypot(1 - times[j], times[j] / np.std(states[4]))
        expected = np.sqrt(np.mean((x - states[j]) ** 2)) / scale
        np.testing.assert_allclose(found[i, j], expected, rtol=2e-3, atol=1e-5)
    assert (
        np.isinf(found[np.tril_indices(4)]).all()
        and np.isfinite(found[np.triu_indices(4, 1)]).all()
    )


@pytest.mark.parametrize("name, share", [("flow", 1.02), ("indices", 0.7)])
def test_in_few_steps_the_optimised_grid_has_a_smaller_error_than_the_named_ones(name, share):
    schedule = SCHEDULES[name]
    denoise = mixture(schedule)
    x_T = jax.random.normal(jax.random.key(0), (64, 1))
    candidates = np.asarray(diffusion.time_grid(schedule, 40, "trailing"))
    ddim = jax.jit(lambda times: diffusion.ddim_sample(denoise, x_T, schedule, times))
    exact = diffusion.get_sampler("dpmpp_2m")(
        denoise, x_T, schedule, diffusion.time_grid(schedule, 100, "trailing")
    )
    errors = jax.jit(lambda x: diffusion.local_errors(denoise, x, schedule, candidates))(x_T)
    best = candidates[list(diffusion.optimised_grid(errors, 6))]
    assert best[0] == candidates[0] and len(best) == 6 and np.all(np.diff(best) < 0)
    found = {"optimised": best} | {
        each: np.asarray(diffusion.time_grid(schedule, 6, each))
        for each in ("trailing", "linspace", "karras", "logsnr")
    }
    off = {each: float(jnp.sqrt(jnp.mean((ddim(t) - exact) ** 2))) for each, t in found.items()}
    assert off.pop("optimised") < share * min(off.values()), off  # `trailing` is as good on flow
