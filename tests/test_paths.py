"""Paths in continuous time: schedules, posterior and targets against float64 references of
their own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import FLOAT32, PATHS, SHIFTS, assert_error_lists, column, draws

from contextdiff_jax import diffusion

TIMES = {
    "flow": np.array([1e-3, 0.02, 0.3, 0.5, 0.77, 0.999, 1.0]),
    "cosine_continuous": np.array([1e-3, 0.02, 0.3, 0.5, 0.77, 0.999]),
    "edm": np.array([0.002, 0.1, 0.9, 5.0, 80.0]),
}
every_path = pytest.mark.parametrize("name", PATHS)
every_shift = pytest.mark.parametrize("shift", SHIFTS)


def reference_k(a, t, shift):
    """The shift by its formula; 0 on clean data."""
    k = {"quadratic": a * (1 - a), "prior": 1 - a, "data_normalization": -a, "none": 0 * a}[shift]
    return np.where(t > 0, k, 0)


def derivative(f, t, step=1e-6):
    """Of fourth order, in float64."""
    h = step * np.maximum(1, np.abs(t))
    return (8 * (f(t + h) - f(t - h)) - (f(t + 2 * h) - f(t - 2 * h))) / (12 * h)


def pairs(name):
    """Every t of the path with every s before it, clean data too."""
    times = TIMES[name]
    found = [(t, s) for t in times for s in (0.0, *times) if s < t]
    return tuple(np.array(each, np.float32) for each in zip(*found, strict=True))


@every_path
@every_shift
def test_a_path_and_its_shift_have_their_formulas(name, shift):
    schedule, (a, b) = diffusion.make_schedule(name), PATHS[name]
    t = np.append(TIMES[name], 0.0)
    times = jnp.asarray(t, jnp.float32)
    t = np.asarray(times, np.float64)
    np.testing.assert_allclose(schedule.alpha(times), a(t), rtol=FLOAT32, atol=1e-7)
    np.testing.assert_allclose(schedule.sigma(times), b(t), rtol=FLOAT32)
    np.testing.assert_allclose(schedule.alpha_bar(times), a(t) ** 2, rtol=FLOAT32, atol=1e-7)
    np.testing.assert_allclose(schedule.variance(times), b(t) ** 2, rtol=FLOAT32)
    k = diffusion.shift_coefficient(schedule, times, shift)
    np.testing.assert_allclose(k, reference_k(a(t), t, shift), rtol=FLOAT32, atol=1e-9)


def test_flow_keeps_all_digits_of_1_minus_a_near_clean_data():
    t = jnp.float32(1e-5)
    schedule = diffusion.make_schedule("flow")
    np.testing.assert_allclose(diffusion.shift_coefficient(schedule, t, "prior"), t, rtol=1e-6)


def test_paths_are_static_pytrees_which_compiled_functions_take():
    for name in PATHS:
        schedule = diffusion.make_schedule(name)
        assert jax.tree.leaves(schedule) == []
        compiled = jax.jit(lambda schedule, t: schedule.alpha(t))
        assert np.isfinite(compiled(schedule, jnp.float32(0.5)))
        assert hash(schedule) == hash(diffusion.make_schedule(name))
    assert diffusion.EDM(sigma_max=10.0) != diffusion.EDM()


def test_indices_are_refused_by_a_path_and_it_has_no_number_of_them():
    schedule, zeros = diffusion.make_schedule("flow"), jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="integers of type int32; a continuous path's times"):
        diffusion.q_sample(schedule, zeros, zeros, jnp.array([3, 4]), zeros)
    with pytest.raises(ValueError, match="'flow': continuous, it has no num_timesteps"):
        _ = schedule.num_timesteps


def test_unknown_schedules_list_the_paths_too():
    with pytest.raises(ValueError) as error:
        diffusion.make_schedule("flows")
    assert_error_lists(error, "flows", ("linear", *PATHS))


# ---------------------------------------------------------------- marginal and posterior


@every_path
@every_shift
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_posterior_equals_the_float64_formula_on_any_path(name, shift, eta):
    schedule, (a, b) = diffusion.make_schedule(name), PATHS[name]
    t, s = pairs(name)
    x0, context_t, context_s, noise = draws(len(t))
    wide_t, wide_s = (np.float64(column(each)) for each in (t, s))
    a_t, b_t, a_s, b_s = a(wide_t), b(wide_t), a(wide_s), b(wide_s)
    k_t, k_s = reference_k(a_t, wide_t, shift), reference_k(a_s, wide_s, shift)
    x_t = a_t * x0 + k_t * context_t + b_t * noise
    sampled = diffusion.q_sample(schedule, x0, context_t, jnp.asarray(t), noise, shift)
    np.testing.assert_allclose(sampled, x_t, rtol=FLOAT32, atol=1e-5)

    variance = eta**2 * b_s**2 * (1 - a_t**2 * b_s**2 / (a_s**2 * b_t**2))
    direction = np.sqrt(np.maximum(b_s**2 - variance, 0)) / b_t
    mean = a_s * x0 + k_s * context_s + direction * (x_t - a_t * x0 - k_t * context_t)
    actual = diffusion.q_posterior(
        schedule, x0, x_t.astype(np.float32), context_t, context_s, t, s, eta, shift
    )
    np.testing.assert_allclose(actual.mean, mean, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(actual.variance, variance, rtol=1e-4, atol=1e-12)


def test_posterior_variance_of_close_times_keeps_its_digits():
    """A difference of squares in float32 would leave nothing of it."""
    for name, t, s in (("flow", 0.5, 0.49999), ("cosine_continuous", 0.5, 0.49999)):
        schedule, (a, b) = diffusion.make_schedule(name), PATHS[name]
        t, s = np.float32(t), np.float32(s)
        one = jnp.ones((1, 1))
        actual = diffusion.q_posterior(schedule, one, one, one, one, t, s, 1.0).variance
        t, s = np.float64(t), np.float64(s)
        expected = b(s) ** 2 * (1 - (a(t) * b(s) / (a(s) * b(t))) ** 2)
        np.testing.assert_allclose(actual, expected, rtol=1e-3)


def test_without_context_and_noise_the_posterior_on_flow_is_eulers_step():
    schedule = diffusion.make_schedule("flow")
    t, s = pairs("flow")
    x0, x_t, *_ = draws(len(t))
    nothing = np.zeros_like(x0)
    actual = diffusion.q_posterior(schedule, x0, x_t, nothing, nothing, t, s, 0.0).mean
    t, s = column(t), column(s)
    velocity = (x_t - x0) / t
    np.testing.assert_allclose(actual, x_t + (s - t) * velocity, rtol=1e-4, atol=1e-4)


def test_the_quadratic_shift_moves_eulers_step_on_flow_by_the_square_of_its_length():
    schedule = diffusion.make_schedule("flow")
    t, s = np.array([0.9, 0.5], np.float32), np.array([0.4, 0.3], np.float32)
    x0, r, noise, _ = draws(2)
    x_t = diffusion.q_sample(schedule, x0, r, t, noise)
    u = diffusion.training_target(schedule, x0, x_t, t, "velocity", context=r)
    posterior = diffusion.q_posterior(schedule, x0, x_t, r, r, t, s, 0.0).mean
    gap = posterior - (x_t + column(s - t) * u)
    np.testing.assert_allclose(gap, -(column(t - s) ** 2) * r, atol=1e-5)


# ---------------------------------------------------------------- targets


@every_path
@pytest.mark.parametrize("prediction_type", ["x0", "epsilon", "v"])
def test_predict_x0_inverts_the_training_target_on_any_path(name, prediction_type):
    schedule, (a, b) = diffusion.make_schedule(name), PATHS[name]
    t = TIMES[name][TIMES[name] < 0.99] if name != "edm" else TIMES[name]
    x0, context, noise, _ = draws(len(t))
    times = jnp.asarray(t, jnp.float32)
    x_t = diffusion.q_sample(schedule, x0, context, times, noise)
    target = diffusion.training_target(schedule, x0, x_t, times, prediction_type)
    e = (np.asarray(x_t, np.float64) - a(column(t)) * x0) / b(column(t))
    expected = {"x0": x0, "epsilon": e, "v": a(column(t)) * e - b(column(t)) * x0}
    np.testing.assert_allclose(target, expected[prediction_type], rtol=1e-3, atol=1e-3)
    recovered = diffusion.predict_x0(schedule, target, x_t, times, prediction_type)
    np.testing.assert_allclose(recovered, x0, rtol=1e-4, atol=3e-4)


@every_path
@every_shift
@pytest.mark.parametrize("moves", [False, True])
def test_velocity_is_the_derivative_of_x_t_and_predict_x0_inverts_it(name, shift, moves):
    """Of x_t at fixed x0 and noise, by float64 differences; r(x0, t) = sin(x0 + 3 t)."""
    schedule, (a, b) = diffusion.make_schedule(name), PATHS[name]
    t = np.float64(np.float32(TIMES[name][1:-1]))
    x0, noise, *_ = draws(len(t))
    wide = np.float64(column(t))

    def r(t):
        return np.sin(x0 + 3 * t) if moves else np.sin(x0) + 0 * t

    def x(t):
        return a(t) * x0 + reference_k(a(t), t, shift) * r(t) + b(t) * noise

    rate = (3 * np.cos(x0 + 3 * wide)).astype(np.float32) if moves else None
    given = dict(context=r(wide).astype(np.float32), context_rate=rate, shift=shift)
    times, x_t = jnp.asarray(t, jnp.float32), x(wide).astype(np.float32)
    u = diffusion.training_target(schedule, x0, x_t, times, "velocity", **given)
    np.testing.assert_allclose(u, derivative(x, wide), rtol=2e-3, atol=2e-4)
    again = diffusion.predict_x0(schedule, u, x_t, times, "velocity", **given)
    np.testing.assert_allclose(again, x0, rtol=1e-4, atol=5e-4 * max(1, t.max()))


@every_path
@every_shift
def test_velocity_data_has_the_context_times_rho(name, shift):
    """M = x0 + rho r with rho = (k/b)' / (a/b)', by float64 differences."""
    schedule, (a, b) = diffusion.make_schedule(name), PATHS[name]
    t = np.float64(np.float32(TIMES[name][1:-1]))
    rho = derivative(lambda t: reference_k(a(t), t, shift) / b(t), t)
    rho = rho / derivative(lambda t: a(t) / b(t), t)
    times = jnp.asarray(t, jnp.float32)
    actual = diffusion.drift_coefficient(schedule, times, shift)
    np.testing.assert_allclose(actual, rho, rtol=1e-3, atol=1e-4)
    x0, r, noise, _ = draws(len(t))
    x_t = diffusion.q_sample(schedule, x0, r, times, noise, shift)
    u = diffusion.training_target(schedule, x0, x_t, times, "velocity", context=r, shift=shift)
    data = diffusion.velocity_data(schedule, u, x_t, times)
    np.testing.assert_allclose(data, x0 + column(rho) * r, rtol=2e-4, atol=5e-4 * max(1, t.max()))


def test_rho_of_the_quadratic_shift_is_its_closed_form():
    t = jnp.linspace(0.01, 1, 50)
    for name, rho in (
        ("cosine_continuous", lambda a: (1 - a) * (1 - a - a**2)),
        ("flow", lambda a: (1 - a) ** 2),
    ):
        schedule = diffusion.make_schedule(name)
        expected = rho(PATHS[name][0](np.asarray(t, np.float64)))
        np.testing.assert_allclose(diffusion.drift_coefficient(schedule, t), expected, atol=2e-7)
    schedule = diffusion.make_schedule("cosine")
    a = np.sqrt(np.asarray(schedule.alphas_cumprod, np.float64))
    actual = diffusion.drift_coefficient(schedule, jnp.arange(1000))
    np.testing.assert_allclose(actual, (1 - a) * (1 - a - a**2), atol=2e-7)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_on_indices_velocity_is_v_and_the_shifts_derivative_in_the_angle(zero_terminal_snr):
    schedule = diffusion.make_schedule("linear", zero_terminal_snr=zero_terminal_snr)
    t = jnp.array([0, 10, 500, 999])
    x0, r, noise, _ = draws(len(t))
    plain = diffusion.q_sample(schedule, x0, r, t, noise, "none")
    v = diffusion.training_target(schedule, x0, plain, t, "v")
    u = diffusion.training_target(schedule, x0, plain, t, "velocity", shift="none")
    np.testing.assert_allclose(u, v, atol=1e-4)
    recovered = diffusion.predict_x0(schedule, u, plain, t, "velocity", shift="none")
    np.testing.assert_allclose(recovered, x0, atol=1e-4)
    a = np.sqrt(np.asarray(schedule.alphas_cumprod, np.float64))[np.asarray(t)]
    x_t = diffusion.q_sample(schedule, x0, r, t, noise)
    u = diffusion.training_target(schedule, x0, x_t, t, "velocity", context=r)
    slope = -(1 - 2 * a) * np.sqrt(1 - a**2)  # of a (1 - a), a = cos(angle)
    np.testing.assert_allclose(u, v + column(slope) * r, atol=2e-4)


def test_velocity_without_its_context_is_refused_under_a_shift():
    schedule, zeros, t = diffusion.make_schedule("flow"), jnp.zeros((2, 3)), jnp.array([0.1, 0.2])
    for function in (diffusion.training_target, diffusion.predict_x0):
        with pytest.raises(ValueError, match="velocity.*needs context=.*quadratic"):
            function(schedule, zeros, zeros, t, "velocity")


@every_path
def test_velocity_denoise_hands_the_samplers_m_and_no_context(name):
    schedule = diffusion.make_schedule(name)
    x0, r, noise, _ = draws(2)
    t = jnp.array([0.4, 0.6])
    x_t = diffusion.q_sample(schedule, x0, r, t, noise)

    def predict(x, t):
        return diffusion.training_target(schedule, x0, x, t, "velocity", context=r)

    out = diffusion.velocity_denoise(predict, schedule)(x_t, t, t - 0.1)
    rho = column(diffusion.drift_coefficient(schedule, t))
    np.testing.assert_allclose(out.x0, x0 + rho * r, atol=1e-5)
    assert not np.any(out.context_t) and not np.any(out.context_s)


@every_path
@pytest.mark.parametrize("weighting", ["min_snr", "p2"])
def test_loss_weights_say_the_same_of_every_target(name, weighting):
    """An error of x0 at fixed x_t costs the same, whichever target the network has."""
    schedule, gamma = diffusion.make_schedule(name), {"min_snr": 5.0, "p2": 1.0}[weighting]
    t = jnp.asarray(TIMES[name][1:-2], jnp.float32)
    x0, r, noise, error = draws(len(t))
    x_t = diffusion.q_sample(schedule, x0, r, t, noise, "none")
    costs = []
    for kind in ("epsilon", "x0", "v", "velocity"):
        target, other = (
            diffusion.training_target(schedule, x, x_t, t, kind, shift="none")
            for x in (x0, x0 + error)
        )
        weight = diffusion.loss_weight(schedule, t, kind, weighting, gamma)
        costs.append(np.asarray(weight * ((target - other) ** 2).mean(1)))
    for cost in costs[1:]:
        np.testing.assert_allclose(cost, costs[0], rtol=5e-3)
