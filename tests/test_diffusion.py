"""The process (schedules, shift, marginal, posterior, targets) against float64 references of DESIGN
section 1.

Tolerances: the library computes in float32. Where a quantity is 1 - abar near t = 0 (about 1e-4),
    one float32 ulp
of abar is a relative error of 6e-4, hence `NEAR_CLEAN`; everywhere else `FLOAT32` holds.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import (
    FLOAT32,
    NEAR_CLEAN,
    SCHEDULES,
    SHIFTS,
    assert_error_lists,
    column,
    draws,
    every_schedule,
    expanded,
    index_pairs,
    reference_coefficients,
)

from contextdiff_jax import diffusion

# ---------------------------------------------------------------- shift coefficient


@every_schedule
@pytest.mark.parametrize("shift", SHIFTS)
def test_shift_coefficient_equals_its_formula_at_every_t(kwargs, shift):
    schedule = diffusion.make_schedule(**kwargs)
    t = np.arange(schedule.num_timesteps)
    *_, expected = reference_coefficients(kwargs, t, shift)
    actual = diffusion.shift_coefficient(schedule, jnp.asarray(t), shift)
    assert actual.shape == t.shape
    np.testing.assert_allclose(actual, expected, rtol=FLOAT32, atol=2e-7)


@pytest.mark.parametrize("shift", SHIFTS)
def test_shift_coefficient_is_zero_at_the_clean_picture_and_accepts_scalars(shift):
    schedule = diffusion.make_schedule("cosine", zero_terminal_snr=True)
    assert float(diffusion.shift_coefficient(schedule, -1, shift)) == 0.0
    assert diffusion.shift_coefficient(schedule, jnp.int32(3), shift).shape == ()


def test_shift_coefficient_defaults_to_quadratic_which_vanishes_at_zero_terminal_snr():
    schedule = diffusion.make_schedule(zero_terminal_snr=True)
    t = jnp.arange(1000)
    default = diffusion.shift_coefficient(schedule, t)
    np.testing.assert_array_equal(default, diffusion.shift_coefficient(schedule, t, "quadratic"))
    assert float(default[-1]) == 0.0
    assert float(default.max()) == pytest.approx(0.25, abs=1e-5)


def test_stable_diffusion_schedule_leaves_the_documented_shift_at_the_end():
    schedule = diffusion.make_schedule(**SCHEDULES["stable_diffusion"])
    assert float(diffusion.shift_coefficient(schedule, 999)) == pytest.approx(0.064, abs=5e-4)


def test_unknown_shift_raises_and_lists_the_allowed_names():
    schedule = diffusion.make_schedule()
    zeros, t = jnp.zeros((2, 3)), jnp.array([1, 2])
    calls = (
        lambda: diffusion.shift_coefficient(schedule, t, "cubic"),
        lambda: diffusion.q_sample(schedule, zeros, zeros, t, zeros, "cubic"),
        lambda: diffusion.q_posterior(
            schedule, zeros, zeros, zeros, zeros, t, t - 1, shift="cubic"
        ),
    )
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        assert_error_lists(error, "cubic", SHIFTS)


# ---------------------------------------------------------------- forward marginal


@every_schedule
@pytest.mark.parametrize("shift", SHIFTS)
def test_q_sample_is_the_shifted_marginal_at_every_t(kwargs, shift):
    schedule = diffusion.make_schedule(**kwargs)
    t = np.arange(-1, schedule.num_timesteps)
    x0, context, noise, _ = draws(len(t))
    _, a, b, k = map(column, reference_coefficients(kwargs, t, shift))
    actual = diffusion.q_sample(schedule, x0, context, jnp.asarray(t), noise, shift)
    np.testing.assert_allclose(actual, a * x0 + k * context + b * noise, rtol=FLOAT32, atol=3e-5)


def test_q_sample_broadcasts_t_over_pictures_and_accepts_a_scalar():
    schedule = diffusion.make_schedule()
    rng = np.random.default_rng(2)
    x0, context, noise = (jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.float32) for _ in range(3))
    batched = diffusion.q_sample(schedule, x0, context, jnp.array([7, 700]), noise)
    for row, t in enumerate((7, 700)):
        scalar = diffusion.q_sample(schedule, x0, context, t, noise)
        assert scalar.shape == x0.shape
        np.testing.assert_allclose(batched[row], scalar[row], rtol=1e-6, atol=1e-6)


def test_q_sample_is_differentiable_in_the_context_with_slope_k():
    schedule = diffusion.make_schedule("cosine", zero_terminal_snr=True)
    t = jnp.arange(0, 1000, 111)
    x0, context, noise, _ = draws(len(t))
    slope = jax.grad(lambda r: diffusion.q_sample(schedule, x0, r, t, noise).sum())(
        jnp.asarray(context)
    )
    expected = column(diffusion.shift_coefficient(schedule, t))
    np.testing.assert_allclose(slope, np.broadcast_to(expected, slope.shape), atol=1e-6)


# ---------------------------------------------------------------- posterior


@every_schedule
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_posterior_equals_the_float64_formula_for_any_s_before_t(kwargs, shift, eta):
    schedule = diffusion.make_schedule(**kwargs)
    t, s = index_pairs(schedule.num_timesteps)
    x0, context_t, context_s, noise = draws(len(t))
    abar_t, a_t, b_t, k_t = map(column, reference_coefficients(kwargs, t, shift))
    abar_s, a_s, _, k_s = map(column, reference_coefficients(kwargs, s, shift))
    x_t = (a_t * x0 + k_t * context_t + b_t * noise).astype(np.float32)
    variance = eta**2 * (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)
    residual = x_t - a_t * x0 - k_t * context_t
    mean = (
        a_s * x0 + k_s * context_s + np.sqrt(np.maximum(1 - abar_s - variance, 0)) / b_t * residual
    )

    actual = diffusion.q_posterior(
        schedule, x0, x_t, context_t, context_s, jnp.asarray(t), jnp.asarray(s), eta, shift
    )
    assert actual.mean.shape == x0.shape
    np.testing.assert_allclose(actual.mean, mean, rtol=FLOAT32, atol=4e-4)
    np.testing.assert_allclose(expanded(actual.variance, 2), variance, rtol=NEAR_CLEAN, atol=1e-7)


@every_schedule
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_posterior_keeps_the_marginal_for_every_eta(kwargs, shift, eta):
    """Composing q(x_s | x_t, x0) with q(x_t | x0) gives q(x_s | x0): mean and variance, no
    sampling.
    """
    schedule = diffusion.make_schedule(**kwargs)
    t, s = index_pairs(schedule.num_timesteps)
    x0, context_t, context_s, direction = draws(len(t), seed=3)
    _, a_t, b_t, k_t = map(column, reference_coefficients(kwargs, t, shift))
    abar_s, a_s, _, k_s = map(column, reference_coefficients(kwargs, s, shift))
    x_t_mean = jnp.asarray(a_t * x0 + k_t * context_t, jnp.float32)

    def posterior_mean(x_t):
        t_, s_ = jnp.asarray(t), jnp.asarray(s)
        return diffusion.q_posterior(
            schedule, x0, x_t, context_t, context_s, t_, s_, eta, shift
        ).mean

    mean, moved = jax.jvp(posterior_mean, (x_t_mean,), (jnp.asarray(direction),))
    slope = np.asarray(moved) / direction
    variance = diffusion.q_posterior(
        schedule, x0, x_t_mean, context_t, context_s, jnp.asarray(t), jnp.asarray(s), eta, shift
    ).variance
    np.testing.assert_allclose(mean, a_s * x0 + k_s * context_s, rtol=FLOAT32, atol=3e-5)
    composed = slope**2 * b_t**2 + expanded(variance, 2)
    np.testing.assert_allclose(
        composed, np.broadcast_to(1 - abar_s, composed.shape), rtol=NEAR_CLEAN, atol=1e-6
    )


@every_schedule
@pytest.mark.parametrize("shift", SHIFTS)
def test_posterior_at_eta_one_is_the_ddpm_closed_form(kwargs, shift):
    schedule = diffusion.make_schedule(**kwargs)
    t = np.arange(1, schedule.num_timesteps)
    x0, context_t, context_s, noise = draws(len(t), seed=4)
    abar_t, a_t, b_t, k_t = map(column, reference_coefficients(kwargs, t, shift))
    abar_s, a_s, _, k_s = map(column, reference_coefficients(kwargs, t - 1, shift))
    alpha = abar_t / abar_s
    x_t = (a_t * x0 + k_t * context_t + b_t * noise).astype(np.float32)
    mean = a_s * (1 - alpha) / b_t**2 * x0
    mean += np.sqrt(alpha) * (1 - abar_s) / b_t**2 * (x_t - k_t * context_t) + k_s * context_s

    actual = diffusion.q_posterior(
        schedule, x0, x_t, context_t, context_s, jnp.asarray(t), jnp.asarray(t - 1), 1.0, shift
    )
    np.testing.assert_allclose(actual.mean, mean, rtol=FLOAT32, atol=4e-4)
    expected_variance = (1 - abar_s) / (1 - abar_t) * (1 - alpha)
    np.testing.assert_allclose(expanded(actual.variance, 2), expected_variance, rtol=NEAR_CLEAN)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_posterior_at_the_clean_index_is_exactly_x0(shift, eta):
    schedule = diffusion.make_schedule(zero_terminal_snr=True)
    t = jnp.array([0, 1, 500, 998, 999])
    x0, x_t, context_t, context_s = draws(len(t))
    actual = diffusion.q_posterior(
        schedule, x0, x_t, context_t, context_s, t, jnp.full_like(t, -1), eta, shift
    )
    np.testing.assert_array_equal(actual.mean, x0)
    np.testing.assert_array_equal(actual.variance, np.zeros_like(actual.variance))


def test_posterior_accepts_scalar_indices_and_defaults_to_ddpm_with_the_quadratic_shift():
    schedule = diffusion.make_schedule()
    x0, x_t, context_t, context_s = draws(2)
    default = diffusion.q_posterior(schedule, x0, x_t, context_t, context_s, 500, 400)
    t, s = jnp.array([500, 500]), jnp.array([400, 400])
    explicit = diffusion.q_posterior(
        schedule, x0, x_t, context_t, context_s, t, s, 1.0, "quadratic"
    )
    np.testing.assert_allclose(default.mean, explicit.mean, rtol=1e-6)
    np.testing.assert_allclose(
        np.ravel(default.variance)[0], np.ravel(explicit.variance)[0], rtol=1e-6
    )


def test_posterior_works_under_jit_and_vmap():
    schedule = diffusion.make_schedule("cosine")
    arrays = [jnp.asarray(x) for x in draws(4)]
    t, s = jnp.array([1, 10, 500, 999]), jnp.array([0, -1, 100, 998])
    direct = diffusion.q_posterior(schedule, *arrays, t, s, 0.5)
    jitted = jax.jit(lambda sch, *args: diffusion.q_posterior(sch, *args, 0.5))(
        schedule, *arrays, t, s
    )
    mapped = jax.vmap(lambda *args: diffusion.q_posterior(schedule, *args, 0.5))(*arrays, t, s)
    np.testing.assert_allclose(jitted.mean, direct.mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mapped.mean, direct.mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.ravel(mapped.variance), np.ravel(direct.variance), rtol=1e-5)


# ---------------------------------------------------------------- targets


@every_schedule
@pytest.mark.parametrize("prediction_type", ["x0", "epsilon", "v"])
def test_predict_x0_inverts_the_training_target_at_every_t(kwargs, prediction_type):
    schedule = diffusion.make_schedule(**kwargs)
    t = np.arange(schedule.num_timesteps)
    x0, context, noise, _ = draws(len(t), seed=5)
    x_t = diffusion.q_sample(schedule, x0, context, jnp.asarray(t), noise)
    target = diffusion.training_target(schedule, x0, x_t, jnp.asarray(t), prediction_type)
    recovered = np.asarray(
        diffusion.predict_x0(schedule, target, x_t, jnp.asarray(t), prediction_type)
    )
    assert np.all(np.isfinite(target)) and np.all(np.isfinite(recovered))
    _, a, *_ = map(column, reference_coefficients(kwargs, t, "none"))
    # epsilon divides by a_t: float32 noise of x_t is amplified by 1 / a_t, and at a_t = 0 it
    # carries no x0 at all.
    keeps_x0 = np.ravel(a > 0) if prediction_type == "epsilon" else np.ones(len(t), bool)
    amplification = 1 / np.maximum(a, 1e-12) if prediction_type == "epsilon" else np.ones_like(a)
    error = np.abs(recovered - x0)[keeps_x0]
    assert np.all(error <= (1e-5 + 2e-6 * amplification)[keeps_x0])


def test_zero_terminal_snr_v_target_is_minus_x0_at_the_last_step():
    schedule = diffusion.make_schedule(zero_terminal_snr=True)
    x0, x_t, *_ = draws(2)
    target = diffusion.training_target(schedule, x0, x_t, jnp.array([999, 999]), "v")
    np.testing.assert_allclose(target, -x0, atol=1e-6)


@every_schedule
def test_epsilon_target_is_the_effective_noise_which_contains_the_shift(kwargs):
    schedule = diffusion.make_schedule(**kwargs)
    t = np.arange(schedule.num_timesteps)
    x0, context, noise, _ = draws(len(t), seed=6)
    _, a, b, k = map(column, reference_coefficients(kwargs, t, "quadratic"))
    x_t = diffusion.q_sample(schedule, x0, context, jnp.asarray(t), noise)
    effective = noise + k / b * context
    epsilon = diffusion.training_target(schedule, x0, x_t, jnp.asarray(t), "epsilon")
    np.testing.assert_allclose(epsilon, effective, rtol=NEAR_CLEAN, atol=2e-4)
    velocity = diffusion.training_target(schedule, x0, x_t, jnp.asarray(t), "v")
    np.testing.assert_allclose(velocity, a * effective - b * x0, rtol=NEAR_CLEAN, atol=2e-4)


def test_x0_target_and_prediction_are_the_identity():
    schedule = diffusion.make_schedule()
    x0, x_t, *_ = draws(2)
    t = jnp.array([0, 999])
    np.testing.assert_array_equal(diffusion.training_target(schedule, x0, x_t, t, "x0"), x0)
    np.testing.assert_array_equal(diffusion.predict_x0(schedule, x0, x_t, t, "x0"), x0)


def test_targets_broadcast_over_pictures_and_accept_a_scalar_t():
    schedule = diffusion.make_schedule("cosine")
    rng = np.random.default_rng(7)
    x0, x_t = (jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.float32) for _ in range(2))
    batched = diffusion.training_target(schedule, x0, x_t, jnp.array([500, 500]), "v")
    np.testing.assert_allclose(
        diffusion.training_target(schedule, x0, x_t, 500, "v"), batched, rtol=1e-6
    )
    np.testing.assert_allclose(
        diffusion.predict_x0(schedule, batched, x_t, 500, "v"), x0, atol=1e-5
    )


def test_target_gradients_are_finite_at_both_ends_of_a_zero_snr_schedule():
    """The loss trains the context through x_t, so the target's derivative in x_t must exist at
    every t.
    """
    schedule = diffusion.make_schedule(zero_terminal_snr=True)
    t = jnp.array([0, 999])
    x0, x_t, *_ = draws(2)
    for prediction_type in ("x0", "epsilon", "v"):
        for function in (diffusion.training_target, diffusion.predict_x0):

            def total(x, function=function, prediction_type=prediction_type):
                return function(schedule, x0, x, t, prediction_type).sum()

            gradient = jax.grad(total)(jnp.asarray(x_t))
            assert np.all(np.isfinite(gradient)), (function.__name__, prediction_type)


def test_unknown_prediction_type_raises_and_lists_the_allowed_names():
    schedule = diffusion.make_schedule()
    zeros, t = jnp.zeros((2, 3)), jnp.array([1, 2])
    for function in (diffusion.training_target, diffusion.predict_x0):
        with pytest.raises(ValueError) as error:
            function(schedule, zeros, zeros, t, "score")
        assert_error_lists(error, "score", ("x0", "epsilon", "v"))
