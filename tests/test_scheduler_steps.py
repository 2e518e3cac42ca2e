"""A folder's steps by each scheduler of diffusers: its own loop, given the same network.

python -m pytest -q tests/test_scheduler_steps.py -m slow      more than 15 steps
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_solvers import KEY, X_T, T, network, noises

from contextdiff_jax import diffusion
from contextdiff_jax.pretrained.scheduler import load_scheduler
from contextdiff_jax.pretrained.scheduler_steps import scheduler_steps

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
SD3 = pytest.importorskip("diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3")

SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
EULER, HEUN = diffusers.EulerDiscreteScheduler, diffusers.HeunDiscreteScheduler
MULTI, SINGLE = diffusers.DPMSolverMultistepScheduler, diffusers.DPMSolverSinglestepScheduler
UNIPC, ANCESTRAL = diffusers.UniPCMultistepScheduler, diffusers.EulerAncestralDiscreteScheduler
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
FLOW_EULER = diffusers.FlowMatchEulerDiscreteScheduler
FLOW_HEUN = diffusers.FlowMatchHeunDiscreteScheduler
LEVELS = [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}]
SPACINGS = [
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "trailing"},
]
LEADING_KARRAS = {**SPACINGS[0], **LEVELS[0]}


@jax.jit(static_argnames=("sampler", "kind", "ends"))
def ours(x_T, steps, schedule, sampler, kind, ends):
    """Our sampler's loop over a folder's steps, one compilation for all grids of one length."""
    view = steps.schedule(schedule)

    def denoise(x, t, s):
        out = network(x, steps.read(t)[:, None] / T, jnp)
        x0 = diffusion.predict_x0(view, out, x, t, kind, shift="none")
        return diffusion.Denoised(x0, jnp.zeros_like(x), jnp.zeros_like(x))

    options = {"end": steps.ends[-1]} if ends else {}
    start = x_T if steps.levels is None else steps.levels.start * x_T
    run = diffusion.get_sampler(sampler)
    return run(denoise, start, view, steps.timesteps, key=KEY, shift="none", **options)


def theirs(scheduler, steps, noise):
    """diffusers' loop, as its pipelines have it, from its own start to its own x."""
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):  # cosine has its first time twice
        scheduler.set_begin_index(0)
    x = torch.from_numpy(X_T) * getattr(scheduler, "init_noise_sigma", 1.0)
    for i, t in enumerate(scheduler.timesteps):
        read = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        out = network(read.numpy(), np.float32(t) / T, np).astype(np.float32)
        given = {} if noise is None else {"variance_noise": torch.from_numpy(noise[i])}
        x = scheduler.step(torch.from_numpy(out), t, x, **given).prev_sample
    return x.numpy()


def check(tmp_path, scheduler, steps, **given):
    """Both loops; `given` replaces what the folder says, as the flags of `sample` do."""
    scheduler.save_pretrained(tmp_path)
    folder = load_scheduler(tmp_path)
    assert not folder.solver.note
    sampler = given.pop("sampler", folder.solver.sampler)
    made = scheduler_steps(folder, sampler, steps, **given)
    noise = noises(steps) if sampler == "dpmpp_2m_sde" else None
    expected = theirs(scheduler, steps, noise)
    ends = made.ends is not None
    actual = ours(X_T, made, folder.schedule(), sampler, folder.prediction, ends)
    if ends and sampler == "euler":  # diffusers' x is ours / a, and isn't clean data here
        expected = expected / np.sqrt(1 + float(scheduler.sigmas[-1]) ** 2)
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-4, err_msg=str(given))
    return made


@pytest.mark.parametrize("steps", [5, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "cls, name, options",
    [
        (EULER, "euler", [*SPACINGS, *LEVELS, LEADING_KARRAS, {"final_sigmas_type": "sigma_min"}]),
        (HEUN, "heun", [*SPACINGS, *LEVELS, LEADING_KARRAS]),
        (SINGLE, "dpmpp_2s", [{}, *LEVELS]),
        (MULTI, "dpmpp_2m", [*SPACINGS, *LEVELS, {"use_lu_lambdas": True}]),
        (MULTI, "dpmpp_3m", [{"solver_order": 3, **more} for more in (SPACINGS[1], LEVELS[0])]),
        (
            MULTI,
            "dpmpp_2m_sde",
            [{"algorithm_type": "sde-dpmsolver++", **more} for more in (SPACINGS[1], LEVELS[0])],
        ),
        (UNIPC, "unipc", [*SPACINGS, *LEVELS]),
    ],
)
def test_a_folder_is_sampled_by_its_schedulers_solver_on_its_grid(
    tmp_path, cls, name, options, steps
):
    for more in options:
        kind = {"prediction_type": "epsilon" if "solver_order" in more else "v_prediction"}
        scheduler = cls(**SD, **kind, **more)
        check(tmp_path, scheduler, steps)
        assert load_scheduler(tmp_path).solver.sampler == name


@pytest.mark.parametrize("steps", [5, 16])
def test_an_end_with_noise_is_diffusers_and_of_15_steps_of_second_order(tmp_path, steps):
    check(tmp_path, MULTI(**SD, final_sigmas_type="sigma_min"), steps)


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "zero terminal SNR"])
@pytest.mark.parametrize(
    "cls, options", [(EULER, LEVELS[:1]), (MULTI, LEVELS), (UNIPC, [SPACINGS[2], LEVELS[0]])]
)
def test_other_schedules_are_followed_too(tmp_path, cls, options, schedule):
    changes = {"beta_schedule": schedule}
    if " " in schedule:
        changes = {**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for more in options:
        scheduler = cls(prediction_type="v_prediction", **changes | more)
        check(tmp_path, scheduler, 5)


@pytest.mark.parametrize("steps", [5, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "scheduler, name",
    [
        (FLOW_EULER(), "euler"),
        (FLOW_EULER(shift=3.0), "euler"),
        (FLOW_EULER(shift=3.0, use_karras_sigmas=True), "euler"),
        (FLOW_EULER(use_exponential_sigmas=True), "euler"),
        (FLOW_HEUN(shift=3.0), "heun"),
        (MULTI(**FLOW, flow_shift=3.0), "dpmpp_2m"),
        (MULTI(**FLOW, solver_order=3), "dpmpp_3m"),
        (SINGLE(**FLOW, flow_shift=2.0), "dpmpp_2s"),
        (UNIPC(**FLOW, flow_shift=3.0), "unipc"),
        (UNIPC(**FLOW), "unipc"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_folder_of_flow_matching_is_sampled_on_the_flow_path(tmp_path, scheduler, name, steps):
    check(tmp_path, scheduler, steps)
    folder = load_scheduler(tmp_path)
    assert folder.solver.sampler == name and isinstance(folder.schedule(), diffusion.Flow)
    assert folder.prediction == "velocity"


def test_flags_choose_another_solver_and_grid_than_the_folders(tmp_path):
    """As diffusers' `from_config` of the folder's config does, with the flag's option."""
    diffusers.DDIMScheduler(**SD, clip_sample=False, steps_offset=1).save_pretrained(tmp_path)
    config = diffusers.DDIMScheduler.load_config(tmp_path)
    folder = load_scheduler(tmp_path)
    for sampler, spacing, cls, more in (
        ("dpmpp_2m", "karras", MULTI, {"use_karras_sigmas": True}),
        ("dpmpp_2m", "", MULTI, {}),
        ("dpmpp_2s", "", SINGLE, {}),
        ("euler", "trailing", EULER, {"timestep_spacing": "trailing"}),
        ("euler", "karras", EULER, {"use_karras_sigmas": True}),
        ("unipc", "exponential", UNIPC, {"use_exponential_sigmas": True}),
        ("dpmpp_3m", "logsnr", MULTI, {"use_lu_lambdas": True, "solver_order": 3}),
    ):
        scheduler = cls.from_config(config, **more)
        made = scheduler_steps(folder, sampler, 6, spacing)
        actual = ours(X_T, made, folder.schedule(), sampler, folder.prediction, False)
        expected = theirs(scheduler, 6, None)
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-4, err_msg=sampler)


def test_times_of_the_users_own_are_read_as_they_are(tmp_path):
    scheduler = MULTI(**SD)
    scheduler.save_pretrained(tmp_path)
    made = scheduler_steps(load_scheduler(tmp_path), "dpmpp_2m", 4, "900,600,300,0")
    np.testing.assert_array_equal(made.read(made.timesteps), [900, 600, 300, 0])
    scheduler.set_timesteps(timesteps=[900, 600, 300, 0])
    np.testing.assert_allclose(made.levels.noise[::-1], scheduler.sigmas[:-1], rtol=2e-4)
    for spacing, words in (("900,600", "must have steps=4"), ("1000,600,300,0", "in 0..999")):
        with pytest.raises(ValueError, match=words):
            scheduler_steps(load_scheduler(tmp_path), "dpmpp_2m", 4, spacing)


def test_ddpm_and_the_ancestral_sampler_have_their_schedulers_times(tmp_path):
    for cls, options in ((diffusers.DDPMScheduler, {"clip_sample": False}), (ANCESTRAL, {})):
        for more in SPACINGS:
            scheduler = cls(**SD, **options, **more)
            scheduler.save_pretrained(tmp_path)
            scheduler.set_timesteps(7)
            folder = load_scheduler(tmp_path)
            assert folder.solver.sampler == "ddpm"
            made = scheduler_steps(folder, "ddpm", 7)
            np.testing.assert_allclose(made.read(made.timesteps), scheduler.timesteps, rtol=1e-6)
            assert made.ends is None
            if cls is ANCESTRAL:
                noise = scheduler.sigmas[:-1].numpy()
                np.testing.assert_allclose(made.levels.noise[::-1], noise, rtol=2e-4)
                start = float(scheduler.init_noise_sigma) / np.sqrt(1 + noise[0] ** 2)
                assert abs(made.levels.start - start) < 1e-6


@pytest.mark.parametrize(
    "options", [{}, {"time_shift_type": "linear", "max_shift": 3.0}, {"use_karras_sigmas": True}]
)
def test_a_shift_that_follows_the_size_is_that_of_stable_diffusion_3(tmp_path, options):
    scheduler = FLOW_EULER(use_dynamic_shifting=True, shift=3.0, **options)
    scheduler.save_pretrained(tmp_path)
    ours = load_scheduler(tmp_path, pipeline="StableDiffusion3Pipeline")
    assert not ours.solver.note
    for tokens in (64, 1024, 4096):
        mu = SD3.calculate_shift(tokens, max_shift=scheduler.config.max_shift)
        scheduler.set_timesteps(20, mu=mu)
        steps = scheduler_steps(ours, "euler", 20, tokens=tokens)
        np.testing.assert_allclose(steps.timesteps, scheduler.sigmas[:-1], rtol=1e-5)
        np.testing.assert_allclose(steps.read(steps.timesteps), scheduler.timesteps, rtol=1e-5)


@pytest.mark.parametrize(
    "scheduler, note",
    [
        (diffusers.PNDMScheduler(skip_prk_steps=True), "PNDMScheduler: not supported; sampled by"),
        (MULTI(solver_order=1), "algorithm_type='dpmsolver++' with solver_order=1: not supported"),
        (MULTI(solver_type="heun"), "solver_type='heun': not supported; sampled by ddim"),
        (MULTI(lambda_min_clipped=-5.1), "lambda_min_clipped=-5.1: not"),
        (MULTI(use_beta_sigmas=True), "use_beta_sigmas=True: not"),
        (MULTI(solver_order=3, lower_order_final=False), "lower_order_final=False: not"),
        (SINGLE(solver_order=3), "solver_order=3: not"),
        (SINGLE(final_sigmas_type="sigma_min"), "final_sigmas_type='sigma_min': not"),
        (UNIPC(solver_type="bh1"), "solver_type='bh1': not"),
        (EULER(interpolation_type="log_linear"), "interpolation_type='log_linear': not"),
        (FLOW_EULER(use_dynamic_shifting=True), "use_dynamic_shifting=True: not"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_what_no_sampler_of_ours_has_is_said_in_one_line(tmp_path, scheduler, note):
    scheduler.save_pretrained(tmp_path)
    solver = load_scheduler(tmp_path).solver
    assert solver.sampler == "ddim" and note in solver.note and "\n" not in solver.note
    assert solver.note.startswith(type(scheduler).__name__)


def test_predictions_that_do_not_fit_the_path_are_refused(tmp_path):
    for options, words in (
        ({"prediction_type": "flow_prediction"}, "needs use_flow_sigmas=True"),
        ({"prediction_type": "v_prediction", "use_flow_sigmas": True}, "not supported with use_fl"),
    ):
        MULTI(**options).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=words):
            load_scheduler(tmp_path)


def test_levels_are_cut_with_the_steps_and_read_by_time():
    levels = diffusion.steps.Levels(
        np.arange(3), np.float32([5, 5, 90]), np.float32([0.1, 1, 9]), np.float32(1)
    )
    steps = diffusion.steps.Steps(np.array([2, 1, 0]), None, levels).last(2)
    np.testing.assert_array_equal(steps.timesteps, [1, 0])
    np.testing.assert_array_equal(steps.read(np.array([2, 0, -1])), [90, 5, 5])
    view = steps.schedule(diffusion.make_schedule("flow"))
    np.testing.assert_allclose(view.sigma(np.arange(3)) / view.alpha(np.arange(3)), levels.noise)
    assert view.alpha(np.int32(-1)) == 1
