"""The sections `diffusion` and `context` of a config: the process, and what shifts it."""

from __future__ import annotations

import dataclasses

from contextdiff_jax.diffusion import Schedule, make_schedule
from contextdiff_jax.diffusion.losses import TIMESTEP_SAMPLINGS, WEIGHTINGS
from contextdiff_jax.diffusion.paths import PATHS
from contextdiff_jax.diffusion.process import CAPTIONS, MOTIONS, SHIFTS, TARGETS
from contextdiff_jax.diffusion.schedule import NAMES
from contextdiff_jax.models.context import ContextConfig
from contextdiff_jax.models.context_kinds import KINDS
from contextdiff_jax.runtime.fields import check_at_least, check_choice

ESTIMATES = ("plugin", "posterior_mean", "velocity")
# Those that don't vanish where there is only noise: r may not read x0 there.
SHIFTS_OF_TEXT_ALONE = ("prior", "data_normalization", "constant")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The process's schedule or path, and the objective's weights.

    `num_timesteps`, `beta_*` and `zero_terminal_snr` are of discrete schedules alone.
    """

    # a discrete schedule or a path in continuous time, which a_t and b_t come from
    schedule: str = "cosine"
    num_timesteps: int = 1000  # T of a discrete schedule
    beta_start: float = 1e-4  # of linear and scaled_linear, at t = 0
    beta_end: float = 2e-2  # of linear and scaled_linear, at t = T - 1
    zero_terminal_snr: bool = False  # moves the schedule so that its last step is noise alone
    prediction_type: str = "v"  # what the network predicts
    weighting: str = "uniform"  # of the loss over t: the same one for every target
    gamma: float = 5.0  # of weighting=min_snr and p2
    timestep_sampling: str = "stratified"  # how a batch's timesteps are drawn
    timestep_scale: float = 1.0  # of `logit_normal` and `mode`
    prior_kl: float = 0.0  # weight of L_T

    def __post_init__(self):
        check_choice("diffusion.schedule", self.schedule, NAMES)
        check_choice("diffusion.prediction_type", self.prediction_type, TARGETS)
        check_choice("diffusion.weighting", self.weighting, WEIGHTINGS)
        check_choice("diffusion.timestep_sampling", self.timestep_sampling, TIMESTEP_SAMPLINGS)
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "diffusion.prediction_type='epsilon': says nothing of x0 where the SNR is 0; "
                "with zero_terminal_snr one of x0, v"
            )
        if self.schedule == "edm" and self.prediction_type == "v":
            raise ValueError(
                "diffusion.prediction_type='v': grows with the noise where diffusion.schedule="
                "'edm'; one of x0, epsilon, velocity, data"
            )
        check_at_least(self, "diffusion", gamma=0, prior_kl=0)
        self.make_schedule()

    def make_schedule(self) -> Schedule:
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

    shift: str = "quadratic"  # k_t, with which r enters x_t
    estimate: str = "plugin"  # where the reverse process takes r from
    caption: str = "true"  # what r reads where the denoiser's caption is dropped: true, dropped
    head_loss: float = 1.0  # weight of the context head's squared error (`posterior_mean`)
    fixed_target: bool = False  # the target doesn't train r, though r is a part of it
    # of the kind `gaussian_source`: weight of KL(N(0, sigma^2) || N(0, 1)) in nats a value
    variance_kl: float = 0.0
    alignment: float = 0.0  # of the same: weight of 1 - the cosine of the path's begin and x0

    def __post_init__(self):
        super().__post_init__()
        check_choice("context.shift", self.shift, SHIFTS)
        check_choice("context.estimate", self.estimate, ESTIMATES)
        check_choice("context.caption", self.caption, CAPTIONS)
        check_at_least(self, "context", head_loss=0, variance_kl=0, alignment=0)
        if (self.variance_kl or self.alignment) and not self.network.reads_noise:
            kinds = ", ".join(name for name, kind in KINDS.items() if kind.reads_noise)
            raise ValueError(
                f"context.kind={self.kind!r}: context.variance_kl and context.alignment are for "
                f"{kinds}"
            )
        if self.shift in SHIFTS_OF_TEXT_ALONE and self.network.reads_x0:
            kinds = ", ".join(name for name, kind in KINDS.items() if not kind.reads_x0)
            raise ValueError(
                f"context.kind={self.kind!r}: context.shift={self.shift!r} doesn't vanish at t = "
                f"T, so r may not read x0; one of {kinds}"
            )
        if self.estimate == "posterior_mean" and self.moves:
            field = "time_dependent=True" if self.time_dependent else f"kind={self.kind!r}"
            raise ValueError(
                f"context.{field}: r depends on t, and context.estimate='posterior_mean' gives one "
                "for all times"
            )


def check_process(diffusion: DiffusionConfig, context: ShiftConfig) -> None:
    """Raises ValueError for a context that its process has no use for, or no estimate of."""
    target, estimate, kind = diffusion.prediction_type, context.estimate, context.network
    schedule = diffusion.make_schedule()
    if kind.is_zero:
        return
    if diffusion.schedule == "edm" and context.shift in ("quadratic", "prior"):
        raise ValueError(
            f"context.shift={context.shift!r}: is 0 at all times where diffusion.schedule='edm' "
            "(a = 1); another schedule, or context.kind='none'"
        )
    if estimate == "velocity" and target not in MOTIONS:
        raise ValueError(
            f"diffusion.prediction_type={target!r}: context.estimate='velocity' needs one of "
            f"{', '.join(MOTIONS)}"
        )
    if target in MOTIONS and estimate == "plugin" and not context.is_known:
        raise ValueError(
            f"context.estimate='plugin': needs x0, and diffusion.prediction_type={target!r} has "
            "none without r; one of velocity, posterior_mean"
        )
    if kind.reads_noise and estimate == "plugin":
        raise ValueError(
            f"context.estimate='plugin': context.kind={context.kind!r} reads the noise of x_t; one "
            "of velocity, posterior_mean"
        )
    if context.moves and target in MOTIONS and not schedule.continuous:
        raise ValueError(
            f"diffusion.prediction_type={target!r}: r depends on t, and diffusion.schedule="
            f"{diffusion.schedule!r} has no derivative in t; one of {', '.join(PATHS)}"
        )
    if kind.moves and diffusion.schedule != "flow":
        raise ValueError(
            f"diffusion.schedule={diffusion.schedule!r}: must be 'flow' for "
            f"context.kind={context.kind!r}"
        )
    if kind.reads_noise and context.shift != "prior":
        raise ValueError(
            f"context.shift={context.shift!r}: context.kind={context.kind!r} is for 'prior'"
        )
