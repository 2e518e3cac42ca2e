"""Time grids: descending times of a sampler's steps, without the clean end, which it adds itself.

`leading`, `linspace` and `trailing` are uniform in t. The others are uniform in a function of the
noise, in the terms of the ratio b / c of (14): b / a on variance-preserving schedules and on `edm`,
b / (a + b) = t on `flow`, as in diffusers' schedulers.

A discrete schedule has indices alone: the nearest in log(b / a), and no index twice. (diffusers'
solvers keep the exact b / a beside the rounded index that the network reads, and so does a Stable
Diffusion folder here, by `steps.Levels`.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from contextdiff_jax.diffusion.paths import Path
from contextdiff_jax.diffusion.schedule import (
    SPACINGS,
    NoiseSchedule,
    Schedule,
    spaced_timesteps,
)
from contextdiff_jax.runtime.fields import check_choice

# Karras et al. 2022, eq. 5: rho = 7 takes shorter steps where there is little noise.
KARRAS = 7.0


def _karras(low, high, num_steps):
    roots = np.linspace(high ** (1 / KARRAS), low ** (1 / KARRAS), num_steps)
    return roots**KARRAS


def _exponential(low, high, num_steps):
    return np.exp(np.linspace(np.log(high), np.log(low), num_steps))


RATIOS = {"karras": _karras, "exponential": _exponential}
NAMES = (*SPACINGS, *RATIOS, "logsnr", "sd3")


def time_grid(
    schedule: Schedule,
    num_steps: int,
    spacing: str | Sequence[float] | Real[Array, "S"] | Real[np.ndarray, "S"] = "trailing",
    *,
    factor: float = 3.0,
) -> Real[Array, "S"]:
    """`num_steps` descending times: int32 indices of a discrete schedule, floats of a path.

    Spacings:
      trailing, linspace, leading: uniform in t; the first starts at the noisiest time, the last
        ends at the least noisy one, `linspace` does both (Lin et al. 2023, table 2).
      karras: Karras et al. 2022, eq. 5. exponential: uniform in the ratio's logarithm.
      logsnr: uniform in log(a / b) (Lu et al. 2022).
      sd3: `linspace` in the share w of the most noise, then w <- factor w / (1 + (factor - 1) w)
        (Esser et al. 2024, eq. 23); the least w has it twice, as in diffusers.
      a list: the times themselves.

    The grids in the noise begin at the last time that has any signal: not at a = 0, nor `logsnr`
    on `flow` at t = 1, but at 1 - t_min. The schedule must be concrete (no tracer).

    Raises ValueError for an unknown spacing, a number of steps that the schedule doesn't have, or
    times that don't descend or lie outside the schedule.
    """
    if not isinstance(spacing, str):
        return _checked(schedule, num_steps, np.asarray(spacing))
    check_choice("spacing", spacing, NAMES)
    if factor <= 0:
        raise ValueError(f"factor={factor}: must be above 0")
    if isinstance(schedule, NoiseSchedule):
        if spacing in SPACINGS:
            return spaced_timesteps(schedule.num_timesteps, num_steps, spacing)
        return jnp.asarray(_indices(schedule, num_steps, spacing, factor), jnp.int32)
    if num_steps < 1:
        raise ValueError(f"steps={num_steps}: must be at least 1")
    return jnp.asarray(_times(schedule, num_steps, spacing, factor), float)


def read_spacing(
    spacing: str | Sequence[float] | Real[Array, "S"] | Real[np.ndarray, "S"],
) -> str | tuple[float, ...]:
    """The name of a spacing as it is; of a list in text, "900,600,300,0", the numbers: whole ones,
    or floats if one of them has a point.

    Raises ValueError for text that is neither.
    """
    if not isinstance(spacing, str):
        return tuple(np.asarray(spacing).tolist())
    parts = spacing.split(",")
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return tuple(map(kind, parts))
    if len(parts) > 1:
        raise ValueError(f"spacing={spacing!r}: must be numbers, as in 900,600,300,0, or one name")
    check_choice("spacing", spacing, NAMES)
    return spacing


def _times(path: Path, num_steps: int, spacing: str, factor: float) -> Float[np.ndarray, "S"]:
    low, high, steps = path.t_min, path.t_max, np.arange(num_steps)
    if spacing == "trailing":
        return high * (1 - steps / num_steps)
    if spacing == "leading":
        return low + (high - low) * (num_steps - 1 - steps) / num_steps
    if spacing == "linspace":
        return np.linspace(high, low, num_steps)
    if spacing == "sd3":
        return high * _resolution_shift(low / high, num_steps, factor)
    noise = np.array([path.noise_at(low), path.noise_at(high)])
    if not np.isfinite(noise[1]) and (spacing == "logsnr" or path.variance_preserving):
        noise[1] = path.noise_at(1 - low)
    if spacing == "logsnr":
        return path.time_at(path.ratio_at(_exponential(*noise, num_steps)))
    with np.errstate(divide="ignore"):
        return path.time_at(RATIOS[spacing](*path.ratio_at(noise), num_steps))


def _resolution_shift(least: float, num_steps: int, factor: float) -> Float[np.ndarray, "S"]:
    def shifted(w):
        return factor * w / (1 + (factor - 1) * w)

    return shifted(np.linspace(1, shifted(least), num_steps))


def _indices(
    schedule: NoiseSchedule, num_steps: int, spacing: str, factor: float
) -> Int[np.ndarray, "S"]:
    T = schedule.num_timesteps
    if not 1 <= num_steps <= T:
        raise ValueError(
            f"steps={num_steps}: must lie in 1..{T}, the schedule's number of timesteps"
        )
    if spacing == "sd3":
        wanted = T * _resolution_shift(1 / T, num_steps, factor) - 1
        return _distinct(np.round(wanted).astype(int), T - 1)
    abar, variance = (
        np.asarray(a, np.float64) for a in (schedule.alphas_cumprod, schedule.variances)
    )
    noise = np.sqrt(variance[abar > 0] / abar[abar > 0])
    if num_steps > len(noise):  # all, and one more: that without signal
        return np.arange(T)[::-1]
    grid = RATIOS.get(spacing, _exponential)(noise[0], noise[-1], num_steps)
    gaps = np.abs(np.log(grid)[:, None] - np.log(noise))
    return _distinct(gaps.argmin(1), len(noise) - 1)


def _distinct(indices: Int[np.ndarray, "S"], last: int) -> Int[np.ndarray, "S"]:
    """The nearest descending indices up to `last`: doubles move up, and down again at the end."""
    steps = np.arange(len(indices))
    rising = indices[::-1] - steps
    up = (np.maximum.accumulate(rising) + steps)[::-1]
    return np.minimum(up, last - steps)


def _checked(schedule: Schedule, num_steps: int, times: np.ndarray) -> Real[Array, "S"]:
    discrete = isinstance(schedule, NoiseSchedule)
    low, high = (0, schedule.num_timesteps - 1) if discrete else (0.0, schedule.t_max)
    if times.ndim != 1 or len(times) != num_steps:
        raise ValueError(f"spacing: a list of shape {times.shape}; must have steps={num_steps}")
    if discrete and not np.issubdtype(times.dtype, np.integer):
        raise ValueError(f"spacing: a list of {times.dtype}; must be the indices 0..{high}")
    if not (np.all(np.diff(times) < 0) and low <= times[-1] and times[0] <= high):
        raise ValueError(f"spacing={times.tolist()}: must descend, in {low}..{high}")
    if not discrete and times[-1] <= 0:
        raise ValueError(f"spacing={times.tolist()}: the last must be above 0, clean data")
    return jnp.asarray(times, jnp.int32 if discrete else float)
