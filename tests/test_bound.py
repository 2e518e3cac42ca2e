"""The bound against the exact value for Gaussian data, against a float64 Monte Carlo over whole
chains, and itself.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import reference_coefficients
from scipy import integrate, stats

from contextdiff_jax import diffusion
from contextdiff_jax.evaluation import bound as bounds

KWARGS = dict(name="linear", num_timesteps=40, beta_start=1e-3, beta_end=0.3)
SCHEDULE = diffusion.make_schedule(**KWARGS)
STD, WEIGHT = 0.25, 0.7  # of the data; of the linear context r = WEIGHT x0


def coefficients(shift):
    """(a, b^2, k) in float64 for t = -1 (last) and 0 .. T-1."""
    abar, a, b, k = reference_coefficients(KWARGS, np.append(np.arange(40), -1), shift)
    return a, 1 - abar, k


def step_constants(t, a, variance, shift_k):
    """The posterior at eta = 1, s = t - 1: (sigma^2, the factor of x_t's residual)."""
    sigma2 = variance[t - 1] / variance[t] * (1 - (1 - variance[t]) / (1 - variance[t - 1]))
    return sigma2, np.sqrt(variance[t - 1] - sigma2) / np.sqrt(variance[t])


def gaussian_denoise(shift):
    """The exact posterior mean of x0 ~ N(0, STD^2) under r = WEIGHT x0."""

    def denoise(x_t, t, s):
        k = diffusion.shift_coefficient(SCHEDULE, t, shift)[:, None]
        m = jnp.sqrt(SCHEDULE.alpha_bar(t))[:, None] + k * WEIGHT
        x0 = m * STD**2 * x_t / (m**2 * STD**2 + SCHEDULE.variance(t)[:, None])
        return diffusion.Denoised(x0, WEIGHT * x0, WEIGHT * x0)

    return denoise


def exact_gaussian_bound(shift):
    """E[L] in bits/dim, term by term: the error x0 - x0_hat is N(0, v_t), independent of x_t."""
    a, variance, k = coefficients(shift)
    m = a + k * WEIGHT
    v = STD**2 * variance / (m**2 * STD**2 + variance)
    kl = []
    for t in range(1, 40):
        sigma2, residual = step_constants(t, a, variance, k)
        kl.append((m[t - 1] - residual * m[t]) ** 2 * v[t] / (2 * sigma2))
    prior = 0.5 * (variance[39] + m[39] ** 2 * STD**2 - 1 - np.log(variance[39]))
    scale = np.sqrt(step_constants(1, a, variance, k)[0])

    def nll(error):
        upper, lower = (stats.norm.logcdf((-abs(error) + d / 255) / scale) for d in (1, -1))
        return -(upper + np.log1p(-np.exp(lower - upper)))

    root = np.sqrt(v[0])
    decoder, _ = integrate.quad(
        lambda e: nll(e) * stats.norm.pdf(e, scale=root), -10 * root, 10 * root, limit=200
    )
    return np.array([prior, np.sum(kl), decoder]) / np.log(2), np.array(kl) / np.log(2)


def estimate(denoise, x0, context_fn, shift, count, seed=0):
    edges = bounds.make_strata(40, count)
    terms = jax.jit(
        lambda x, key: bounds.bound_terms(denoise, x, context_fn, SCHEDULE, key, edges, shift)
    )
    halves = [
        terms(part, jax.random.fold_in(jax.random.key(seed), i))
        for i, part in enumerate(np.split(x0, 2))
    ]
    return bounds.collect(halves, edges)


@pytest.mark.parametrize("count", [None, 7], ids=["all timesteps", "7 strata"])
@pytest.mark.parametrize("shift", ["quadratic", "none"])
def test_bound_of_gaussian_data_is_the_exact_one(shift, count):
    x0 = np.random.default_rng(0).normal(scale=STD, size=(2000, 12)).astype(np.float32)
    weight = 0.0 if shift == "none" else WEIGHT
    result = estimate(gaussian_denoise(shift), x0, lambda x, t: weight * x, shift, count)
    (prior, kl, decoder), by_t = exact_gaussian_bound(shift)
    exact = prior + kl + decoder
    assert result.standard_error < 0.01 * exact
    assert abs(result.total.mean() - exact) < 4 * result.standard_error
    for values, wanted in ((result.prior, prior), (result.kl, kl), (result.decoder, decoder)):
        assert abs(values.mean() - wanted) < 4 * values.std() / np.sqrt(len(values)) + 1e-4 * exact
    strata = [by_t[lo - 1 : hi - 1].mean() for lo, hi in itertools.pairwise(result.edges)]
    np.testing.assert_allclose(result.kl_by_t, strata, rtol=0.1)
    # No model can go below it.
    entropy = 0.5 * np.log2(2 * np.pi * np.e * STD**2) - np.log2(2 / 255)
    assert exact > entropy and result.total.mean() > entropy


def nonlinear_denoise(x_t, t, s):
    x0 = jnp.tanh(0.8 * x_t)
    return diffusion.Denoised(x0, jnp.sin(3 * x0), jnp.sin(3 * x0))


def nonlinear_context(x0, t):
    return jnp.sin(3 * x0)


def chain_log_ratio(x0, shift, rng):
    """log2 q(x_1..T | x0) / p(x_0..T) a dimension along sampled chains: whole densities, no
    closed-form KL.
    """
    a, variance, k = coefficients(shift)

    def posterior_mean(t, x, clean, r):
        sigma2, residual = step_constants(t, a, variance, k)
        return a[t - 1] * clean + k[t - 1] * r + residual * (x - a[t] * clean - k[t] * r), np.sqrt(
            sigma2
        )

    r = np.sin(3 * x0)
    mean, std = a[39] * x0 + k[39] * r, np.sqrt(variance[39])
    x = mean + std * rng.normal(size=x0.shape)
    total = stats.norm.logpdf(x, mean, std) - stats.norm.logpdf(x)
    for t in range(39, 0, -1):
        hat = np.tanh(0.8 * x)
        true, std = posterior_mean(t, x, x0, r)
        model, _ = posterior_mean(t, x, hat, np.sin(3 * hat))
        x = true + std * rng.normal(size=x0.shape)
        total += stats.norm.logpdf(x, true, std) - stats.norm.logpdf(x, model, std)
    hat, scale = np.tanh(0.8 * x), np.sqrt(step_constants(1, a, variance, k)[0])
    error = -np.abs(x0 - hat)
    upper, lower = (
        stats.norm.logcdf((error + 1 / 255) / scale),
        stats.norm.logcdf((error - 1 / 255) / scale),
    )
    return (total - upper - np.log1p(-np.exp(lower - upper))).mean(1) / np.log(2)


def test_bound_agrees_with_monte_carlo_over_whole_chains():
    rng = np.random.default_rng(1)
    x0 = rng.uniform(-0.9, 0.9, size=(3000, 6))
    chains = chain_log_ratio(x0, "quadratic", rng)
    result = estimate(nonlinear_denoise, x0.astype(np.float32), nonlinear_context, "quadratic", 10)
    # The same pictures: the errors of both are those of their differences.
    difference = result.total - chains
    error = difference.std() / np.sqrt(len(difference))
    assert error < 0.02 * chains.mean()
    assert abs(difference.mean()) < 4 * error


def test_every_timestep_a_stratum_is_diffusion_vlb():
    x0 = jnp.asarray(np.random.default_rng(2).uniform(-1, 1, size=(5, 8)), jnp.float32)
    key = jax.random.key(3)
    functions = nonlinear_denoise, x0, nonlinear_context, SCHEDULE, key
    whole = jax.jit(lambda: diffusion.vlb(*functions))()
    edges = bounds.make_strata(40)
    terms = jax.jit(lambda: bounds.bound_terms(*functions, edges))()
    result = bounds.collect([terms], edges)
    np.testing.assert_allclose(result.total, whole["total"], rtol=1e-5)
    np.testing.assert_allclose(result.kl, whole["kl"].sum(0), rtol=1e-5)
    np.testing.assert_allclose(result.kl_by_t, whole["kl"][1:].mean(1), rtol=1e-5)


@pytest.mark.parametrize(
    "num_timesteps, count", [(40, 1), (40, 7), (40, 38), (1000, 50), (1000, 998), (1000, None)]
)
def test_strata_cover_every_timestep_once(num_timesteps, count):
    edges = bounds.make_strata(num_timesteps, count)
    assert len(edges) == (count or num_timesteps - 1) + 1
    assert edges[0] == 1 and edges[-1] == num_timesteps and (np.diff(edges) >= 1).all()


@pytest.mark.parametrize("count", [0, 40, -3])
def test_an_impossible_number_of_strata_is_refused(count):
    with pytest.raises(ValueError, match=f"bound_timesteps={count}: must lie in 1..39"):
        bounds.make_strata(40, count)
