"""The section `distill` of a config."""

from __future__ import annotations

import dataclasses
import math
import typing

from contextdiff_jax.diffusion.process import MOTIONS
from contextdiff_jax.runtime.fields import check_at_least

if typing.TYPE_CHECKING:
    from contextdiff_jax.settings import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Training of a model that takes `steps` steps where its teacher takes many."""

    teacher: str = ""  # a trained run's folder; empty: no distillation
    steps: int = 8  # of the student
    substeps: int = 4  # of the teacher, for one of the student's
    guidance: float = 1.0  # the teacher's scale, which the student then has without a second branch

    def __post_init__(self):
        check_at_least(self, "distill", steps=1, substeps=2)
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"distill.guidance={self.guidance}: must be finite and not negative")


def check_student(settings: Settings) -> None:
    """Raises ValueError for a student that can't learn how far its teacher moves x."""
    context, sample = settings.context, settings.sample
    if settings.diffusion.prediction_type not in MOTIONS:
        raise ValueError(
            f"diffusion.prediction_type={settings.diffusion.prediction_type!r}: a distilled model "
            f"predicts how x moves; one of {', '.join(MOTIONS)}"
        )
    if not context.network.is_zero and (context.estimate != "velocity" or context.is_known):
        raise ValueError(
            f"context.estimate={context.estimate!r}, context.kind={context.kind!r}: a distilled "
            "model has no estimate of r; 'velocity' and a kind that reads x0, or 'none'"
        )
    schedule, count = settings.process.schedule, settings.distill.steps * settings.distill.substeps
    if not schedule.continuous and count > schedule.num_timesteps:
        raise ValueError(
            f"distill.steps={settings.distill.steps}, distill.substeps={settings.distill.substeps}:"
            f" {count} steps; diffusion.num_timesteps={schedule.num_timesteps}"
        )
    if (sample.steps, sample.spacing) != (settings.distill.steps, "trailing") or (
        sample.sampler not in ("ddim", "euler")
    ):
        raise ValueError(
            f"sample.steps={sample.steps}, sample.spacing={sample.spacing!r}, sample.sampler="
            f"{sample.sampler!r}: must be those that are learned, distill.steps="
            f"{settings.distill.steps}, 'trailing', and 'ddim' or 'euler'"
        )
    if settings.distill.guidance != 1 and sample.guidance != 1:
        raise ValueError(
            f"sample.guidance={sample.guidance}: distill.guidance={settings.distill.guidance} is "
            "in the student already; 1"
        )
