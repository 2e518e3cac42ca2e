"""Editing scored where the true edit is known: a model with its context against one without, and
ways to edit against each other, clip by clip.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from contextdiff_jax.data.metadata import Fields, rows_of
from contextdiff_jax.data.moving_shapes import EDITS, frames_of, make_moving_shape
from contextdiff_jax.data.shapes import caption
from contextdiff_jax.data.video import read_clip
from contextdiff_jax.editing import output
from contextdiff_jax.editing.end_to_end import Programs, edit_clip
from contextdiff_jax.editing.inversion import edit_timesteps
from contextdiff_jax.editing.settings import AUTO, EditConfig, EditSettings
from contextdiff_jax.editing.tuning import tune_quickly
from contextdiff_jax.editing.video_model import open_editor
from contextdiff_jax.evaluation.edit_scores import psnr
from contextdiff_jax.evaluation.features import extract
from contextdiff_jax.evaluation.networks.classifier import (
    Classifier,
    feature_distance,
    load_classifier,
    split_by_attribute,
)
from contextdiff_jax.evaluation.networks.lpips import load_lpips
from contextdiff_jax.evaluation.subject import feature_fns
from contextdiff_jax.evaluation.true_edits import (
    Answers,
    columns,
    means,
    paired,
    score_edit,
    score_true_clip,
)
from contextdiff_jax.parallel.mesh import FRAME_RULES, local_mesh, tracing_for
from contextdiff_jax.runtime.fields import check_choice
from contextdiff_jax.runtime.files import write_json

Clip = UInt8[np.ndarray, "F H W 3"]
Scores = dict[str, float]
SHOWN = 4  # clips in the strip
# Other ways from the clip to the edit, by the model with the context, tuned once.
OTHERS: dict[str, dict[str, Any]] = {
    "prompt-to-prompt": dict(method="inversion", seeds=(0,), control="refine", blend="changed"),
    "sdedit": dict(method="sdedit", control="none", blend=""),
    "flowedit": dict(method="flowedit", control="none", blend=""),
    "automatic": dict(strength=(AUTO,)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A clip, its prompt, and its edits by name: their prompts, true clips, and scores."""

    source: Clip
    prompt: str
    edits: Mapping[str, str]
    score: Callable[[str, Clip], Scores]
    true: Mapping[str, Clip]


def shape_cases(count: int, frames: int, side: int, first_seed: int = 0) -> Iterator[Case]:
    """Moving shapes, edited in colour and in shape."""
    for seed in range(first_seed, first_seed + count):
        moving = make_moving_shape(seed, frames, side)
        yield Case(
            source=frames_of(moving.scenes, side),
            prompt=moving.prompt,
            edits={name: caption(moving.edited[name][0]) for name in EDITS},
            score=lambda name, clip, moving=moving: score_edit(clip, moving, name),
            true={name: frames_of(moving.edited[name], side) for name in EDITS},
        )


def clip_cases(
    folder: pathlib.Path, count: int, judge: str = "", lpips: str = ""
) -> Iterator[Case]:
    """`count` of a folder's edits.jsonl, evenly spread: rows of `source` and `target`, folders of
    frames, with their `prompt` and `edit_prompt`. `judge`, a classifier's folder, and `lpips`, the
    file of its weights, add the scores that need them.

    Raises ValueError for a folder without such rows, or with fewer.
    """
    path = folder / "edits.jsonl"
    rows = [_checked(path, row) for row in rows_of(path)]
    if len(rows) < count:
        raise ValueError(f"{path}: has {len(rows)} edits, and --benchmark={count}")
    network = load_classifier(judge) if judge else None
    answers = make_answers(network) if network else None
    distances = {"features": feature_distance(network)} if network else {}
    for i in np.linspace(0, len(rows) - 1, count).round().astype(int):
        row = rows[i]
        source, true = (
            read_clip(folder / row[name], num_frames=0) for name in ("source", "target")
        )
        if lpips and "lpips" not in distances:
            distances["lpips"] = load_lpips(lpips, *source.shape[1:3])
        yield Case(
            source=source,
            prompt=row["prompt"],
            edits={"edit": row["edit_prompt"]},
            score=lambda _, clip, source=source, true=true: score_true_clip(
                clip, source, true, answers, distances
            ),
            true={"edit": true},
        )


def cases_of(settings: EditSettings, shapes: int, clips: int, judge: str = "") -> Iterator[Case]:
    """That many moving shapes, or of the clips in `video.path`. ValueError for both."""
    if shapes and clips:
        raise ValueError(f"--shapes={shapes}, --benchmark={clips}: one of them at a time")
    video = settings.video
    if shapes:
        side = video.size[0] or settings.base.data.image_size
        return shape_cases(shapes, video.num_frames, side)
    return clip_cases(pathlib.Path(video.path), clips, judge, settings.edit.lpips)


def _checked(path: pathlib.Path, row: Fields) -> dict[str, str]:
    needed = ("source", "prompt", "target", "edit_prompt")
    if isinstance(row.fields, ValueError):
        raise ValueError(f"{path}: line {row.number}: {row.fields}")
    missing = [name for name in needed if not isinstance(row.fields.get(name), str)]
    if missing:
        raise ValueError(f"{path}: line {row.number}: no text {', '.join(missing)}")
    return row.fields


def make_answers(model: Classifier) -> Answers:
    """What a classifier sees in a clip's frames."""
    logits = feature_fns(model)["logits"]

    def answers(clip):
        parts = split_by_attribute(extract(logits, clip, batch_size=8), model.attributes)
        return {
            attribute.name: part.argmax(-1)
            for attribute, part in zip(model.attributes, parts, strict=True)
            if not attribute.multiple
        }

    return answers


class Arm:
    """One model: it is tuned on each clip, with `tunings` seeds, and edits it by each of `ways`."""

    def __init__(self, settings: EditSettings, ways: Mapping[str, EditConfig], tunings: int = 1):
        self.settings, self.ways, self.editor = settings, ways, open_editor(settings)
        self.seeds = range(settings.base.seed, settings.base.seed + tunings)
        self.programs = {name: Programs() for name in ways}
        # refuses steps that the model's schedule hasn't, before a clip is tuned on
        for edit in ways.values():
            edit_timesteps(self.editor.process.schedule, edit)

    def __call__(self, case: Case) -> dict[str, tuple[dict[str, Clip], dict[str, Scores]]]:
        """(clips, scores) by edit, and of the `reconstruction`, of each way. Of several seeds, of
        tuning and of editing, the first clips and the mean scores.
        """
        tunings = [self._tuned(case, seed) for seed in self.seeds]
        return {
            way: (
                clips,
                {kind: means([found[way][1][kind] for found in tunings]) for kind in scores},
            )
            for way, (clips, scores) in tunings[0].items()
        }

    def _tuned(self, case: Case, seed: int) -> dict[str, tuple[dict[str, Clip], dict[str, Scores]]]:
        editor, first = self.editor, next(iter(self.programs.values()))
        video = dataclasses.replace(
            self.settings.video, prompt=case.prompt, edit_prompts=tuple(case.edits.values())
        )
        settings = dataclasses.replace(self.settings, video=video)
        x0, text, null = (
            editor.encode(case.source),
            editor.encode_text([case.prompt]),
            editor.encode_text([""]),
        )
        learnt = editor.model, editor.process, x0, text, null
        edits = {}
        with tracing_for(local_mesh(), FRAME_RULES):
            model = tune_quickly(*learnt, settings, seed, first.run)
            for name, edit in self.ways.items():
                own = dataclasses.replace(settings, edit=edit)
                edits[name] = edit_clip(editor, model, case.source, x0, own, self.programs[name])
        found = {}
        for name, edited in edits.items():
            by_kind = {kind: [] for kind in case.edits}
            for row, clip in zip(edited.outputs, edited.clips, strict=True):
                by_kind[list(case.edits)[row.number]].append(clip)
            clips = {kind: seeds[0] for kind, seeds in by_kind.items()}
            scores = {
                kind: means([case.score(kind, clip) for clip in seeds])
                for kind, seeds in by_kind.items()
            }
            again = {"psnr": min(psnr(edited.reconstruction, case.source), 100.0)}
            found[name] = clips, scores | {"reconstruction": again}
        return found


def _plain(settings: EditSettings, baseline: str) -> EditSettings:
    """The same pipeline with `context.shift` none, of the model `baseline` where one is named."""
    context = dataclasses.replace(settings.base.context, shift="none")
    return dataclasses.replace(
        settings,
        base=dataclasses.replace(settings.base, context=context),
        video=dataclasses.replace(settings.video, model=baseline or settings.video.model),
    )


def run_benchmark(
    settings: EditSettings,
    workdir: pathlib.Path,
    cases: Iterator[Case],
    count: int,
    baseline: str = "",
    others: Sequence[str] = (),
    tunings: int = 1,
) -> dict[str, Any]:
    """`count` cases by the settings' pipeline and by the same one with `context.shift` none;
    `baseline` may name another model for it, one that was trained without. `others`: of `OTHERS`,
    by the model with context. `tunings`: seeds of the tuning on a clip, over which its scores are
    averaged. Writes, anew after each clip, benchmark.json, benchmark.png and
    benchmark.gif: source, edit and true edit of the first clips.

    Raises ValueError for settings without a shift, and for fewer than two clips.
    """
    for name in others:
        check_choice("--others", name, tuple(OTHERS))
    if count < 2:
        raise ValueError(f"{count} clips: must be at least 2, for a standard error")
    if settings.base.context.shift == "none":
        raise ValueError(
            "context.shift='none': is what the benchmark compares with; leave context.shift as "
            "the model has it"
        )
    plain = _plain(settings, baseline)
    ways = {"context": settings.edit} | {
        name: dataclasses.replace(settings.edit, **OTHERS[name]) for name in others
    }
    arms = [Arm(settings, ways, tunings), Arm(plain, {"none": plain.edit}, tunings)]
    found: dict[str, list[dict[str, Scores]]] = {}
    rows: dict[str, Clip] = {}
    films: list[list[Clip]] = []
    workdir.mkdir(parents=True, exist_ok=True)
    for i, case in enumerate(tqdm(cases, desc="clips", total=count, disable=None)):
        if i < SHOWN:
            rows[f"{i} source: {case.prompt}"] = case.source
            rows |= {f"{i} true: {case.edits[name]}": clip for name, clip in case.true.items()}
            films += [[case.source, clip] for clip in case.true.values()]
        for name, (clips, scores) in (pair for arm in arms for pair in arm(case).items()):
            found.setdefault(name, []).append(scores)
            if i < SHOWN:
                rows |= {f"{i} {name}: {case.edits[e]}": clip for e, clip in clips.items()}
            if i < SHOWN and name == "context":
                for film, clip in zip(films[-len(clips) :], clips.values(), strict=True):
                    film.insert(1, clip)  # between the source and the true edit
        if i:
            report = _report(settings, plain, arms, found, len(case.source))
            write_json(workdir / "benchmark.json", report)
        output.strip(rows).save(workdir / "benchmark.png")
        output.save_gif(output.mosaic(films), workdir / "benchmark.gif", settings.video.fps)
    return report


def _report(
    settings: EditSettings,
    plain: EditSettings,
    arms: Sequence[Arm],
    found: Mapping[str, list[dict[str, Scores]]],
    frames: int,
) -> dict[str, Any]:
    costs = {name: programs.costs for arm in arms for name, programs in arm.programs.items()}

    def of(way, kind):
        return columns([scores[kind] for scores in found[way]])

    kinds = found["none"][0]
    return {
        "clips": len(found["none"]),
        "tunings": len(arms[0].seeds),
        "model": settings.video.model,
        "baseline": plain.video.model,
        "edit": dataclasses.asdict(settings.edit),
        "results": {kind: paired(of("context", kind), of("none", kind)) for kind in kinds},
        "others": {
            way: {kind: paired(of(way, kind), of("context", kind)) for kind in kinds}
            for way in found
            if way not in ("context", "none")
        },
        "costs": costs,
        "a_frame": {
            name: {
                stage: {
                    "seconds": cost["seconds"] / frames,
                    "megabytes": cost["memory_megabytes"] / frames,
                }
                for stage, cost in stages.items()
            }
            for name, stages in costs.items()
        },
        "scores": found,
    }


def table(report: Mapping[str, Any]) -> str:
    """The paired comparisons as text."""
    lines = []
    comparisons = {("context", "none"): report["results"]} | {
        (name, "context"): results for name, results in report["others"].items()
    }
    for (first, second), results in comparisons.items():
        lines.append(
            f"{'edit':15} {'metric':16} {first:>16} {second:>8} {'difference':>11} "
            f"{'standard error':>15}"
        )
        for kind, rows in results.items():
            for name, row in rows.items():
                values = (
                    f"{row['first']:16.3f} {row['second']:8.3f} {row['difference']:+11.3f} "
                    f"{row['standard_error']:15.3f}"
                )
                lines.append(f"{kind:15} {name:16} {values}")
    lines.append(f"{'way':15} {'stage':16} {'seconds a frame':>16} {'megabytes a frame':>18}")
    for way, stages in report["a_frame"].items():
        for stage, cost in stages.items():
            lines.append(f"{way:15} {stage:16} {cost['seconds']:16.3f} {cost['megabytes']:18.1f}")
    return "\n".join(lines)
