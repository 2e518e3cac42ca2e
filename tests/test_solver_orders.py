"""Solvers where everything is known: Gaussian data, and a set of points; a non-linear context.

    python -m pytest -q tests/test_solver_orders.py -m slow -s      the table of docs/mathematics.md

In one dimension the motion (12) keeps every sample at its quantile. So the exact answer is the map
of quantiles from the noisiest marginal to the least noisy one, found here by bisection in float64:
no differential equation is solved for it.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextdiff_jax import diffusion
from contextdiff_jax.diffusion import solvers

MEAN, STD = 0.3, 0.5
Z = np.linspace(-4.5, 4.5, 801)
DATA, WEIGHTS = MEAN + STD * Z, np.exp(-(Z**2) / 2) / np.exp(-(Z**2) / 2).sum()
X_T = np.linspace(-2, 2, 9)
FIRST, SECOND = ("ddim", "euler"), ("heun", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "unipc")
PATHS = {"flow": diffusion.Flow(t_min=0.02), "cosine": diffusion.CosineContinuous(t_min=0.02)}
every_path = pytest.mark.parametrize("path", PATHS)


def context(x0, t, xp=np):
    """A non-linear r."""
    return xp.tanh(2 * x0) + 0 * t


def moving_context(x0, t, xp=np):
    """One that depends on t, too."""
    return xp.tanh(2 * x0 + xp.sin(3 * t))


def marginal(path: str, t: float, r):
    """(means, b) of the mixture that x_t is drawn from, in float64."""
    a, b = {
        "flow": (1 - t, t),
        "cosine": (math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)),
    }[path]
    return a * DATA + a * (1 - a) * r(DATA, t), b


def distribution(path, x, t, r):
    """P(x_t <= x)."""
    means, b = marginal(path, t, r)
    z = (np.asarray(x)[:, None] - means) / (b * math.sqrt(2))
    return (WEIGHTS * 0.5 * (1 + np.vectorize(math.erf)(z))).sum(1)


@functools.cache
def exact_answer(path: str, first: float, last: float, r) -> np.ndarray:
    """E[x0 | x_last] of the samples that are X_T at `first`."""
    share = distribution(path, X_T, first, r)
    low, high = np.full(len(X_T), -6.0), np.full(len(X_T), 6.0)
    for _ in range(50):
        middle = (low + high) / 2
        below = distribution(path, middle, last, r) < share
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    means, b = marginal(path, last, r)
    logits = np.log(WEIGHTS) - (low[:, None] - means) ** 2 / (2 * b**2)
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p @ DATA / p.sum(1)


def posterior(schedule, x, t, r):
    """p(x0 | x_t) on the grid of x0."""
    k = diffusion.shift_coefficient(schedule, t)
    means = schedule.alpha(t) * DATA + k * r(DATA, t, jnp)
    logits = np.log(WEIGHTS) - (x - means) ** 2 / (2 * schedule.variance(t))
    return jax.nn.softmax(logits.astype(jnp.float32), -1)


def bayes(schedule, r):
    """The exact denoise function."""

    def denoise(x, t, s):
        p = posterior(schedule, x, t[0], r)
        expected = [p @ jnp.asarray(f, jnp.float32) for f in (DATA, r(DATA, t[0], jnp))]
        return diffusion.Denoised(
            *(each[:, None] for each in expected), (p @ r(DATA, s[0], jnp))[:, None]
        )

    return denoise


def bayes_velocity(schedule, r):
    """The denoise function of the exact E[u | x_t], without an estimate of r."""

    def predict(x, t):
        p, (da, db) = posterior(schedule, x, t[0], r), schedule.rates(t[0])
        a, b = schedule.alpha(t[0]), schedule.sigma(t[0])
        R = r(DATA, t[0], jnp)
        e = (x - a * DATA - a * (1 - a) * R) / b
        return (p * (da * DATA + (1 - 2 * a) * da * R + db * e)).sum(1, keepdims=True)

    return diffusion.velocity_denoise(predict, schedule)


def solve(path, name, times, r=context, denoise=bayes, key=None):
    schedule, x_T = PATHS[path], jnp.asarray(X_T, jnp.float32)[:, None]
    run = diffusion.get_sampler(name)
    sample = jax.jit(lambda x, times: run(denoise(schedule, r), x, schedule, times, key=key))
    return np.asarray(sample(x_T, times), np.float64)[:, 0]


def error(path, name, steps, r=context, denoise=bayes, spacing="logsnr"):
    """Root mean square; `logsnr` is uniform in the log of a / b, from and to fixed times."""
    times = diffusion.time_grid(PATHS[path], steps, spacing)
    exact = exact_answer(path, float(times[0]), float(times[-1]), r)
    return np.sqrt(np.mean((solve(path, name, times, r, denoise) - exact) ** 2))


def order(errors):
    """By how much a doubled number of steps divides the error, as a power of 2."""
    return float(np.log2(errors[-2] / errors[-1]))


@every_path
@pytest.mark.parametrize("name", ["ddim", *SECOND])
def test_a_solver_under_a_non_linear_context_has_its_order(path, name):
    nominal = 1 if name in FIRST else 2
    assert order([error(path, name, steps) for steps in (20, 40)]) > nominal - 0.3


def test_euler_is_ddim_under_the_shift_too():
    times = diffusion.time_grid(PATHS["flow"], 10, "trailing")
    np.testing.assert_allclose(*(solve("flow", name, times) for name in FIRST), atol=1e-5)


@every_path
@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "dpmpp_3m", "unipc"])
def test_20_steps_of_second_order_are_as_good_as_100_of_ddim(path, name):
    """dpmpp_2s isn't there: 20 of its evaluations are 10 steps of second order."""
    spacing = "trailing" if name == "heun" else "logsnr"
    assert error(path, name, 20, spacing=spacing) < error(path, "ddim", 100, spacing=spacing)


@every_path
def test_a_velocity_has_the_order_with_no_estimate_of_r(path):
    assert order([error(path, "dpmpp_2m", n, denoise=bayes_velocity) for n in (20, 40)]) > 1.7


@every_path
@pytest.mark.parametrize("name", ["dpmpp_2m", "heun"])
def test_a_context_that_depends_on_time_is_followed(path, name):
    """First order is what is promised; the part that is of first order alone is small."""
    errors = [error(path, name, steps, moving_context) for steps in (20, 40)]
    assert order(errors) > 0.7
    assert errors[1] < 0.25 * error(path, "ddim", 40, moving_context)


def test_heun_is_better_than_ddim_where_the_grid_begins_at_almost_no_signal():
    """The discrete cosine schedule's last b / a is 20,000. Data of one Gaussian: x_t keeps its
    place among all.
    """
    schedule, v = diffusion.make_schedule("cosine"), 0.25

    def denoise(x, t, s):
        a, b = schedule.alpha(t[0]), schedule.sigma(t[0])
        return diffusion.Denoised(a * v * x / (a**2 * v + b**2), 0 * x, 0 * x)

    x_T = jnp.linspace(-2, 2, 9)[:, None]
    times = diffusion.time_grid(schedule, 10, "trailing")
    spread = math.sqrt(schedule.alpha(times[0]) ** 2 * v + schedule.sigma(times[0]) ** 2)
    exact = math.sqrt(v) * np.asarray(x_T, np.float64) / spread
    found = {
        name: diffusion.get_sampler(name)(denoise, x_T, schedule, times, shift="none")
        for name in ("ddim", "heun")
    }
    errors = {name: np.abs(np.asarray(x) - exact).max() for name, x in found.items()}
    assert errors["heun"] < 0.5 * errors["ddim"] < 0.1


@pytest.mark.parametrize("name", [*FIRST, *SECOND, "dpmpp_2m_sde", "ddpm"])
def test_grids_that_begin_without_signal_and_end_at_clean_data_give_numbers(name):
    """a = 0 at t = 1 of a path, and at the last index of a schedule with zero terminal SNR."""
    zero = diffusion.make_schedule("linear", zero_terminal_snr=True)

    def denoise(x, t, s):
        return diffusion.Denoised(jnp.tanh(x), jnp.sin(x), jnp.cos(x))

    x_T = jnp.linspace(-2, 2, 6).reshape(2, 3)
    run = diffusion.get_sampler(name)
    for schedule in (PATHS["flow"], zero):
        sample = jax.jit(
            lambda x, times, schedule=schedule: run(
                denoise, x, schedule, times, key=jax.random.key(0), shift="prior"
            )
        )
        for steps in (1, 3):
            x0 = sample(x_T, diffusion.time_grid(schedule, steps, "trailing"))
            assert np.isfinite(np.asarray(x0)).all(), (schedule, steps)


def test_sampling_with_noise_gives_the_gaussian_and_2m_in_fewer_steps_than_ddpm():
    """r = 0.8 x0, so that E[x0 | x_t] is linear; 2^16 draws give the deviation to 0.0014."""
    schedule, c = PATHS["flow"], 0.8

    def denoise(x, t, s):
        slope = schedule.alpha(t[0]) + c * diffusion.shift_coefficient(schedule, t[0])
        gain = STD**2 * slope / (STD**2 * slope**2 + schedule.variance(t[0]))
        x0 = MEAN + gain * (x - slope * MEAN)
        return diffusion.Denoised(x0, c * x0, c * x0)

    x_T = jax.random.normal(jax.random.key(0), (2**16, 1))
    times = diffusion.time_grid(schedule, 20, "logsnr")
    off = {}
    for name in ("ddpm", "dpmpp_2m_sde"):
        run = diffusion.get_sampler(name)
        x0 = np.asarray(run(denoise, x_T, schedule, times, key=jax.random.key(1)))
        off[name] = abs(x0.std() - STD)
        assert abs(x0.mean() - MEAN) < 0.01
    assert off["dpmpp_2m_sde"] < 0.01 and off["dpmpp_2m_sde"] < 0.5 * off["ddpm"], off


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m_sde"])
def test_noise_without_a_key_is_refused(name):
    x, schedule = jnp.zeros((2, 3)), diffusion.make_schedule("flow")
    with pytest.raises(ValueError, match="needs a key"):
        diffusion.get_sampler(name)(
            lambda x, t, s: diffusion.Denoised(x, x, x), x, schedule, jnp.array([1.0, 0.5])
        )


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("name", ["heun", "dpmpp_2s", "dpmpp_2m", "unipc"])
def test_project_keeps_the_known_part_and_is_told_each_time(name):
    """The known half is q_sample's at every evaluation, and x0 at the end."""
    schedule, known = PATHS["flow"], jnp.linspace(-1, 1, 4).reshape(2, 2)

    def hold(x, t, context):
        noised = diffusion.q_sample(schedule, known, context[:, :2], t, jnp.ones((2, 2)))
        return x.at[:, :2].set(noised)

    def denoise(x, t, s):
        r = jnp.concatenate([jnp.ones((2, 2)), jnp.sin(x[:, 2:])], 1)
        expected = diffusion.q_sample(schedule, known, r[:, :2], t, jnp.ones((2, 2)))
        off = jnp.abs(x[:, :2] - expected).max()  # 0, or else the other half shows it
        return diffusion.Denoised(jnp.tanh(x) + 100 * off, r, r)

    times = diffusion.time_grid(schedule, 6, "trailing")
    x_T = hold(jax.random.normal(jax.random.key(0), (2, 4)), times[0], jnp.ones((2, 4)))
    x0 = diffusion.get_sampler(name)(denoise, x_T, schedule, times, project=hold)
    np.testing.assert_allclose(x0[:, :2], known, atol=1e-6)
    assert np.abs(np.asarray(x0[:, 2:])).max() < 1.5


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_reuse_hands_on_what_was_kept_at_the_first_step_of_a_group(name):
    schedule, x_T = PATHS["flow"], jnp.linspace(-2, 2, 6).reshape(2, 3)
    times = diffusion.time_grid(schedule, 6, "trailing")

    def denoise(x, t, s, kept):
        return diffusion.Denoised(jnp.tanh(x * (1 + kept[:, None])), jnp.sin(x), jnp.sin(x))

    def plain(x, t, s):  # the group's first time, looked up
        first = times[::3][jnp.argmin(jnp.where(times[::3] >= t[0], times[::3], 9.0))]
        return denoise(x, t, s, jnp.full(2, first))

    run = diffusion.get_sampler(name)
    reuse = diffusion.Reuse(3, lambda x, t: t)
    grouped = run(denoise, x_T, schedule, times, reuse=reuse)
    np.testing.assert_allclose(grouped, run(plain, x_T, schedule, times), rtol=1e-5)
    with pytest.raises(ValueError, match="reuse=4: must divide the number of steps, 6"):
        run(denoise, x_T, schedule, times, reuse=diffusion.Reuse(4, lambda x, t: t))


def test_which_samplers_have_which_options():
    from contextdiff_jax.diffusion.samplers import SAMPLERS, check_takes, takes

    assert all(takes(name, "project") for name in SAMPLERS)
    assert [name for name in SAMPLERS if takes(name, "next_timesteps")] == ["ddpm", "ddim"]
    assert [name for name in SAMPLERS if not takes(name, "reuse")] == ["heun"]
    with pytest.raises(ValueError, match="'heun': doesn't take reuse, for DeepCache; one of ddpm"):
        check_takes("heun", "reuse", "DeepCache")


# ---------------------------------------------------------------- a set of points

POINTS = np.stack(np.meshgrid(*[np.linspace(-1, 1, 5)] * 2), -1).reshape(-1, 2).astype(np.float32)
MASSES = np.random.default_rng(0).dirichlet(np.full(25, 3.0)).astype(np.float32)
MIX = np.random.default_rng(1).normal(size=(2, 2)).astype(np.float32)


def sines(x):
    """The r of NUMBERS.md's point set: far from linear."""
    return 3 * jnp.sin(3 * x @ MIX) / 0.7


def total_variation(estimate: str, steps: int = 60) -> float:
    """Of 8192 samples from the true weights; by chance it is about 0.02."""
    schedule = diffusion.make_schedule("flow")
    points, r = jnp.asarray(POINTS), sines(jnp.asarray(POINTS))
    shift = "none" if estimate == "none" else "quadratic"

    def weights(x, t):
        k = diffusion.shift_coefficient(schedule, t, shift)
        means = schedule.alpha(t) * points + k * r
        distance = ((x[:, None] - means) ** 2).sum(-1)
        return jax.nn.softmax(jnp.log(MASSES) - distance / (2 * schedule.variance(t)), -1)

    def velocity(x, t):
        t = t[0]
        p = weights(x, t)
        e = (x[:, None] - (1 - t) * points - t * (1 - t) * r) / t
        return (p[..., None] * (-points + (1 - 2 * t) * r + e)).sum(1)

    def denoise(x, t, s):
        x0 = weights(x, t[0]) @ points
        return diffusion.Denoised(x0, sines(x0), sines(x0))

    denoise = diffusion.velocity_denoise(velocity, schedule) if estimate == "velocity" else denoise
    x_T = jax.random.normal(jax.random.key(0), (8192, 2))
    times = diffusion.time_grid(schedule, steps, "trailing")
    samples = diffusion.get_sampler("dpmpp_2m")(denoise, x_T, schedule, times, shift=shift)
    nearest = ((np.asarray(samples)[:, None] - POINTS) ** 2).sum(-1).argmin(1)
    return 0.5 * np.abs(np.bincount(nearest, minlength=25) / len(nearest) - MASSES).sum()


def test_velocity_has_no_bias_on_the_set_of_points_where_plugin_has():
    found = {name: total_variation(name) for name in ("none", "velocity", "plugin")}
    assert found["velocity"] < found["none"] + 0.02 < 0.06, found
    assert found["plugin"] > 0.15, found


@pytest.mark.slow
@every_path
@pytest.mark.parametrize("spacing", ["logsnr", "trailing"])
def test_table_of_errors(path, spacing, monkeypatch):
    """Prints the error by the number of steps, with the mean of rho over a step, (16), and with
    each estimate's own rho, (15); the solver's own choice is marked.
    """
    numbers, make_rows = (8, 16, 32), solvers.make_rows
    print(f"\n| {path}, `{spacing}` | " + " | ".join(map(str, numbers)) + " | order |")
    print("|" + "---|" * (len(numbers) + 2))
    for name in ("euler", *SECOND):
        for own in (False, True):

            def rows(grid, *args, own=own, own_rho_at=None, **kwargs):
                # heun's estimates are at the times that it gives, all others' at the grid's
                at = (grid.t if own_rho_at is None else own_rho_at) if own else None
                return make_rows(grid, *args, own_rho_at=at, **kwargs)

            monkeypatch.setattr(solvers, "make_rows", rows)
            errors = [error(path, name, steps, spacing=spacing) for steps in numbers]
            chosen = own == (name in ("heun", "unipc"))
            label = f"`{name}`, {'own' if own else 'mean'} rho" + (" (chosen)" if chosen else "")
            cells = " | ".join(f"{each:.1e}" for each in errors)
            print(f"| {label} | {cells} | {order(errors):.1f} |", flush=True)
            assert errors[-1] < max(errors[0], 0.01)  # `trailing` starts at a = 0: not steadily
