"""The steps of diffusers' schedulers, each family with its own grid, in float64 numpy.

A solver's grid is pairs of a noise level b / a and the time that the network reads. Euler and Heun
interpolate the level at a fractional time; the multistep solvers leave the noisiest of N + 1 times
out and read whole ones; Karras and exponential levels have their time interpolated, then rounded by
some and cut by others.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from contextdiff_jax.diffusion import time_grid
from contextdiff_jax.diffusion.grids import RATIOS, read_spacing
from contextdiff_jax.diffusion.schedule import SCHEDULES, SPACINGS
from contextdiff_jax.diffusion.steps import Levels, Steps
from contextdiff_jax.pretrained.scheduler import Scheduler

# Whose times are Euler's: fractional, from both ends of the schedule.
FRACTIONAL = ("euler", "heun")
MULTISTEP = ("dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde")
SOLVERS = (*FRACTIONAL, *MULTISTEP, "dpmpp_2s", "unipc")
ANCESTRAL = "EulerAncestralDiscreteScheduler"  # the posterior's noise, on Euler's times
# A level for a = 0, diffusers': float16's smallest number in the place of abar.
_SMALLEST = 2.0**-24


def scheduler_steps(
    scheduler: Scheduler,
    sampler: str,
    num_steps: int,
    spacing: str = "",
    factor: float = 3.0,
    tokens: int = 0,
) -> Steps:
    """The steps that diffusers' scheduler of that sampler makes of the folder's config.

    Args:
      spacing: a name of `time_grid`'s or a list of times; "": the folder's own.
      tokens: of the picture, for a shift that follows its size.

    Raises ValueError for a number of steps or times that the schedule doesn't have.
    """
    named = read_spacing(spacing) if spacing else ""
    if num_steps < 1:
        raise ValueError(f"steps={num_steps}: must be at least 1")
    if scheduler.is_flow:
        return _flow_steps(scheduler, sampler, num_steps, named, factor, tokens)
    ancestral = sampler == "ddpm" and scheduler.class_name == ANCESTRAL
    if sampler in SOLVERS or ancestral:
        return _solver_steps(scheduler, sampler, num_steps, named, factor)
    named = named or scheduler.timestep_spacing
    if named not in SPACINGS:
        times = np.asarray(time_grid(scheduler.schedule(), num_steps, named, factor=factor))
        if scheduler.set_alpha_to_one or sampler != "ddim":
            return Steps(times)
        return Steps(times, np.append(times[1:], 0))
    times, ends = scheduler.steps(num_steps, named)
    return Steps(times) if sampler == "ddpm" else Steps(times, ends)


def _solver_steps(scheduler, sampler, num_steps, named, factor) -> Steps:
    T, table = scheduler.num_train_timesteps, _table(scheduler)
    own = named or scheduler.spacing_of(sampler)
    base = own if own in SPACINGS else scheduler.timestep_spacing
    fractional = sampler in FRACTIONAL or sampler == "ddpm"
    if own in (*RATIOS, "logsnr"):
        ends = table[[0, -1]].astype(np.float64)
        if fractional:  # from the noise that the uniform times have
            times = _uniform(scheduler, base, num_steps, fractional)
            ends = np.interp(times[[-1, 0]], np.arange(T), table)
        noise = RATIOS.get(own, RATIOS["exponential"])(*ends, num_steps)
        reads = np.interp(np.log(noise), np.log(table), np.arange(T))
        if not fractional:
            cosine = scheduler.beta_schedule == "squaredcos_cap_v2" and sampler in MULTISTEP
            reads = np.floor(reads) if own == "exponential" or cosine else np.round(reads)
    else:
        if own in SPACINGS:
            reads = _uniform(scheduler, own, num_steps, fractional)
        else:
            reads = np.asarray(time_grid(scheduler.schedule(), num_steps, own, factor=factor))
        noise = np.interp(reads, np.arange(T), table)
    start = 1.0
    if fractional and base != "leading":  # diffusers' x is ours / a: its noise has the deviation b
        start = noise.max() / np.sqrt(1 + noise.max() ** 2)
    ends, steps = None, np.arange(num_steps)[::-1].astype(np.int32)
    ending = ("euler", *MULTISTEP) if own in (*RATIOS, "logsnr") else ("euler", "unipc", *MULTISTEP)
    if scheduler.solver.final_sigmas_type == "sigma_min" and sampler in ending:
        noise, reads = np.append(noise, table[0]), np.append(reads, 0.0)
        steps, ends = steps + np.int32(1), steps
    numbers = np.arange(len(noise), dtype=np.int32)
    levels = Levels(numbers, *map(np.float32, (reads[::-1], noise[::-1], start)))
    return Steps(steps, ends, levels)


def _table(scheduler: Scheduler) -> Float[np.ndarray, "T"]:
    """b / a of every index in diffusers' own float32: whether the last level lies on an index or
    just below is a matter of its last bit, and the time that is read is 999 or 998.
    """
    T, (low, high) = scheduler.num_train_timesteps, (scheduler.beta_start, scheduler.beta_end)
    if scheduler.rescale_betas_zero_snr:
        abar = np.asarray(scheduler.schedule().alphas_cumprod)
        abar = np.where(abar > 0, abar, np.float32(_SMALLEST))
        return np.sqrt((1 - abar) / abar)
    if scheduler.beta_schedule == "scaled_linear":
        betas = _torch_linspace(low**0.5, high**0.5, T) ** 2
    elif scheduler.beta_schedule == "linear":
        betas = _torch_linspace(low, high, T)
    else:
        betas = SCHEDULES[scheduler.schedule_name](T, low, high).astype(np.float32)
    abar = np.cumprod((1 - betas).astype(np.float64)).astype(np.float32)
    return np.sqrt((1 - abar) / abar)


def _torch_linspace(low: float, high: float, count: int) -> Float[np.ndarray, "T"]:
    low, high, i = np.float32(low), np.float32(high), np.arange(count)
    step = np.float64((high - low) / np.float32(count - 1))
    ends = np.where(i < count // 2, low + step * i, high - step * (count - 1 - i))
    return ends.astype(np.float32)


def _uniform(
    scheduler: Scheduler, spacing: str, num_steps: int, fractional: bool
) -> Float[np.ndarray, "S"]:
    T, more = scheduler.num_train_timesteps, 0 if fractional else 1
    if num_steps + more > T:
        raise ValueError(
            f"steps={num_steps}: must lie in 1..{T - more}, the schedule's number of timesteps"
        )
    points = num_steps + more
    if spacing == "linspace":
        times = np.linspace(0, T - 1, points)[::-1][:num_steps]
        return times if fractional else times.round()
    if spacing == "trailing":
        return np.round(np.arange(T, 0, -T / num_steps))[:num_steps] - 1
    times = (np.arange(points) * (T // points))[::-1][:num_steps] + float(scheduler.steps_offset)
    if times[0] >= T:
        raise ValueError(
            f"steps={num_steps}: with steps_offset={scheduler.steps_offset} they start at "
            f"{times[0]:.0f}; must be below {T}"
        )
    return times


def _flow_steps(scheduler, sampler, num_steps, named, factor, tokens) -> Steps:
    T, shift = scheduler.num_train_timesteps, scheduler.solver.flow_shift
    dynamic = None if named else scheduler.solver.dynamic
    shift = shift if dynamic is None else dynamic.shift(tokens)
    own = named or scheduler.spacing_of(sampler)
    shift = factor if named == "sd3" else 1.0 if named == "linspace" else shift

    def shifted(w):
        return shift * w / (1 + (shift - 1) * w)

    multistep = sampler in (*MULTISTEP, "dpmpp_2s", "unipc")
    if multistep and own in ("sd3", "linspace"):
        if sampler == "unipc":
            times = shifted(np.linspace(1, 1 / T, num_steps + 1)[:-1])
            times[0] -= 1e-6 if abs(times[0] - 1) < 1e-6 else 0.0
        else:
            times = shifted(1 - np.linspace(1, 1 / T, num_steps + 1))[::-1][:-1]
    elif own in ("sd3", "linspace", *RATIOS):
        least = 1 / T if dynamic else shifted(1 / T)  # it is shifted once more below
        times = shifted(np.linspace(1, least, num_steps))
        if own in RATIOS:
            times = RATIOS[own](times[-1], times[0], num_steps)
    else:
        times = np.asarray(time_grid(scheduler.schedule(), num_steps, own, factor=factor))
    reads = times.astype(np.float64) * T
    times = times.astype(np.float32)
    reads = np.floor(reads) if multistep else times * np.float32(T)
    levels = Levels(times, reads.astype(np.float32), None, np.float32(1))
    return Steps(times, None, levels)
