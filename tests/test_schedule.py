"""Schedules and timestep spacings against float64 numpy and diffusers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import (
    FLOAT32,
    SCHEDULES,
    assert_error_lists,
    every_schedule,
    reference_alphas_cumprod,
)

from contextdiff_jax import diffusion

# ---------------------------------------------------------------- schedules


@every_schedule
def test_alphas_cumprod_equals_the_float64_reference(kwargs):
    schedule = diffusion.make_schedule(**kwargs)
    expected = reference_alphas_cumprod(**kwargs)
    assert schedule.num_timesteps == len(expected)
    assert schedule.alphas_cumprod.shape == expected.shape
    np.testing.assert_allclose(schedule.alphas_cumprod, expected, rtol=FLOAT32)


@every_schedule
def test_alphas_cumprod_decreases_strictly_inside_the_unit_interval(kwargs):
    abar = np.asarray(diffusion.make_schedule(**kwargs).alphas_cumprod)
    assert np.all(np.diff(abar) < 0)
    assert abar[0] < 1
    assert np.all(abar[:-1] > 0)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_zero_terminal_snr_ends_at_exactly_zero_and_keeps_the_start(name):
    plain = diffusion.make_schedule(**SCHEDULES[name])
    zero = diffusion.make_schedule(**SCHEDULES[name], zero_terminal_snr=True)
    assert float(zero.alphas_cumprod[-1]) == 0.0
    assert float(plain.alphas_cumprod[-1]) > 0.0
    np.testing.assert_allclose(zero.alphas_cumprod[0], plain.alphas_cumprod[0], rtol=1e-6)


def test_cosine_clips_the_last_beta_at_0_999():
    abar = np.asarray(diffusion.make_schedule("cosine").alphas_cumprod, np.float64)
    betas = 1 - abar[1:] / abar[:-1]
    assert betas.max() == pytest.approx(0.999, abs=1e-5)


def test_make_schedule_defaults_to_the_linear_ddpm_schedule():
    schedule = diffusion.make_schedule()
    np.testing.assert_allclose(schedule.alphas_cumprod, reference_alphas_cumprod(), rtol=FLOAT32)
    assert schedule.num_timesteps == 1000


def test_unknown_schedule_raises_and_lists_the_allowed_names():
    with pytest.raises(ValueError) as error:
        diffusion.make_schedule("sigmoid_of_foo")
    assert_error_lists(error, "sigmoid_of_foo", ("linear", "scaled_linear", "cosine"))


def test_schedule_is_a_pytree_whose_length_is_static_under_jit():
    schedule = diffusion.make_schedule("cosine", num_timesteps=20)
    leaves, structure = jax.tree.flatten(schedule)
    rebuilt = jax.tree.unflatten(structure, leaves)
    assert rebuilt.num_timesteps == 20
    lengths = jax.jit(lambda tree: jnp.arange(tree.num_timesteps) + 0 * tree.alphas_cumprod)(
        schedule
    )
    np.testing.assert_array_equal(lengths, np.arange(20))


# ---------------------------------------------------------------- timesteps


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize(
    "num_timesteps,num_steps", [(1000, 50), (1000, 30), (1000, 7), (1000, 1000), (50, 13), (100, 2)]
)
def test_spaced_timesteps_equal_diffusers(spacing, num_timesteps, num_steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(num_timesteps, timestep_spacing=spacing, steps_offset=0)
    scheduler.set_timesteps(num_steps)
    actual = np.asarray(diffusion.spaced_timesteps(num_timesteps, num_steps, spacing))
    np.testing.assert_array_equal(actual, scheduler.timesteps.numpy())


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_spaced_timesteps_are_distinct_descending_and_in_range_for_every_number_of_steps(spacing):
    for num_steps in range(2, 101):
        steps = np.asarray(diffusion.spaced_timesteps(100, num_steps, spacing))
        assert steps.shape == (num_steps,) and steps.dtype.kind == "i"
        assert np.all(np.diff(steps) < 0)
        assert 0 <= steps[-1] and steps[0] <= 99


def test_spaced_timesteps_default_to_trailing_which_starts_at_the_last_index():
    np.testing.assert_array_equal(diffusion.spaced_timesteps(1000, 4), [999, 749, 499, 249])
    np.testing.assert_array_equal(
        diffusion.spaced_timesteps(1000, 4, "leading"), [750, 500, 250, 0]
    )
    np.testing.assert_array_equal(
        diffusion.spaced_timesteps(1000, 4, "linspace"), [999, 666, 333, 0]
    )
    np.testing.assert_array_equal(diffusion.spaced_timesteps(1000, 1), [999])


def test_unknown_spacing_raises_and_lists_the_allowed_names():
    with pytest.raises(ValueError) as error:
        diffusion.spaced_timesteps(1000, 50, "karras")
    assert_error_lists(error, "karras", ("leading", "linspace", "trailing"))
