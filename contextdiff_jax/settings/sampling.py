"""The section `sample` of a config."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jaxtyping import Real

from contextdiff_jax.diffusion import ALWAYS, Process, Schedule, get_sampler, time_grid
from contextdiff_jax.diffusion.grids import read_spacing
from contextdiff_jax.diffusion.samplers import adds_noise, check_eta, check_takes


def check_interval(name: str, interval: tuple[float, float]) -> None:
    """Raises ValueError unless these are two shares of noise (`diffusion.noise_share`)."""
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(
            f"{name}={interval}: must be two shares of noise b / (a + b), ascending, from 0 "
            "(clean) to 1 (noise)"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Options of the pictures in DIR/samples, and the `sample` command's defaults."""

    prompts: tuple[str, ...] = ()  # empty: captions of held-out (else training) records
    sampler: str = "ddim"  # method, by name
    steps: int = 50  # of the sampler
    eta: float = 0.0  # noise of ddim: 0 none, 1 as much as ddpm
    guidance: float = 3.0  # scale of classifier-free guidance; 1: none
    # share of the picture that is set back to its deviation without guidance
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = ALWAYS  # where there is guidance: shares of noise
    context_scale: float = 1.0  # the estimate of r is multiplied by it
    dynamic_threshold: float = 0.0  # a percentile; 0: x0 is clipped to [-1, 1]
    spacing: str | tuple[float, ...] = "trailing"  # of `time_grid`, or times; "": a folder's own
    spacing_factor: float = 3.0  # of spacing=sd3
    steps_offset: int = 0  # as in diffusers' schedulers: all timesteps moved up
    set_alpha_to_one: bool = (
        True  # as in diffusers' DDIM: False ends at timestep 0, not at clean data
    )
    augmentation: float = 0.0  # level of the noise on an upsampler's low-resolution picture
    reuse: int = 1  # the UNet's coarser levels are computed in every so many steps (DeepCache)

    def __post_init__(self):
        get_sampler(self.sampler)
        check_eta(self.eta)
        if self.spacing:
            read_spacing(self.spacing)
        if not 0 < self.spacing_factor < math.inf:
            raise ValueError(f"spacing_factor={self.spacing_factor}: must be finite and above 0")
        for field in ("guidance", "context_scale"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field}={getattr(self, field)}: must be finite and not negative")
        check_interval("guidance_interval", self.guidance_interval)
        for field, most in (
            ("guidance_rescale", 1),
            ("dynamic_threshold", 100),
            ("augmentation", 1),
        ):
            if not 0 <= getattr(self, field) <= most:
                raise ValueError(f"{field}={getattr(self, field)}: must lie in [0, {most}]")
        if self.steps < 1 or self.steps_offset < 0:
            raise ValueError(
                f"steps={self.steps}, steps_offset={self.steps_offset}: must be at least 1 and 0"
            )
        if self.reuse < 1 or self.steps % self.reuse:
            raise ValueError(
                f"reuse={self.reuse}: must be a positive divisor of steps={self.steps}"
            )
        if self.reuse > 1:
            check_takes(self.sampler, "reuse", f"reuse={self.reuse}")

    def changed(self, **given: Any) -> SampleConfig:
        """These options with the given ones; a list of times says how many steps there are."""
        if isinstance(times := read_spacing(given.get("spacing") or "trailing"), tuple):
            given = {"steps": len(times)} | given | {"spacing": times}
        return dataclasses.replace(self, **given)

    def times(self, schedule: Schedule) -> Real[np.ndarray, "S"]:
        """The descending times of the steps: indices of a discrete schedule, floats of a path.

        Raises ValueError for times or a number of steps that the schedule doesn't have.
        """
        spacing = read_spacing(self.spacing)
        with jax.ensure_compile_time_eval():
            return np.asarray(time_grid(schedule, self.steps, spacing, factor=self.spacing_factor))


def check_sampling(process: Process, options: SampleConfig) -> None:
    """Raises ValueError for options of sampling that don't fit the process."""
    schedule = process.schedule
    if not schedule.continuous and options.steps > schedule.num_timesteps:
        raise ValueError(
            f"sample.steps={options.steps}: must lie in 1..{schedule.num_timesteps}, "
            "diffusion.num_timesteps"
        )
    if not process.estimates_context and adds_noise(options.sampler, options.eta):
        raise ValueError(
            f"sampler={options.sampler!r}, eta={options.eta}: noise needs an estimate of r, and "
            "context.estimate='velocity' has none; a sampler without noise, or a run with "
            "'posterior_mean'"
        )
    if not process.estimates_context and (options.dynamic_threshold or options.context_scale != 1):
        raise ValueError(
            f"dynamic_threshold={options.dynamic_threshold}, context_scale={options.context_scale}:"
            " are of x0 and of r, and context.estimate='velocity' has only both together; 0 and 1"
        )
