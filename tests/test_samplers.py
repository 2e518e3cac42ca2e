"""Closed-form checks: with the exact Bayes denoiser the samples have the true distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextdiff_jax import diffusion

POINTS = (
    np.stack(np.meshgrid(np.linspace(-1, 1, 5), np.linspace(-1, 1, 5)), -1)
    .reshape(-1, 2)
    .astype(np.float32)
)
WEIGHTS = np.random.default_rng(0).dirichlet(np.full(25, 3.0)).astype(np.float32)
SCHEDULE = diffusion.make_schedule("cosine", 200)
MIX = np.random.default_rng(1).normal(size=(2, 2)).astype(np.float32)


def context(x, t=None):
    """A non-linear r."""
    return 0.7 * jnp.sin(3 * x @ MIX)


def posterior(x_t, t):
    """p(point | x_t), exact: each point's own shifted Gaussian."""
    index = int(t[0]) if not isinstance(t, jax.core.Tracer) else t[0]
    points = jnp.asarray(POINTS)
    times = jnp.full(25, index)
    means = diffusion.q_sample(SCHEDULE, points, context(points), times, jnp.zeros_like(points))
    variance = 1 - SCHEDULE.alphas_cumprod[index]
    logits = jnp.log(WEIGHTS) - ((x_t[:, None] - means[None]) ** 2).sum(-1) / (2 * variance)
    return jax.nn.softmax(logits, -1)


def exact(estimate):
    def denoise(x_t, t, s):
        p = posterior(x_t, t)
        x0 = p @ POINTS
        r = p @ context(jnp.asarray(POINTS)) if estimate == "posterior_mean" else context(x0)
        return diffusion.Denoised(x0, r, r)

    return denoise


def total_variation(samples):
    nearest = ((np.asarray(samples)[:, None] - POINTS) ** 2).sum(-1).argmin(1)
    return 0.5 * np.abs(np.bincount(nearest, minlength=25) / len(nearest) - WEIGHTS).sum()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("estimate, bound", [("posterior_mean", 0.05), ("plugin", 0.2)])
def test_point_set_samples_have_the_true_frequencies(sampler, estimate, bound):
    """Bound: 8192 draws of 25 cells give 0.02 by chance; plugin's estimate is biased for a
    non-linear r.
    """
    x_T = jax.random.normal(jax.random.key(0), (8192, 2))
    timesteps = diffusion.spaced_timesteps(200, 200)
    run = diffusion.get_sampler(sampler)
    samples = jax.jit(
        lambda x, k: run(exact(estimate), x, SCHEDULE, timesteps, 0.0, k, "quadratic")
    )(x_T, jax.random.key(1))
    assert total_variation(samples) < bound


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shift", ["none", "quadratic"])
def test_gaussian_samples_have_the_true_moments(eta, shift):
    """x0 ~ N(m, v), r = c x0 linear: E[x0 | x_t] is exact, in float64 numpy's formula for a linear
    Gaussian.
    """
    m, v, c = 0.4, 0.09, 0.8

    def denoise(x_t, t, s):
        abar = SCHEDULE.alphas_cumprod[t[0]]
        slope = jnp.sqrt(abar) + c * diffusion.shift_coefficient(SCHEDULE, t[0], shift)
        x0 = m + v * slope / (v * slope**2 + 1 - abar) * (x_t - slope * m)
        return diffusion.Denoised(x0, c * x0, c * x0)

    x_T = jax.random.normal(jax.random.key(2), (40_000, 1))
    samples = np.asarray(
        diffusion.ddim_sample(
            denoise,
            x_T,
            SCHEDULE,
            diffusion.spaced_timesteps(200, 200),
            eta,
            jax.random.key(3),
            shift,
        )
    )
    assert abs(samples.mean() - m) < 0.01
    assert abs(samples.std() - np.sqrt(v)) < 0.015


def test_inversion_then_ddim_returns_x0():
    """The denoiser of a known x0 makes both directions exact up to the first move, which is read at
    index 0.
    """
    x0 = jax.random.normal(jax.random.key(4), (6, 4, 4, 3)) * 0.5
    r = 0.3 * jnp.cos(5 * x0)

    def denoise(x_t, t, s):
        return diffusion.Denoised(0.9 * x0, r, r)

    timesteps = diffusion.spaced_timesteps(200, 200)
    x_T = diffusion.ddim_invert(denoise, x0, SCHEDULE, timesteps[::-1])
    middle = diffusion.ddim_sample(denoise, x_T, SCHEDULE, timesteps)
    assert np.isfinite(np.asarray(x_T)).all()
    np.testing.assert_allclose(middle, 0.9 * x0, atol=1e-4)  # the last move lands on the estimate


def test_inversion_then_ddim_returns_gaussian_x0():
    def denoise(x_t, t, s):
        abar = SCHEDULE.alphas_cumprod[t[0]]
        slope = jnp.sqrt(abar) + 0.8 * diffusion.shift_coefficient(SCHEDULE, t[0])
        x0 = 0.25 * slope / (0.25 * slope**2 + 1 - abar) * x_t
        return diffusion.Denoised(x0, 0.8 * x0, 0.8 * x0)

    x0 = 0.5 * jax.random.normal(jax.random.key(5), (64, 1))
    timesteps = diffusion.spaced_timesteps(200, 200)
    again = diffusion.ddim_sample(
        denoise, diffusion.ddim_invert(denoise, x0, SCHEDULE, timesteps[::-1]), SCHEDULE, timesteps
    )
    np.testing.assert_allclose(again, x0, atol=0.05)


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_eta_outside_the_unit_interval_is_an_error(eta):
    with pytest.raises(ValueError, match="eta"):
        diffusion.ddim_sample(
            exact("plugin"), jnp.zeros((2, 2)), SCHEDULE, jnp.array([10, 0]), eta, jax.random.key(0)
        )


def test_noise_without_a_key_is_an_error():
    with pytest.raises(ValueError, match="key"):
        diffusion.ddim_sample(exact("plugin"), jnp.zeros((2, 2)), SCHEDULE, jnp.array([10, 0]), 0.5)


def test_terms_of_the_bound_equal_numerical_integration_in_one_dimension():
    """Gaussian KL of two 1-D densities, integrated on a grid in float64 from their definitions."""
    schedule = diffusion.make_schedule("linear", 20)
    x0 = jnp.array([[0.25]])
    c = 0.3

    def r(x, t):
        return c * jnp.sin(2 * x)

    def denoise(x_t, t, s):
        guess = 0.5 * x_t
        return diffusion.Denoised(guess, r(guess, t), r(guess, s))

    key = jax.random.key(9)
    terms = jax.jit(lambda: diffusion.vlb(denoise, x0, r, schedule, key))()
    grid = np.linspace(-12, 12, 2_000_001)

    def density(mean, variance):
        return np.exp(-((grid - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)

    def integrated(p, q):
        inside = p > 1e-200
        return float(
            np.sum(p[inside] * np.log2(p[inside] / np.maximum(q[inside], 1e-300)))
            * (grid[1] - grid[0])
        )

    for index in (1, 7, 19):
        t, s = jnp.array([index]), jnp.array([index - 1])
        noise = jax.random.normal(jax.random.fold_in(key, index), x0.shape)
        x_t = diffusion.q_sample(schedule, x0, r(x0, t), t, noise)
        hat = denoise(x_t, t, s)
        true = diffusion.q_posterior(schedule, x0, x_t, r(x0, t), r(x0, s), t, s)
        model = diffusion.q_posterior(schedule, hat.x0, x_t, hat.context_t, hat.context_s, t, s)
        variance = np.float64(np.ravel(true.variance)[0])
        p, q = (
            density(np.float64(true.mean[0, 0]), variance),
            density(np.float64(model.mean[0, 0]), variance),
        )
        assert float(terms["kl"][index, 0]) == pytest.approx(integrated(p, q), rel=2e-3, abs=1e-5)
    abar = np.float64(schedule.alphas_cumprod[-1])
    k = (1 - np.sqrt(abar)) * np.sqrt(abar)
    p = density(np.sqrt(abar) * 0.25 + k * c * np.sin(0.5), 1 - abar)
    assert float(terms["prior"][0]) == pytest.approx(
        integrated(p, density(0, 1)), rel=2e-3, abs=1e-5
    )
    total = terms["prior"] + terms["kl"].sum(0) + terms["decoder"]
    np.testing.assert_allclose(terms["total"], total, rtol=1e-6)


def test_an_inversion_that_runs_away_keeps_the_best_it_had():
    """A denoiser far too steep for (6') to converge: the error grows with each of its steps, to
    infinity in float32.
    """
    x0, timesteps = jnp.linspace(-1, 1, 8).reshape(2, 4), jnp.array([100])

    def denoise(x, t, s):
        return diffusion.Denoised(-40 * x, jnp.zeros_like(x), jnp.zeros_like(x))

    def lead_back(x):
        return diffusion.ddim_sample(
            denoise, x, SCHEDULE, timesteps, shift="none", next_timesteps=jnp.zeros_like(timesteps)
        )

    explicit, iterated = (
        diffusion.ddim_invert(denoise, x0, SCHEDULE, timesteps, "none", iterations=n)
        for n in (0, 200)
    )
    errors = [float(jnp.abs(lead_back(x) - x0).mean()) for x in (explicit, iterated)]
    assert np.isfinite(errors).all() and errors[1] <= errors[0]
