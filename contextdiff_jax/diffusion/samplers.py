"""Samplers: the reverse process as one `lax.scan` over timesteps.

Each is a function of a denoise function, a start, a schedule and times. Guidance, thresholding and
the way the context is estimated belong to the denoise function (`guidance.py`), so a sampler is its
equation. DDPM and DDIM are here, the solvers of higher order in `solvers.py`; the way back to noise
is `inversion.py`.
"""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray, Real

from contextdiff_jax.diffusion import solvers
from contextdiff_jax.diffusion.loop import scan_steps
from contextdiff_jax.diffusion.process import Samples, q_posterior
from contextdiff_jax.diffusion.protocols import (
    ContextFn,
    Denoised,
    DenoiseFn,
    KeepFn,
    ProjectFn,
    Reuse,
    Sampler,
)
from contextdiff_jax.diffusion.schedule import Schedule
from contextdiff_jax.runtime.fields import check_choice

__all__ = [  # the protocols, too: this is where the other rooms take them from
    "SAMPLERS",
    "ContextFn",
    "DenoiseFn",
    "Denoised",
    "KeepFn",
    "ProjectFn",
    "Reuse",
    "Sampler",
    "adds_noise",
    "check_eta",
    "check_takes",
    "ddim_sample",
    "ddpm_sample",
    "get_sampler",
    "takes",
]


def check_eta(eta: float) -> None:
    """Raises ValueError unless 0 <= eta <= 1. A traced eta can't be checked and is not."""
    if not isinstance(eta, jax.core.Tracer) and not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}: must lie in [0, 1] (0 is DDIM, 1 is DDPM)")


def _reverse(
    denoise,
    x_T,
    schedule,
    timesteps,
    eta,
    key,
    shift,
    next_timesteps=None,
    project=None,
    reuse=None,
):
    timesteps = jnp.asarray(timesteps)
    keys = None if key is None else jax.random.split(key, timesteps.shape[0])

    def step(x, inputs, *kept):
        t, s, start, step_key = inputs
        t, s = jnp.full(x.shape[:1], t), jnp.full(x.shape[:1], s)
        denoised = denoise(x, t, s, *kept)
        mean, variance = q_posterior(
            schedule, denoised.x0, x, denoised.context_t, denoised.context_s, t, s, eta, shift
        )
        x = mean
        if step_key is not None:
            x = mean + jnp.sqrt(variance) * jax.random.normal(step_key, x.shape, x.dtype)
        return x if project is None else project(x, start, denoised.context_s), None

    starts = jnp.append(timesteps[1:], schedule.clean)
    ends = starts if next_timesteps is None else jnp.asarray(next_timesteps)
    return scan_steps(step, x_T, (timesteps, ends, starts, keys), reuse)


def ddpm_sample(
    denoise: DenoiseFn,
    x_T: Samples,
    schedule: Schedule,
    timesteps: Real[ArrayLike, "S"],
    key: PRNGKeyArray,
    shift: str = "quadratic",
    next_timesteps: Real[ArrayLike, "S"] | None = None,
    project: ProjectFn | None = None,
    reuse: Reuse | None = None,
) -> Float[Array, "B *D"]:
    """Ancestral sampling (Ho et al. 2020, alg. 2) with ContextDiff's posterior, (3) at eta = 1.

    `timesteps` descend; the last step goes to clean data and adds no noise. The options
    are `ddim_sample`'s.
    """
    return _reverse(
        denoise, x_T, schedule, timesteps, 1.0, key, shift, next_timesteps, project, reuse
    )


def ddim_sample(
    denoise: DenoiseFn,
    x_T: Samples,
    schedule: Schedule,
    timesteps: Real[ArrayLike, "S"],
    eta: float = 0.0,
    key: PRNGKeyArray | None = None,
    shift: str = "quadratic",
    next_timesteps: Real[ArrayLike, "S"] | None = None,
    project: ProjectFn | None = None,
    reuse: Reuse | None = None,
) -> Float[Array, "B *D"]:
    """DDIM (Song et al. 2021, eq. 12) with ContextDiff's shift: (3) at any eta in [0, 1],
    deterministic at 0.

    `timesteps` descend; the last step goes to clean data, unless `next_timesteps` says
    where each goes (other implementations' steps don't all end where the next begins). `project`
    replaces x after each step (inpainting). `key` is needed when eta > 0. Raises ValueError for eta
    outside [0, 1], eta > 0 without a key, or a number of steps that `reuse` doesn't divide.
    """
    check_eta(eta)
    deterministic = not isinstance(eta, jax.core.Tracer) and eta == 0
    if not deterministic and key is None:
        raise ValueError(f"eta={eta}: sampling with noise needs a key")
    key = None if deterministic else key
    return _reverse(
        denoise, x_T, schedule, timesteps, eta, key, shift, next_timesteps, project, reuse
    )


def _ddpm(
    denoise,
    x_T,
    schedule,
    timesteps,
    eta=1.0,
    key=None,
    shift="quadratic",
    **options,
):
    if key is None:
        raise ValueError("sampler='ddpm': sampling with noise needs a key")
    return ddpm_sample(denoise, x_T, schedule, timesteps, key, shift, **options)


_ddpm.noisy = True
SAMPLERS = {"ddpm": _ddpm, "ddim": ddim_sample, **solvers.SOLVERS}


def get_sampler(name: str) -> Sampler:
    """The sampler by name, with the signature of `ddim_sample`: (denoise, x_T, schedule, times, *,
    key, eta, shift). Those that are deterministic, or whose noise is that of eta = 1 (`ddpm`,
    `dpmpp_2m_sde`), take no notice of eta.

    Raises ValueError for an unknown name.
    """
    check_choice("sampler", name, SAMPLERS)
    return SAMPLERS[name]


def takes(name: str, option: str) -> bool:
    """Whether that sampler has the option (`next_timesteps`, `project`, `reuse`)."""
    parameters = inspect.signature(get_sampler(name)).parameters
    return option in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def adds_noise(name: str, eta: float) -> bool:
    """Whether that sampler adds noise: by eta, or, if its attribute `noisy` is true, always."""
    return getattr(get_sampler(name), "noisy", False) or (name == "ddim" and eta > 0)


def check_takes(name: str, option: str, purpose: str) -> None:
    """Raises ValueError, saying for what `purpose` it is needed, unless that sampler has it."""
    if not takes(name, option):
        able = ", ".join(each for each in SAMPLERS if takes(each, option))
        raise ValueError(f"sampler={name!r}: doesn't take {option}, for {purpose}; one of {able}")
