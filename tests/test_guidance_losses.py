"""Guidance (classifier-free, rescaled, thresholded) and loss weights against float64 formulas."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextdiff_jax import diffusion

PREDICTION_TYPES = ("x0", "epsilon", "v")
SCHEDULES = {
    "linear": dict(name="linear"),
    "cosine": dict(name="cosine"),
    "linear-zero_snr": dict(name="linear", zero_terminal_snr=True),
    "scaled_linear-zero_snr": dict(
        name="scaled_linear", beta_start=0.00085, beta_end=0.012, zero_terminal_snr=True
    ),
}
every_schedule = pytest.mark.parametrize("kwargs", list(SCHEDULES.values()), ids=list(SCHEDULES))


def reference_snr(schedule) -> np.ndarray:
    abar = np.asarray(schedule.alphas_cumprod, np.float64)
    return abar / (1 - abar)


def denoised(seed: int, shape=(3, 4, 4, 2)) -> diffusion.Denoised:
    rng = np.random.default_rng(seed)
    x0, context_t, context_s = (
        jnp.asarray(rng.normal(size=shape) * 2, jnp.float32) for _ in range(3)
    )
    return diffusion.Denoised(x0=x0, context_t=context_t, context_s=context_s)


def fields(value: diffusion.Denoised) -> list[np.ndarray]:
    return [np.asarray(x, np.float64) for x in (value.x0, value.context_t, value.context_s)]


# ---------------------------------------------------------------- guidance


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 7.5])
def test_guidance_moves_the_picture_and_both_contexts_along_the_same_line(scale):
    conditional, unconditional = denoised(0), denoised(1)
    guided = diffusion.guide(conditional, unconditional, scale)
    line = jax.tree.map(lambda c, u: u + scale * (c - u), conditional, unconditional)
    chex.assert_trees_all_close(guided, line, rtol=1e-5, atol=1e-5)


def test_guidance_scale_one_is_the_conditional_and_zero_the_unconditional():
    conditional, unconditional = denoised(0), denoised(1)
    for scale, expected in ((1.0, conditional), (0.0, unconditional)):
        guided = diffusion.guide(conditional, unconditional, scale)
        chex.assert_trees_all_close(guided, expected, atol=1e-6)


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescaled_guidance_mixes_in_a_picture_with_the_conditional_std_of_each_sample(rescale):
    conditional, unconditional = denoised(0), denoised(1)
    guided = diffusion.guide(conditional, unconditional, 5.0, rescale=rescale)
    (c, *c_contexts), (u, *u_contexts) = fields(conditional), fields(unconditional)
    plain = u + 5.0 * (c - u)
    axes = (1, 2, 3)
    matched = plain * c.std(axes, keepdims=True) / plain.std(axes, keepdims=True)
    x0, *contexts = fields(guided)
    np.testing.assert_allclose(x0, rescale * matched + (1 - rescale) * plain, rtol=1e-4, atol=1e-5)
    for actual, cc, uc in zip(contexts, c_contexts, u_contexts, strict=True):
        np.testing.assert_allclose(actual, uc + 5.0 * (cc - uc), rtol=1e-5, atol=1e-5)


def test_full_rescale_gives_every_sample_the_conditional_std():
    conditional, unconditional = denoised(2), denoised(3)
    x0 = np.asarray(diffusion.guide(conditional, unconditional, 7.5, rescale=1.0).x0)
    np.testing.assert_allclose(
        x0.std((1, 2, 3)), np.asarray(conditional.x0).std((1, 2, 3)), rtol=1e-4
    )


def test_rescaled_guidance_of_a_constant_picture_is_finite():
    flat = diffusion.Denoised(*(jnp.zeros((2, 4, 4, 3)) for _ in range(3)))
    assert np.all(np.isfinite(diffusion.guide(flat, flat, 7.5, rescale=0.7).x0))


def test_guidance_works_under_jit_with_a_traced_scale():
    conditional, unconditional = denoised(0), denoised(1)
    jitted = jax.jit(diffusion.guide)(conditional, unconditional, 3.0)
    expected = diffusion.guide(conditional, unconditional, 3.0)
    chex.assert_trees_all_close(jitted, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.5])
def test_dynamic_threshold_clips_each_sample_at_its_own_percentile(percentile):
    rng = np.random.default_rng(4)
    x0 = rng.normal(size=(4, 8, 8, 3)) * np.array([0.2, 1.0, 2.0, 5.0])[:, None, None, None]
    x0 = x0.astype(np.float32)
    limit = np.maximum(np.percentile(np.abs(x0).reshape(4, -1), percentile, axis=1), 1.0)[
        :, None, None, None
    ]
    actual = diffusion.dynamic_threshold(jnp.asarray(x0), percentile)
    np.testing.assert_allclose(actual, np.clip(x0, -limit, limit) / limit, rtol=1e-5, atol=1e-6)


def test_dynamic_threshold_leaves_pictures_in_range_alone_and_never_exceeds_one():
    rng = np.random.default_rng(5)
    inside = jnp.asarray(rng.uniform(-1, 1, size=(2, 4, 4, 3)), jnp.float32)
    np.testing.assert_array_equal(diffusion.dynamic_threshold(inside, 99.5), inside)
    assert float(jnp.abs(diffusion.dynamic_threshold(inside * 9, 99.5)).max()) <= 1.0


# ---------------------------------------------------------------- signal-to-noise ratio and weights


@every_schedule
def test_snr_is_abar_over_one_minus_abar_and_finite_at_both_ends(kwargs):
    schedule = diffusion.make_schedule(**kwargs)
    t = jnp.arange(schedule.num_timesteps)
    actual = diffusion.snr(schedule, t)
    assert actual.shape == t.shape
    np.testing.assert_allclose(actual, reference_snr(schedule), rtol=2e-3, atol=1e-12)
    assert np.all(np.isfinite(diffusion.snr(schedule, jnp.array([-1]))))


def reference_weight(
    snr: np.ndarray, prediction_type: str, weighting: str, gamma: float
) -> np.ndarray:
    """The epsilon weight, carried to the other targets by |dx0|^2 = |de|^2 / snr, |dv|^2 = |de|^2
    (snr + 1) / snr.
    """
    if weighting == "min_snr":
        x0_weight = np.minimum(snr, gamma)
    else:
        x0_weight = (1 + snr) ** -gamma * snr
    if prediction_type == "x0":
        return x0_weight
    if prediction_type == "v":
        return x0_weight / (snr + 1)
    limit = 1.0  # both epsilon weights tend to 1 where the SNR is 0
    return np.divide(x0_weight, snr, out=np.full_like(snr, limit), where=snr > 0)


@every_schedule
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "weighting,gamma", [("min_snr", 5.0), ("min_snr", 1.0), ("p2", 1.0), ("p2", 0.5)]
)
def test_loss_weight_equals_its_formula_at_every_t(kwargs, prediction_type, weighting, gamma):
    schedule = diffusion.make_schedule(**kwargs)
    t = jnp.arange(schedule.num_timesteps)
    actual = diffusion.loss_weight(schedule, t, prediction_type, weighting, gamma)
    assert actual.shape == t.shape
    assert np.all(np.isfinite(actual))
    expected = reference_weight(reference_snr(schedule), prediction_type, weighting, gamma)
    np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=1e-9)


@every_schedule
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_uniform_weight_is_one_and_the_default(kwargs, prediction_type):
    schedule = diffusion.make_schedule(**kwargs)
    t = jnp.arange(schedule.num_timesteps)
    for weight in (
        diffusion.loss_weight(schedule, t, prediction_type),
        diffusion.loss_weight(schedule, t, prediction_type, "uniform"),
    ):
        np.testing.assert_array_equal(weight, np.ones(schedule.num_timesteps))


def test_min_snr_weights_at_zero_snr_are_their_limits():
    schedule = diffusion.make_schedule(zero_terminal_snr=True)
    last = jnp.array([999])
    for prediction_type, limit in (("epsilon", 1.0), ("x0", 0.0), ("v", 0.0)):
        weight = diffusion.loss_weight(schedule, last, prediction_type, "min_snr", 5.0)
        np.testing.assert_allclose(weight, [limit], atol=1e-6)


def test_min_snr_gamma_defaults_to_five():
    schedule = diffusion.make_schedule()
    t = jnp.arange(1000)
    np.testing.assert_array_equal(
        diffusion.loss_weight(schedule, t, "x0", "min_snr"),
        diffusion.loss_weight(schedule, t, "x0", "min_snr", 5.0),
    )
    assert float(diffusion.loss_weight(schedule, t, "x0", "min_snr").max()) == pytest.approx(
        5.0, rel=1e-6
    )


@pytest.mark.parametrize("weighting", ["min_snr", "p2"])
def test_a_weighted_loss_is_the_same_for_every_prediction_type(weighting):
    """The same x0_hat, expressed as x0, epsilon or v error and weighted, must cost the same."""
    schedule = diffusion.make_schedule("cosine")
    t = jnp.arange(10, 990, 70)
    rng = np.random.default_rng(6)
    x0, x0_hat, x_t = (jnp.asarray(rng.normal(size=(len(t), 3)), jnp.float32) for _ in range(3))
    costs = []
    for prediction_type in PREDICTION_TYPES:
        target = diffusion.training_target(schedule, x0, x_t, t, prediction_type)
        guess = diffusion.training_target(schedule, x0_hat, x_t, t, prediction_type)
        weight = diffusion.loss_weight(schedule, t, prediction_type, weighting, 1.0)
        costs.append(np.asarray(weight * ((target - guess) ** 2).mean(-1)))
    np.testing.assert_allclose(costs[1], costs[0], rtol=5e-3)
    np.testing.assert_allclose(costs[2], costs[0], rtol=5e-3)


def test_unknown_weighting_or_prediction_type_raises_and_lists_the_allowed_names():
    schedule = diffusion.make_schedule()
    t = jnp.array([1, 2])
    with pytest.raises(ValueError) as error:
        diffusion.loss_weight(schedule, t, "epsilon", "max_snr")
    assert all(name in str(error.value) for name in ("max_snr", "uniform", "min_snr", "p2"))
    for weighting in ("uniform", "min_snr", "p2"):
        with pytest.raises(ValueError) as error:
            diffusion.loss_weight(schedule, t, "score", weighting)
        assert all(name in str(error.value) for name in ("score", *PREDICTION_TYPES))
