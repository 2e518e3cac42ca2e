"""Time grids of paths and of discrete schedules, against float64 formulas and diffusers."""

from __future__ import annotations

import numpy as np
import pytest
from references import PATHS, assert_error_lists

from contextdiff_jax import diffusion
from contextdiff_jax.diffusion.grids import read_spacing

every_path = pytest.mark.parametrize("name", PATHS)


def reference_grid(name, spacing, n, factor=3.0):
    """Float64, from the papers, with t_min = 1e-3 (sigma: 0.002 to 80)."""
    i, (low, high) = np.arange(n), {"edm": (0.002, 80.0)}.get(name, (1e-3, 1.0))
    if spacing == "trailing":
        return high - high * i / n
    if spacing == "leading":
        return high - (high - low) * (i + 1) / n
    if spacing == "linspace":
        return high + (low - high) * i / (n - 1)
    if spacing == "sd3":
        move = lambda w: factor * w / (1 + (factor - 1) * w)  # noqa: E731, one line of the paper
        return high * move(1 + (move(low / high) - 1) * i / (n - 1))
    top = 1 - low if name == "cosine_continuous" or (spacing, name) == ("logsnr", "flow") else high
    if spacing == "logsnr":
        ends = [np.log(PATHS[name][0](t) / PATHS[name][1](t)) for t in (np.float64(top), low)]
        logs = ends[0] + (ends[1] - ends[0]) * i / (n - 1)
        inverse = {
            "flow": lambda: 1 / (1 + np.exp(logs)),
            "cosine_continuous": lambda: 2 / np.pi * np.arctan(np.exp(-logs)),
            "edm": lambda: np.exp(-logs),
        }
        return inverse[name]()
    ratio = np.tan if name == "cosine_continuous" else (lambda x: x / (np.pi / 2))
    first, last = (ratio(np.pi / 2 * t) for t in (top, low))
    if spacing == "karras":
        sigma = (first ** (1 / 7) + i / (n - 1) * (last ** (1 / 7) - first ** (1 / 7))) ** 7
    else:
        sigma = first * (last / first) ** (i / (n - 1))
    return 2 / np.pi * np.arctan(sigma) if name == "cosine_continuous" else sigma


SPACINGS = ["leading", "linspace", "trailing", "karras", "exponential", "logsnr", "sd3"]


@every_path
@pytest.mark.parametrize("spacing", SPACINGS)
def test_grids_of_a_path_equal_their_formulas_and_descend(name, spacing):
    schedule = diffusion.make_schedule(name)
    for n in (2, 7, 50):
        times = np.asarray(diffusion.time_grid(schedule, n, spacing))
        assert times.shape == (n,) and times.dtype == np.float32
        assert np.all(np.diff(times) < 0) and times[-1] > 0
        np.testing.assert_allclose(times, reference_grid(name, spacing, n), rtol=1e-5)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kwargs", [{}, {"name": "cosine"}, {"zero_terminal_snr": True}])
def test_grids_of_indices_are_the_nearest_and_none_is_there_twice(spacing, kwargs):
    schedule = diffusion.make_schedule(**{"num_timesteps": 100} | kwargs)
    abar = np.asarray(schedule.alphas_cumprod, np.float64)
    noise = np.sqrt((1 - abar[abar > 0]) / abar[abar > 0])
    for n in (1, 2, 5, 12, 60, 99, 100):
        times = np.asarray(diffusion.time_grid(schedule, n, spacing))
        assert times.shape == (n,) and times.dtype == np.int32
        assert np.all(np.diff(times) < 0) and 0 <= times[-1] and times[0] <= 99
    if spacing in ("karras", "exponential", "logsnr"):
        times, i = np.asarray(diffusion.time_grid(schedule, 5, spacing)), np.arange(5) / 4
        root = noise[[-1, 0]] ** (1 / 7)
        grid = noise[-1] * (noise[0] / noise[-1]) ** i
        if spacing == "karras":
            grid = (root[0] + i * (root[1] - root[0])) ** 7
        nearest = np.array([np.abs(np.log(noise / wanted)).argmin() for wanted in grid])
        if len(set(nearest)) == 5:
            np.testing.assert_array_equal(times, nearest)
        else:  # cosine's last beta is so large that two are nearest to one; the next gives way
            assert kwargs == {"name": "cosine"} and np.abs(times - nearest).max() == 1


def test_grids_of_flow_equal_diffusers():
    diffusers = pytest.importorskip("diffusers")
    schedule = diffusion.make_schedule("flow")
    for spacing, options in (
        ("linspace", {}),
        ("sd3", {"shift": 3.0}),
        ("karras", {"use_karras_sigmas": True}),
        ("exponential", {"use_exponential_sigmas": True}),
    ):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
        for n in (4, 28):
            scheduler.set_timesteps(n)
            expected = scheduler.sigmas.numpy()[:-1]
            np.testing.assert_allclose(diffusion.time_grid(schedule, n, spacing), expected, 2e-5)


def test_karras_indices_equal_diffusers_rounded_timesteps():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    for n in (5, 10):  # with more, diffusers has some timesteps twice
        scheduler.set_timesteps(n)
        actual = diffusion.time_grid(diffusion.make_schedule(), n, "karras")
        np.testing.assert_array_equal(actual, scheduler.timesteps.numpy())


def test_lists_of_times_are_taken_as_they_are_or_refused():
    flow, indices = diffusion.make_schedule("flow"), diffusion.make_schedule(num_timesteps=100)
    np.testing.assert_array_equal(
        diffusion.time_grid(flow, 3, [1.0, 0.5, 0.25]), np.float32([1.0, 0.5, 0.25])
    )
    np.testing.assert_array_equal(diffusion.time_grid(indices, 2, [99, 3]), [99, 3])
    for schedule, steps, times, words in (
        (flow, 3, [0.5, 0.7, 0.1], "must descend"),
        (flow, 2, [1.5, 0.1], "0.0..1.0"),
        (flow, 2, [1.0, 0.0], "above 0"),
        (flow, 3, [1.0, 0.5], "steps=3"),
        (indices, 2, [99.0, 3.0], "indices 0..99"),
        (indices, 2, [100, 3], "0..99"),
        (indices, 3, [9, 9, 3], "must descend"),
    ):
        with pytest.raises(ValueError) as error:
            diffusion.time_grid(schedule, steps, times)
        assert_error_lists(error, words, ())


def test_a_spacing_in_text_is_a_name_or_the_times_themselves():
    for text, expected in (
        ("karras", "karras"),
        ("900,600,0", (900, 600, 0)),
        ("999", (999,)),
        ("1,0.5,1e-3", (1.0, 0.5, 0.001)),
        (np.float32([1, 0.5]), (1.0, 0.5)),
        ([900, 0], (900, 0)),
    ):
        found = read_spacing(text)
        assert found == expected and [type(a) for a in found] == [type(a) for a in expected]
    for text, words in (("karas", "one of leading"), ("1,karras", "must be numbers, as in 900,")):
        with pytest.raises(ValueError) as error:
            read_spacing(text)
        assert_error_lists(error, text, (words,))


def test_unknown_spacings_and_impossible_numbers_of_steps_are_refused():
    flow, indices = diffusion.make_schedule("flow"), diffusion.make_schedule(num_timesteps=100)
    with pytest.raises(ValueError) as error:
        diffusion.time_grid(flow, 5, "quadratic")
    assert_error_lists(error, "quadratic", tuple(SPACINGS))
    for schedule, steps, words in ((flow, 0, "at least 1"), (indices, 101, "1..100")):
        for spacing in SPACINGS:
            with pytest.raises(ValueError) as error:
                diffusion.time_grid(schedule, steps, spacing)
            assert_error_lists(error, words, ())
    with pytest.raises(ValueError, match="factor=0"):
        diffusion.time_grid(flow, 5, "sd3", factor=0)
