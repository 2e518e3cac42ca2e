"""The sections `video` and `edit` of an editing config, beside those of every config
(`contextdiff_jax.settings`).

`train` is the tuning on the clip. `model`, `text`, `context`, `diffusion` are read where
`video.model` is empty; else networks and process are the model's own, but for `context.shift` (and
all of `context` where `video.transfer_context` is off).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from contextdiff_jax.diffusion import ALWAYS
from contextdiff_jax.runtime.fields import check_at_least, check_choice, strict
from contextdiff_jax.runtime.keys import check_seed
from contextdiff_jax.settings import Settings, parse
from contextdiff_jax.settings.sampling import check_interval

CONTROLS = ("none", "replace", "refine")
AUTO = "auto"
CANDIDATES = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0)  # the strengths that `auto` tries
FORMATS = ("gif", "mp4", "webp", "apng")
METHODS = ("inversion", "sdedit", "flowedit")
INVERSIONS = ("ddim", "exact")
NEGATIVES = ("source", "empty")
TUNED = ("temporal", "all")
CHANGED, DIFFERENCE = "changed", "difference"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """The clip, the model, and how the model is laid over the clip.

    Attributes:
      path: a folder of pictures, a GIF or a film.
      prompt: what the clip shows.
      edit_prompts: one edited clip each.
      num_frames: frames that are read; 0: all.
      size: (height, width), the frames are scaled and cut to; (0, 0): as they are.
      start: the first frame that is read.
      stride: every so many frames one is read.
      model: a training run's workdir, a Stable Diffusion folder, or "": a new model, trained on the
          clip alone.
      weights: a run's `ema` or `params`.
      tune: `temporal` (temporal layers, queries and the context) or `all` parameters.
      transfer_context: start from the run's relational network, trained on pictures; else from a
          new one.
      window: frames that the networks see at a time; 0: all.
      overlap: frames that two windows share.
      remat: recompute activations in the backward pass.
      fps: of what is written.
    """

    path: str = ""
    prompt: str = ""
    edit_prompts: tuple[str, ...] = ()
    num_frames: int = 8
    size: tuple[int, int] = (0, 0)
    start: int = 0
    stride: int = 1
    model: str = ""
    weights: str = "ema"
    tune: str = "temporal"
    transfer_context: bool = True
    window: int = 0
    overlap: int = 2
    remat: bool = False
    fps: float = 8.0

    def __post_init__(self):
        check_choice("video.tune", self.tune, TUNED)
        check_choice("video.weights", self.weights, ("ema", "params"))
        check_at_least(self, "video", num_frames=0, start=0, stride=1, window=0, overlap=0, fps=1)
        if (
            len(self.size) != 2
            or min(self.size) < 0
            or (min(self.size) == 0) != (max(self.size) == 0)
        ):
            raise ValueError(
                f"video.size={self.size}: must be (height, width), or (0, 0) for the file's own"
            )
        if not self.prompt.strip():
            raise ValueError("video.prompt='': missing; say what the clip shows")
        if not self.edit_prompts or not all(
            isinstance(p, str) and p.strip() for p in self.edit_prompts
        ):
            raise ValueError(
                f"video.edit_prompts={self.edit_prompts}: must be at least one text, as in ('a "
                "red car',)"
            )
        if self.window and not self.overlap < self.window:
            raise ValueError(
                f"video.overlap={self.overlap}: must be below video.window={self.window}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditConfig:
    """Inversion and sampling. A range (from, to) is in shares of the steps made, 0 at the noisiest.

    Attributes:
      method: what the edits start from: the clip's `inversion`; the clip and noise (`sdedit`, Meng
          et al. 2022); or the clip itself, moved by the difference of its prompt's and the edit's
          estimates (`flowedit`, Kulikov et al. 2024).
      seeds: of the noise of the last two, an edited clip for each.
      steps: DDIM steps of the whole process.
      strength: the share of them that is undone and made anew: a number, one for each edit
          prompt, or `auto`: chosen for each by the model's own errors (`editing.strength`).
      guidance: its scale.
      guidance_interval: where there is guidance, as in `sample`: shares of noise b / (a + b), from
          0 (clean) to 1 (noise). Elsewhere the estimates are those of the prompts alone.
      negative: what guidance leads away from: `source`, the clip's own prompt (negative-prompt
          inversion, Miyake et al. 2023, by which guidance leaves the source as it is), or `empty`.
      inversion: `ddim`, or `exact`: solved to `tolerance`.
      iterations: calls a step that `exact` may take.
      tolerance: of `exact`.
      control: prompt-to-prompt (Hertz et al. 2022): `replace` (as many words), `refine` (aligned
          words), `none`.
      cross_range: when the words' attention is the source's.
      self_range: when the frames' attention is the source's.
      self_tokens: self-attention of finer grids than this many tokens is left alone.
      reweight: (word of the edit prompt, factor) pairs.
      blend: outside of what these words attend to the clip stays: `changed` words, given ones, or
          "" for no blending; `difference`: outside of where the edit's estimates differ from the
          source's.
      blend_threshold: share of the map's largest value, above which a place may change.
      keep: inside of what these words of the clip's prompt attend to the clip stays, as for an edit
          of the background alone.
      keep_threshold: share of their map's largest value, above which it stays.
      blend_range: when there is blending and keeping.
      formats: of the edited clips' files, of gif, mp4, webp and apng; frames are always written.
      attention_maps: write those of every word.
      clip: CLIP's folder, for its metrics.
      pickscore: PickScore's folder, for its metric.
      lpips: the file of LPIPS's weights (evaluation/networks/lpips.py).
    """

    method: str = "inversion"
    seeds: tuple[int, ...] = (0,)
    steps: int = 50
    strength: tuple[float | str, ...] = (1.0,)
    guidance: float = 3.0
    guidance_interval: tuple[float, float] = ALWAYS
    negative: str = "source"
    inversion: str = "ddim"
    iterations: int = 30
    tolerance: float = 1e-4
    control: str = "none"
    cross_range: tuple[float, float] = (0.0, 0.8)
    self_range: tuple[float, float] = (0.0, 0.5)
    self_tokens: int = 1024
    reweight: tuple[tuple[str, float], ...] = ()
    blend: str = ""
    blend_threshold: float = 0.3
    keep: tuple[str, ...] = ()
    keep_threshold: float = 0.3
    blend_range: tuple[float, float] = (0.2, 1.0)
    formats: tuple[str, ...] = ("gif", "mp4")
    attention_maps: bool = False
    clip: str = ""
    pickscore: str = ""
    lpips: str = ""

    def __post_init__(self):
        check_choice("edit.method", self.method, METHODS)
        self._check_seeds()
        check_choice("edit.control", self.control, CONTROLS)
        check_choice("edit.inversion", self.inversion, INVERSIONS)
        check_choice("edit.negative", self.negative, NEGATIVES)
        for name in self.formats:
            check_choice("edit.formats", name, FORMATS)
        check_at_least(
            self,
            "edit",
            steps=1,
            guidance=0,
            iterations=1,
            tolerance=0,
            self_tokens=0,
            blend_threshold=0,
            keep_threshold=0,
        )
        self._check_strength()
        check_interval("edit.guidance_interval", self.guidance_interval)
        for field in ("cross_range", "self_range", "blend_range"):
            value = getattr(self, field)
            if len(value) != 2 or not 0 <= value[0] <= value[1] <= 1:
                raise ValueError(
                    f"edit.{field}={value}: must be (from, to) with 0 <= from <= to <= 1"
                )
        for pair in self.reweight:
            if (
                len(pair) != 2
                or not isinstance(pair[0], str)
                or not isinstance(pair[1], (int, float))
                or not math.isfinite(pair[1])
            ):
                raise ValueError(
                    f"edit.reweight={self.reweight}: must be pairs as in (('snow', 2.0),)"
                )

    def _check_strength(self) -> None:
        words = [share for share in self.strength if isinstance(share, str)]
        if words and self.strength != (AUTO,):
            raise ValueError(f"edit.strength={self.strength}: must be numbers, or 'auto' alone")
        numbers = CANDIDATES if words else self.strength
        if not numbers or not all(0 < share <= 1 for share in numbers) or min(self.moves) < 1:
            raise ValueError(
                f"edit.strength={self.strength}: must lie in (0, 1] and leave one of {self.steps} "
                "steps"
            )

    def _check_seeds(self) -> None:
        for seed in self.seeds:
            check_seed(seed, "edit.seeds")
        if not self.seeds or len({*self.seeds}) < len(self.seeds):
            raise ValueError(f"edit.seeds={self.seeds}: must be at least one, each once")
        if self.method == "inversion" and len(self.seeds) > 1:
            raise ValueError(
                f"edit.seeds={self.seeds}: edit.method='inversion' draws no noise; leave one seed, "
                "or take another method"
            )

    @property
    def moves(self) -> tuple[int, ...]:
        """Steps that are made at each strength, or at those that `auto` tries."""
        numbers = CANDIDATES if self.automatic else self.strength
        return tuple(int(self.steps * share + 1e-6) for share in numbers)

    @property
    def automatic(self) -> bool:
        """Whether the strength is yet to be chosen."""
        return self.strength == (AUTO,)

    @property
    def blends(self) -> bool:
        """Whether the clip stays somewhere."""
        return bool(self.blend or self.keep)


class Output(NamedTuple):
    """An edited clip: by which of the prompts, strengths and, where there are several, seeds."""

    number: int
    prompt: str
    strength: float
    seed: int | None

    @property
    def name(self) -> str:
        """Its files' name."""
        return f"{self.number:02d}" + ("" if self.seed is None else f"-seed{self.seed}")

    @property
    def label(self) -> str:
        """What pictures and tables call it."""
        return f"{self.number}" + ("" if self.seed is None else f", seed {self.seed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditSettings:
    """All of an edit."""

    base: Settings
    video: VideoConfig
    edit: EditConfig

    def __post_init__(self):
        given, count = len(self.edit.strength), len(self.video.edit_prompts)
        if given not in (1, count):
            raise ValueError(
                f"edit.strength={self.edit.strength}: must be one number, or one for each of the "
                f"{count} edit prompts"
            )

    @property
    def outputs(self) -> list[Output]:
        """The edited clips that come out, prompt by prompt."""
        edit, prompts = self.edit, self.video.edit_prompts
        strengths = edit.strength * (1 if len(edit.strength) > 1 else len(prompts))
        return [
            Output(i, prompt, strength, seed if len(edit.seeds) > 1 else None)
            for i, (prompt, strength) in enumerate(zip(prompts, strengths, strict=True))
            for seed in edit.seeds
        ]


def parse_edit(config: Mapping[str, Any]) -> EditSettings:
    """Checks an editing config. ValueError, one line with field, value and what is allowed."""
    for name in ("video", "edit"):
        if name not in config:
            raise ValueError(
                f"{name}: missing; an editing config has the sections video and edit, see "
                "configs/edit_shapes.py"
            )
    rest = {name: section for name, section in config.items() if name not in ("video", "edit")}
    base = parse(rest)
    base.train.refuse_power_ema("the tuning on a clip")
    return EditSettings(
        base=base,
        video=strict(VideoConfig, "video", config["video"]),
        edit=strict(EditConfig, "edit", config["edit"]),
    )
