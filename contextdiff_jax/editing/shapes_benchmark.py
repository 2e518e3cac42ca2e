"""Editing scored exactly on moving shapes: a model with its context against one without, clip by
clip.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from contextdiff_jax.data.moving_shapes import EDITS, MovingShape, frames_of, make_moving_shape
from contextdiff_jax.data.shapes import caption
from contextdiff_jax.editing import output
from contextdiff_jax.editing.end_to_end import Programs, edit_clip
from contextdiff_jax.editing.inversion import edit_timesteps
from contextdiff_jax.editing.settings import EditSettings
from contextdiff_jax.editing.tuning import tune_quickly
from contextdiff_jax.editing.video_model import open_editor
from contextdiff_jax.evaluation.edit_scores import psnr
from contextdiff_jax.evaluation.true_edits import columns, paired, score_edit
from contextdiff_jax.runtime.files import write_json

LOGGER = logging.getLogger(__name__)
Clip = UInt8[np.ndarray, "F H W 3"]
SHOWN = 4  # clips in the strip


class Arm:
    """One pipeline: every clip is tuned on, inverted, and edited in colour and in shape."""

    def __init__(self, settings: EditSettings):
        self.settings, self.programs, self.editor = settings, Programs(), open_editor(settings)
        # refuses steps that the model's schedule hasn't, before a clip is tuned on
        edit_timesteps(self.editor.process.schedule, settings.edit)

    def __call__(self, moving: MovingShape) -> tuple[dict[str, Clip], dict[str, dict[str, float]]]:
        """(clips, scores) by edit, and of the `reconstruction`."""
        video = dataclasses.replace(
            self.settings.video,
            prompt=moving.prompt,
            edit_prompts=tuple(caption(moving.edited[name][0]) for name in EDITS),
        )
        settings, editor = dataclasses.replace(self.settings, video=video), self.editor
        source = frames_of(moving.scenes, _side(settings))
        x0, text, null = (
            editor.encode(source),
            editor.encode_text([video.prompt]),
            editor.encode_text([""]),
        )
        model = tune_quickly(
            editor.model, editor.process, x0, text, null, settings, self.programs.run
        )
        edited = edit_clip(editor, model, source, x0, settings, self.programs)
        clips = dict(zip(EDITS, edited.clips, strict=True))
        scores = {name: score_edit(clip, moving, name) for name, clip in clips.items()}
        return clips, scores | {
            "reconstruction": {"psnr": min(psnr(edited.reconstruction, source), 100.0)}
        }


def _side(settings: EditSettings) -> int:
    return settings.video.size[0] or settings.base.data.image_size


def run_benchmark(
    settings: EditSettings,
    workdir: pathlib.Path,
    count: int,
    baseline: str = "",
    first_seed: int = 0,
) -> dict[str, Any]:
    """`count` clips by the settings' pipeline and by the same one with `context.shift` none;
    `baseline` may name another model for it, one that was trained without. Writes
    shapes_benchmark.json and shapes_strip.png, anew after each clip.

    Raises ValueError for settings without a shift, and for fewer than two clips.
    """
    if count < 2:
        raise ValueError(f"--shapes={count}: must be at least 2, for a standard error")
    if settings.base.context.shift == "none":
        raise ValueError(
            "context.shift='none': is what --shapes compares with; leave context.shift as the "
            "model has it"
        )
    plain = dataclasses.replace(
        settings,
        base=dataclasses.replace(
            settings.base, context=dataclasses.replace(settings.base.context, shift="none")
        ),
        video=dataclasses.replace(settings.video, model=baseline or settings.video.model),
    )
    arms = {"context": Arm(settings), "none": Arm(plain)}
    found: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in arms}
    rows: dict[str, Clip] = {}
    frames, side = settings.video.num_frames, _side(settings)
    workdir.mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(count), desc="clips", disable=None):
        moving = make_moving_shape(first_seed + i, frames, side)
        for name, arm in arms.items():
            clips, scores = arm(moving)
            found[name].append(scores)
            if i < SHOWN:
                rows.setdefault(f"{i} source: {moving.prompt}", frames_of(moving.scenes, side))
                rows |= {
                    f"{i} {name}: {caption(moving.edited[e][0])}": clip for e, clip in clips.items()
                }
        if i:
            report = _report(settings, plain, arms, found)
            write_json(workdir / "shapes_benchmark.json", report)
        output.strip(rows).save(workdir / "shapes_strip.png")
    return report


def _report(
    settings: EditSettings, plain: EditSettings, arms: Mapping[str, Arm], found: Mapping[str, list]
) -> dict[str, Any]:
    results = {
        kind: paired(
            *(columns([scores[kind] for scores in found[name]]) for name in ("context", "none"))
        )
        for kind in (*EDITS, "reconstruction")
    }
    return {
        "clips": len(found["none"]),
        "model": settings.video.model,
        "baseline": plain.video.model,
        "edit": dataclasses.asdict(settings.edit),
        "results": results,
        "costs": {name: arm.programs.costs for name, arm in arms.items()},
        "scores": found,
    }


def table(report: Mapping[str, Any]) -> str:
    """The paired comparison as text."""
    lines = [
        f"{'edit':15} {'metric':16} {'context':>8} {'none':>8} {'difference':>11} "
        f"{'standard error':>15}"
    ]
    for kind, rows in report["results"].items():
        for name, row in rows.items():
            values = (
                f"{row['first']:8.3f} {row['second']:8.3f} {row['difference']:+11.3f} "
                f"{row['standard_error']:15.3f}"
            )
            lines.append(f"{kind:15} {name:16} {values}")
    return "\n".join(lines)
