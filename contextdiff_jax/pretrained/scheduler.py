"""diffusers' scheduler_config.json -> our noise schedule, and which of our samplers is meant.

The steps that each of diffusers' schedulers makes of it: `scheduler_steps.py`.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from contextdiff_jax.data.tokenizer import is_sd3_class
from contextdiff_jax.diffusion import Flow, Schedule, make_schedule, spaced_timesteps
from contextdiff_jax.pretrained.folder_files import read_json
from contextdiff_jax.runtime.fields import check_choice

CONFIG_FILE = "scheduler_config.json"
_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {
    "epsilon": "epsilon",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "velocity",
}
_SPACINGS = ("leading", "linspace", "trailing")
_FLOW_MATCH = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
# Our sampler by their class; None: by its options, "": none, DDIM takes its place.
_CLASSES = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "",
    "LMSDiscreteScheduler": "",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "ddpm",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": None,
    "DPMSolverSinglestepScheduler": "dpmpp_2s",
    "KDPM2DiscreteScheduler": "",
    "UniPCMultistepScheduler": "unipc",
    "DEISMultistepScheduler": "",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
}
_MULTISTEP = {
    ("dpmsolver++", 2): "dpmpp_2m",
    ("dpmsolver++", 3): "dpmpp_3m",
    ("sde-dpmsolver++", 2): "dpmpp_2m_sde",
}
_LEVELS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_lu_lambdas": "logsnr",
}
# What our samplers have of their options, the default first.
_OFF = (False, None)
_DPM = {
    "solver_type": ("midpoint", "logrho", "bh1", "bh2"),  # diffusers takes the last three for it
    "lambda_min_clipped": (-math.inf, None),
    "variance_type": (None,),
    "use_beta_sigmas": _OFF,
    "use_dynamic_shifting": _OFF,
}
_SUPPORTED = {
    "DDPMScheduler": {"variance_type": ("fixed_small", "fixed_small_log")},
    "EulerDiscreteScheduler": {
        "interpolation_type": ("linear",),
        "sigma_min": (None,),
        "sigma_max": (None,),
        "use_beta_sigmas": _OFF,
    },
    "HeunDiscreteScheduler": {"use_beta_sigmas": _OFF},
    "DPMSolverMultistepScheduler": _DPM,
    "DPMSolverSinglestepScheduler": {
        "algorithm_type": ("dpmsolver++", "deis"),
        "solver_order": (2,),
        "final_sigmas_type": ("zero",),
        **_DPM,
    },
    "UniPCMultistepScheduler": {
        "solver_order": (2,),
        "solver_type": ("bh2", "midpoint", "heun", "logrho"),
        "predict_x0": (True,),
        "lower_order_final": (True,),
        "disable_corrector": ([],),
        "solver_p": (None,),
        "sigma_min": (None,),
        "sigma_max": (None,),
        "shift_terminal": (None,),
        "use_beta_sigmas": _OFF,
        "use_dynamic_shifting": _OFF,
    },
    "FlowMatchEulerDiscreteScheduler": {
        "use_dynamic_shifting": _OFF,
        "invert_sigmas": _OFF,
        "shift_terminal": (None,),
        "use_beta_sigmas": _OFF,
        "stochastic_sampling": _OFF,
    },
}
# Whose `clip_sample` is on unless the file says otherwise.
_CLIPPED = ("DDIMScheduler", "DDPMScheduler")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicShift:
    """`use_dynamic_shifting` of the flow-matching Euler scheduler, its names and defaults: times
    of a picture of more tokens are moved further towards noise.
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: str = "exponential"

    def __post_init__(self):
        check_choice("time_shift_type", self.time_shift_type, ("exponential", "linear"))

    def shift(self, tokens: int) -> float:
        """The factor for a picture of so many tokens."""
        tokens_apart = self.max_image_seq_len - self.base_image_seq_len
        slope = (self.max_shift - self.base_shift) / tokens_apart
        mu = self.base_shift + slope * (tokens - self.base_image_seq_len)
        return math.exp(mu) if self.time_shift_type == "exponential" else mu


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solver:
    """The way back that a scheduler's class and options name.

    Attributes:
      sampler: ours. note: what of it isn't supported, for people; the sampler is then `ddim`.
      levels: `karras`, `exponential` or `logsnr` where the noise levels aren't those of uniform
        times, else "".
      final_sigmas_type: the end, `zero` or `sigma_min`.
      flow, flow_shift: whether the path is `flow`, and how far its times are moved towards noise;
        dynamic: how far instead by the picture's size.
    """

    sampler: str = "ddim"
    note: str = ""
    levels: str = ""
    final_sigmas_type: str = "zero"
    flow: bool = False
    flow_shift: float = 1.0
    dynamic: DynamicShift | None = None

    def __post_init__(self):
        check_choice("final_sigmas_type", self.final_sigmas_type, ("zero", "sigma_min"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheduler:
    """The process that a Stable Diffusion network was trained on, and the way back.

    Names and defaults are diffusers'; `class_name` is the scheduler's own class.

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
    # How it is sampled is no part of what it is: an edit's tuning is known by this `repr`.
    class_name: str = dataclasses.field(default="DDIMScheduler", repr=False)
    solver: Solver = dataclasses.field(default=Solver(), repr=False)

    def __post_init__(self):
        choices = {
            "beta_schedule": _SCHEDULES,
            "prediction_type": _PREDICTIONS,
            "timestep_spacing": _SPACINGS,
        }
        for field, allowed in choices.items():
            check_choice(field, getattr(self, field), allowed)
        if self.is_flow and self.prediction_type == "v_prediction":
            raise ValueError(
                "prediction_type='v_prediction': not supported with use_flow_sigmas=True; one of "
                "epsilon, sample, flow_prediction"
            )
        if not self.is_flow and self.prediction_type == "flow_prediction":
            raise ValueError("prediction_type='flow_prediction': needs use_flow_sigmas=True")

    @property
    def is_flow(self) -> bool:
        """Whether the path is `flow`, not a schedule of betas."""
        return self.solver.flow

    @property
    def prediction(self) -> str:
        """The prediction type by our name."""
        return _PREDICTIONS[self.prediction_type]

    @property
    def schedule_name(self) -> str:
        """The schedule by our name."""
        if self.is_flow:
            return "flow"
        return _SCHEDULES[self.beta_schedule]

    def spacing_of(self, sampler: str) -> str:
        """The spacing, by our name, that diffusers' scheduler of this sampler has here."""
        if sampler in ("ddim", "ddpm") and not self.is_flow:
            return self.timestep_spacing
        if self.is_flow:
            uniform = not self.solver.levels or self.class_name not in _FLOW_MATCH
            return "sd3" if uniform else self.solver.levels
        uniform = "linspace" if sampler == "dpmpp_2s" else self.timestep_spacing  # it has no other
        return self.solver.levels or uniform

    def schedule(self) -> Schedule:
        """The noise schedule."""
        if self.is_flow:
            return Flow(t_min=1 / self.num_train_timesteps)
        betas = self.beta_start, self.beta_end
        return make_schedule(
            self.schedule_name,
            self.num_train_timesteps,
            *betas,
            zero_terminal_snr=self.rescale_betas_zero_snr,
        )

    def steps(self, num_steps: int, spacing: str = "") -> tuple[np.ndarray, np.ndarray]:
        """(timesteps, where each step goes), as diffusers' DDIM has them; `spacing` in the place of
        `timestep_spacing`.

        A step goes T // num_steps down, which is the next timestep only if num_steps divides T and
        the spacing is not linspace. Below 0 it goes to clean data (-1), or to index 0 without
        `set_alpha_to_one`.
        """
        T, spacing = self.num_train_timesteps, spacing or self.timestep_spacing
        timesteps = np.array(spaced_timesteps(T, num_steps, spacing))
        if spacing == "leading":
            timesteps += self.steps_offset
        if timesteps[0] >= T:
            raise ValueError(
                f"steps={num_steps}: with steps_offset={self.steps_offset} they start at "
                f"{timesteps[0]}; must be below {T}"
            )
        following = timesteps - T // num_steps
        return timesteps, np.where(following >= 0, following, -1 if self.set_alpha_to_one else 0)


def load_scheduler(folder: str | Path, pipeline: str = "") -> Scheduler:
    """The scheduler of a pipeline's `scheduler/` folder. A class or an option that no sampler of
    ours has is said in `solver.note`.

    Args:
      pipeline: the pipeline's class: those of Stable Diffusion 1.x and 2.x put old files right,
        those of 3 have the shift that follows the size (`DynamicShift`).

    Raises ValueError, one line with file and field: given betas, clipped or thresholded samples.
    """
    path = Path(folder) / CONFIG_FILE
    values = read_json(path, "a pipeline's scheduler folder")
    dynamic = None
    try:
        if is_sd3_class(pipeline) and values.get("use_dynamic_shifting"):
            names = {field.name for field in dataclasses.fields(DynamicShift)} & values.keys()
            dynamic = DynamicShift(**{name: values[name] for name in names})
            values = values | {"use_dynamic_shifting": False}
        scheduler = _scheduler(values | _corrections(pipeline))
        solver = dataclasses.replace(scheduler.solver, dynamic=dynamic)
        return dataclasses.replace(scheduler, solver=solver)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _corrections(pipeline: str) -> dict[str, Any]:
    """Changes that diffusers' pipelines of that class make to a scheduler's config.

    All networks of 1.x and 2.x were trained with an offset of 1 and samples that aren't clipped.
    """
    if not pipeline or "XL" in pipeline or is_sd3_class(pipeline):
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
    flow = name in _FLOW_MATCH or bool(values.get("use_flow_sigmas"))
    values = values | ({"prediction_type": "flow_prediction"} if name in _FLOW_MATCH else {})
    fields = {field.name for field in dataclasses.fields(Scheduler)} - {"class_name", "solver"}
    return Scheduler(
        **{key: value for key, value in values.items() if key in fields},
        class_name=name,
        solver=_solver(name, values, flow),
    )


def _solver(name: str, values: dict[str, Any], flow: bool) -> Solver:
    sampler, note = _CLASSES[name], ""
    for field, allowed in _SUPPORTED.get(name, {}).items():
        if values.get(field, allowed[0]) not in allowed:
            note = f"{field}={values[field]!r}"
    end = values.get("final_sigmas_type", "zero")
    if sampler is None:
        algorithm = values.get("algorithm_type", "dpmsolver++").replace("deis", "dpmsolver++")
        order = values.get("solver_order", 2)
        sampler = _MULTISTEP.get((algorithm, order), "")
        if not sampler:
            note = f"algorithm_type={algorithm!r} with solver_order={order}"
        elif (order > 2 or end != "zero") and not values.get("lower_order_final", True):
            note = "lower_order_final=False"
    if flow and end != "zero":
        note = f"final_sigmas_type={end!r} with use_flow_sigmas"
    if note or not sampler:
        sampler = "ddim"
        note = f"{name}{' with ' if note else ''}{note}: not supported; sampled by ddim"
    chosen = [ours for flag, ours in _LEVELS.items() if values.get(flag)]
    return Solver(
        sampler=sampler,
        note=note,
        levels=chosen[0] if chosen else "",
        final_sigmas_type=end,
        flow=flow,
        flow_shift=values.get("shift" if name in _FLOW_MATCH else "flow_shift", 1.0),
    )
