"""Solvers against diffusers' schedulers of their names, given the same outputs of a network."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextdiff_jax import diffusion

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

SHAPE, T = (2, 3), 1000
MIX = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
X_T = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
KEY = jax.random.key(7)
VP = dict(prediction_type="v_prediction", beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
MULTI, SINGLE = diffusers.DPMSolverMultistepScheduler, diffusers.DPMSolverSinglestepScheduler
# Ours, their class, and its options.
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, dict(clip_sample=False, timestep_spacing="trailing")),
    "ddpm": (diffusers.DDPMScheduler, dict(clip_sample=False)),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "dpmpp_2s": (SINGLE, dict(solver_order=2, lower_order_final=True)),
    "dpmpp_2m": (MULTI, dict(solver_order=2)),
    "dpmpp_3m": (MULTI, dict(solver_order=3)),
    "dpmpp_2m_sde": (MULTI, dict(solver_order=2, algorithm_type="sde-dpmsolver++")),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
}
FLOW_SCHEDULERS = SCHEDULERS | {
    "euler": (diffusers.FlowMatchEulerDiscreteScheduler, None),
    "heun": (diffusers.FlowMatchHeunDiscreteScheduler, None),
}


def network(x, t, xp):
    """A non-linear function of x and of t in [0, 1]; `xp`: numpy, or jax's."""
    return xp.sin(x @ MIX + 3 * t) + 0.3 * xp.tanh(2 * x) * (1 - t)


@functools.cache
def ours(name: str, kind: str):
    """`sample(x_T, times)`, compiled once for each number of steps."""
    schedule = diffusion.make_schedule("linear" if kind == "v" else "flow")

    def denoise(x, t, s):
        out = network(x, t[:, None] / (T if kind == "v" else 1), jnp)
        x0 = diffusion.predict_x0(schedule, out, x, t, kind, shift="none")
        return diffusion.Denoised(x0, jnp.zeros_like(x), jnp.zeros_like(x))

    run = diffusion.get_sampler(name)
    return jax.jit(lambda x, times: run(denoise, x, schedule, times, key=KEY, shift="none"))


def noises(steps: int) -> np.ndarray:
    """The standard normal numbers of our samplers' steps."""
    return np.stack([jax.random.normal(key, SHAPE) for key in jax.random.split(KEY, steps)])


def theirs(scheduler, time_of, noise, x=X_T):
    """diffusers' loop; `time_of(step, timestep)` is what the network reads."""
    x = torch.from_numpy(x)
    for i, t in enumerate(scheduler.timesteps):
        read = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        out = network(read.numpy(), np.float32(time_of(i, t)), np)
        given = {} if noise is None else {"variance_noise": torch.from_numpy(noise[i])}
        x = scheduler.step(torch.from_numpy(out.astype(np.float32)), t, x, **given).prev_sample
    return x.numpy()


def set_times(scheduler, name: str, times: np.ndarray) -> None:
    """The scheduler's timesteps are these, whatever its own grids are."""
    if name == "ddim":
        return scheduler.set_timesteps(len(times))
    if name != "unipc":
        return scheduler.set_timesteps(timesteps=times.tolist())
    scheduler.set_timesteps(len(times))
    abar = scheduler.alphas_cumprod.double()
    sigmas = ((1 - abar) / abar).sqrt()[times.tolist()].float()
    scheduler.sigmas = torch.cat([sigmas, torch.zeros(1)])
    scheduler.timesteps = torch.from_numpy(times.astype(np.int64))


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_without_a_context_a_solver_is_diffusers_on_indices(name, steps, monkeypatch):
    cls, options = SCHEDULERS[name]
    schedule, noise = diffusion.make_schedule(), noises(steps)
    spacings = ["trailing"] if name == "ddim" else ["leading", "linspace", "trailing", "karras"]
    for spacing in spacings:
        times = np.asarray(diffusion.time_grid(schedule, steps, spacing))
        scheduler = cls(**VP, **options)
        set_times(scheduler, name, times)
        if name == "ddpm":
            draws = iter(noise)
            monkeypatch.setattr(
                diffusers.schedulers.scheduling_ddpm,
                "randn_tensor",
                lambda *_, draws=draws, **__: torch.from_numpy(next(draws)),
            )
        first = 1.0
        if name in ("euler", "heun"):  # their x is ours / a
            first = np.float32(scheduler.sigmas[0] ** 2 + 1) ** 0.5
        given = noise if name == "dpmpp_2m_sde" else None
        expected = theirs(scheduler, lambda i, t: float(t) / T, given, X_T * first)
        actual = ours(name, "v")(X_T, times)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4, err_msg=spacing)


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("name", [name for name in FLOW_SCHEDULERS if not name.startswith("dd")])
def test_without_a_context_a_solver_is_diffusers_on_flow(name, steps):
    cls, options = FLOW_SCHEDULERS[name]
    scheduler = cls() if options is None else cls(**FLOW, **options)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.numpy()
    times = sigmas[:1] if name == "heun" else sigmas[:-1]
    if name == "heun":  # each in the middle is there twice
        times = np.append(times, sigmas[1:-1:2])
    assert len(times) == steps
    noise = noises(steps) if name == "dpmpp_2m_sde" else None
    expected = theirs(scheduler, lambda i, t: sigmas[i], noise)
    actual = ours(name, "velocity")(X_T, times)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
