"""diffusers' scheduler_config.json -> our noise schedule, and the steps of diffusers'
`DDIMScheduler`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from contextdiff_jax.diffusion import NoiseSchedule, make_schedule, spaced_timesteps
from contextdiff_jax.pretrained.folder_files import read_json
from contextdiff_jax.runtime.fields import check_choice

CONFIG_FILE = "scheduler_config.json"
_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
_SPACINGS = ("leading", "linspace", "trailing")
# Schedulers of networks trained on a variance-preserving schedule of betas: DDIM samples all of
# them.
_CLASSES = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "KDPM2DiscreteScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
)
# Whose `clip_sample` is on unless the file says otherwise.
_CLIPPED = ("DDIMScheduler", "DDPMScheduler")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheduler:
    """The process that a Stable Diffusion network was trained on, and DDIM's way back.

    Names and defaults are diffusers'.

    Raises ValueError with field, value and what is allowed.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False

    def __post_init__(self):
        choices = {
            "beta_schedule": _SCHEDULES,
            "prediction_type": _PREDICTIONS,
            "timestep_spacing": _SPACINGS,
        }
        for field, allowed in choices.items():
            check_choice(field, getattr(self, field), allowed)

    @property
    def prediction(self) -> str:
        """The prediction type by our name."""
        return _PREDICTIONS[self.prediction_type]

    @property
    def schedule_name(self) -> str:
        """The schedule by our name."""
        return _SCHEDULES[self.beta_schedule]

    def schedule(self) -> NoiseSchedule:
        """The noise schedule."""
        betas = self.beta_start, self.beta_end
        return make_schedule(
            self.schedule_name,
            self.num_train_timesteps,
            *betas,
            zero_terminal_snr=self.rescale_betas_zero_snr,
        )

    def steps(self, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
        """(timesteps, where each step goes), as diffusers' DDIM has them.

        A step goes T // num_steps down, which is the next timestep only if num_steps divides T and
        the spacing is not linspace. Below 0 it goes to clean data (-1), or to index 0 without
        `set_alpha_to_one`.
        """
        T = self.num_train_timesteps
        timesteps = np.array(spaced_timesteps(T, num_steps, self.timestep_spacing))
        if self.timestep_spacing == "leading":
            timesteps += self.steps_offset
        if timesteps[0] >= T:
            raise ValueError(
                f"steps={num_steps}: with steps_offset={self.steps_offset} they start at "
                f"{timesteps[0]}; must be below {T}"
            )
        following = timesteps - T // num_steps
        return timesteps, np.where(following >= 0, following, -1 if self.set_alpha_to_one else 0)


def load_scheduler(folder: str | Path, pipeline: str = "") -> Scheduler:
    """The scheduler of a pipeline's `scheduler/` folder, whichever class it names: we sample by
    DDIM.

    Args:
      pipeline: the pipeline's class: those of Stable Diffusion 1.x and 2.x put old files right.

    Raises ValueError, one line with file and field: flow matching, given betas, clipped or
    thresholded samples.
    """
    path = Path(folder) / CONFIG_FILE
    values = read_json(path, "a pipeline's scheduler folder")
    try:
        return _scheduler(values | _corrections(pipeline))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _corrections(pipeline: str) -> dict[str, Any]:
    """Changes that diffusers' pipelines of that class make to a scheduler's config.

    All networks of 1.x and 2.x were trained with an offset of 1 and samples that aren't clipped.
    """
    if not pipeline or "XL" in pipeline:
        return {}
    return {"steps_offset": 1} | ({} if "Inpaint" in pipeline else {"clip_sample": False})


def _scheduler(values: dict[str, Any]) -> Scheduler:
    name = values.get("_class_name")
    if name not in _CLASSES:
        raise ValueError(f"_class_name={name!r}: not supported; one of {', '.join(_CLASSES)}")
    if values.get("trained_betas") is not None:
        raise ValueError("trained_betas: not supported; only None")
    if (
        values.get("timestep_type") == "continuous"
        and values.get("prediction_type") == "v_prediction"
    ):
        raise ValueError(
            "timestep_type='continuous' with prediction_type='v_prediction': not supported (the "
            "network reads log-variances, not timesteps); only 'discrete'"
        )
    for field, default in (("clip_sample", name in _CLIPPED), ("thresholding", False)):
        if values.get(field, default):
            raise ValueError(
                f"{field}=True: not supported; only False (it is for networks of pictures)"
            )
    fields = {field.name for field in dataclasses.fields(Scheduler)}
    return Scheduler(**{key: value for key, value in values.items() if key in fields})
