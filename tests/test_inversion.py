"""Inversion of every deterministic solver: there and back under a non-linear context.

python -m pytest -q tests/test_inversion.py -m slow -s      the table of docs/mathematics.md
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_solver_orders import bayes, bayes_velocity, context

from contextdiff_jax import diffusion

SOLVERS = ("ddim", "euler", "heun", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "unipc")
SCHEDULES = {
    "flow": diffusion.Flow(t_min=0.02),
    "cosine_continuous": diffusion.CosineContinuous(t_min=0.02),
    "indices": diffusion.make_schedule("linear", 100, 1e-3, 0.2),
}
ONCE = list(zip([*SCHEDULES, *SCHEDULES, "flow"], SOLVERS, strict=True))
REST = [
    pytest.param(schedule, name, marks=pytest.mark.slow)
    for schedule in SCHEDULES
    for name in SOLVERS
    if (schedule, name) not in ONCE
]
X0 = jnp.linspace(-1.2, 1.8, 6)[:, None]
EXACT = {"iterations": 100, "tolerance": 1e-6}


DATA = jnp.linspace(-2.2, 2.6, 121)
LOW, HIGH = (jnp.exp(-((DATA - m) ** 2) / (2 * d**2)) for m, d in ((-0.35, 0.35), (0.65, 0.4)))
MASSES = jnp.log(0.6 * LOW + 0.4 * HIGH)


def mixture(schedule, shift="quadratic"):
    """The exact denoise function of a mixture of two Gaussians with r = tanh(2 x0)."""
    r = jnp.tanh(2 * DATA)

    def denoise(x, t, s):
        k = diffusion.shift_coefficient(schedule, t, shift)[:, None]
        means = schedule.alpha(t)[:, None] * DATA + k * r
        p = jax.nn.softmax(MASSES - (x - means) ** 2 / (2 * schedule.variance(t)[:, None]), -1)
        return diffusion.Denoised((p @ DATA)[:, None], (p @ r)[:, None], (p @ r)[:, None])

    return denoise


def times_up(schedule, steps):
    """Ascending times above the least noisy one."""
    times = np.asarray(diffusion.time_grid(schedule, steps + 1, "logsnr"))
    return times[::-1][1:].copy()


def there_and_back(name, denoise, schedule, up, x0=X0, shift="quadratic", **options):
    """The mean error of sampling from the inversion, and the inversion."""

    @jax.jit
    def both(x0):
        x_T = diffusion.invert(name, denoise, x0, schedule, up, shift, **options)
        down, run = jnp.asarray(up)[::-1], diffusion.get_sampler(name)
        if name == "ddim":
            ends = {"next_timesteps": jnp.append(down[1:], schedule.t_min)}
        else:
            ends = {"end": jnp.asarray(schedule.t_min)}
        return run(denoise, x_T, schedule, down, shift=shift, **ends), x_T

    back, x_T = both(x0)
    return float(jnp.abs(back - x0).mean()), np.asarray(x_T)


@pytest.mark.parametrize("schedule, name", ONCE + REST)
def test_the_exact_inversion_leads_back_and_the_explicit_one_by_its_error(schedule, name):
    schedule = SCHEDULES[schedule]
    up, denoise = times_up(schedule, 5), mixture(schedule)
    explicit, _ = there_and_back(name, denoise, schedule, up)
    exact, _ = there_and_back(name, denoise, schedule, up, **EXACT)
    assert exact < 2e-5 < 1e-3 < explicit < 1


@pytest.mark.slow
def test_a_solver_of_second_order_inverts_explicitly_with_its_order():
    schedule = SCHEDULES["flow"]
    for name, least in (("ddim", 0.7), ("heun", 1.6), ("dpmpp_2m", 1.6)):
        errors = [
            there_and_back(name, mixture(schedule), schedule, times_up(schedule, n))[0]
            for n in (24, 48)
        ]
        assert np.log2(errors[0] / errors[1]) > least, (name, errors)


@pytest.mark.slow
@pytest.mark.parametrize("shift", ["none", "prior"])
def test_other_shifts_are_inverted_too(shift):
    schedule = SCHEDULES["flow"]
    up, denoise = times_up(schedule, 6), mixture(schedule, shift=shift)
    for name in ("dpmpp_2m", "heun"):
        assert there_and_back(name, denoise, schedule, up, shift=shift, **EXACT)[0] < 2e-5


def test_what_has_noise_or_no_plan_is_refused(monkeypatch):
    from contextdiff_jax.diffusion.samplers import SAMPLERS

    schedule = SCHEDULES["flow"]
    monkeypatch.setitem(SAMPLERS, "mine", lambda *_, **__: None)
    for name, words in (
        ("ddpm", "can't be inverted; ddim or one of euler, heun"),
        ("mine", "can't be inverted"),
        ("dpmpp_2m_sde", "adds noise"),
    ):
        with pytest.raises(ValueError, match=words):
            diffusion.invert(name, mixture(schedule), X0, schedule, times_up(schedule, 3))


def test_a_solver_of_the_documented_kind_is_inverted_as_it_is(monkeypatch):
    from contextdiff_jax.diffusion import solvers
    from contextdiff_jax.diffusion.samplers import SAMPLERS

    @solvers.linear
    def mine(grid):
        t, last = jnp.arange(len(grid.steps)) > 0, jnp.arange(len(grid.steps)) < 5
        w = jnp.where(t & last, 0.3, 0.0)
        return solvers.Plan(grid.t, grid.s, solvers.make_rows(grid, (1 + w, -w))[0])

    monkeypatch.setitem(SAMPLERS, "mine", mine)
    schedule = SCHEDULES["flow"]
    found = there_and_back("mine", mixture(schedule), schedule, times_up(schedule, 6), **EXACT)
    assert found[0] < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("way", [bayes, bayes_velocity])
def test_table_of_inversions(way):
    """Prints the error of there and back for Gaussian data and `r = tanh(2 x0)`."""
    numbers = (8, 16, 32)
    for path in ("flow", "cosine_continuous"):
        schedule = SCHEDULES[path]
        denoise = way(schedule, context)
        print(f"\n| {path}, {way.__name__} | " + " | ".join(map(str, numbers)) + " | exact, 16 |")
        for name in SOLVERS:
            explicit = [
                there_and_back(name, denoise, schedule, times_up(schedule, n))[0] for n in numbers
            ]
            exact, _ = there_and_back(name, denoise, schedule, times_up(schedule, 16), **EXACT)
            cells = " | ".join(f"{each:.1e}" for each in explicit)
            print(f"| `{name}` | {cells} | {exact:.0e} |", flush=True)
            assert exact < 1e-4 and explicit[-1] < explicit[0]
