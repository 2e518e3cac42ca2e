"""The sections `diffusion` and `context` of a config: the process, and what shifts it."""

from __future__ import annotations

import dataclasses

from contextdiff_jax.diffusion import NoiseSchedule, make_schedule
from contextdiff_jax.diffusion.losses import TIMESTEP_SAMPLINGS, WEIGHTINGS
from contextdiff_jax.diffusion.process import CAPTIONS, PREDICTION_TYPES, SHIFTS
from contextdiff_jax.diffusion.schedule import SCHEDULES
from contextdiff_jax.models.context import KINDS, ContextConfig
from contextdiff_jax.runtime.fields import check_at_least, check_choice

ESTIMATES = ("plugin", "posterior_mean")
SHIFTS_OF_TEXT_ALONE = ("prior", "data_normalization")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The process's schedule and the objective's weights."""

    schedule: str = "cosine"
    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    zero_terminal_snr: bool = False
    prediction_type: str = "v"
    weighting: str = "uniform"
    gamma: float = 5.0
    timestep_sampling: str = "stratified"
    prior_kl: float = 0.0  # weight of L_T

    def __post_init__(self):
        check_choice("diffusion.schedule", self.schedule, SCHEDULES)  # no paths in training yet
        check_choice("diffusion.prediction_type", self.prediction_type, PREDICTION_TYPES)
        check_choice("diffusion.weighting", self.weighting, WEIGHTINGS)
        check_choice("diffusion.timestep_sampling", self.timestep_sampling, TIMESTEP_SAMPLINGS)
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "diffusion.prediction_type='epsilon': says nothing of x0 where the SNR is 0; "
                "with zero_terminal_snr one of x0, v"
            )
        check_at_least(self, "diffusion", gamma=0, prior_kl=0)
        self.make_schedule()

    def make_schedule(self) -> NoiseSchedule:
        """The schedule these fields name."""
        return make_schedule(
            self.schedule,
            self.num_timesteps,
            self.beta_start,
            self.beta_end,
            self.zero_terminal_snr,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShiftConfig(ContextConfig):
    """The relational network (its own fields) and its use in the process."""

    shift: str = "quadratic"
    estimate: str = "plugin"
    caption: str = "true"  # what r reads where the denoiser's caption is dropped: true, dropped
    head_loss: float = 1.0  # weight of the context head's squared error (`posterior_mean`)

    def __post_init__(self):
        super().__post_init__()
        check_choice("context.shift", self.shift, SHIFTS)
        check_choice("context.estimate", self.estimate, ESTIMATES)
        check_choice("context.caption", self.caption, CAPTIONS)
        check_at_least(self, "context", head_loss=0)
        if self.shift in SHIFTS_OF_TEXT_ALONE and self.network.reads_x0:
            kinds = ", ".join(name for name, kind in KINDS.items() if not kind.reads_x0)
            raise ValueError(
                f"context.kind={self.kind!r}: context.shift={self.shift!r} doesn't vanish at t = "
                f"T, so r may not read x0; one of {kinds}"
            )
        if self.estimate == "posterior_mean" and self.time_dependent:
            raise ValueError(
                "context.time_dependent=True: context.estimate='posterior_mean' needs False"
            )
