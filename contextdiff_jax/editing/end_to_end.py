"""An edit from end to end. Read it from top to bottom."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import pathlib
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped, UInt8
from PIL import Image

from contextdiff_jax.data.video import read_clip
from contextdiff_jax.editing import output, page
from contextdiff_jax.editing.attention import align, blend_mask
from contextdiff_jax.editing.denoise import first_row
from contextdiff_jax.editing.edits import MOVERS
from contextdiff_jax.editing.inversion import edit_timesteps
from contextdiff_jax.editing.settings import CANDIDATES, EditSettings, Output
from contextdiff_jax.editing.stages import make_stages
from contextdiff_jax.editing.strength import at_every_strength, choices, make_fits
from contextdiff_jax.editing.tuning import TUNED_ON, check_workdir, tune
from contextdiff_jax.editing.video_model import Editor, digest, open_editor
from contextdiff_jax.evaluation import edit_scores as scores
from contextdiff_jax.evaluation.networks.lpips import Distance, load_lpips
from contextdiff_jax.models.video import VideoDiffusion
from contextdiff_jax.parallel.mesh import FRAME_RULES, make_mesh, tracing_for
from contextdiff_jax.runs import checkpoints
from contextdiff_jax.runtime.errors import RunError
from contextdiff_jax.runtime.files import write_json

LOGGER = logging.getLogger(__name__)
Clip = UInt8[np.ndarray, "F H W 3"]


class Programs:
    """Compiles each stage once; notes what it takes: seconds (compilation apart) and memory on a
    device.
    """

    def __init__(self):
        self.costs: dict[str, dict[str, float]] = {}
        self._compiled: dict[str, Callable[..., Any]] = {}

    def run(self, stage: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(*arguments), compiled at the stage's first call: later ones must have the same
        shapes.
        """
        if stage not in self._compiled:
            start = time.perf_counter()
            self._compiled[stage] = compiled = jax.jit(function).lower(*arguments).compile()
            memory = compiled.memory_analysis()
            self.costs[stage] = {
                "compile_seconds": time.perf_counter() - start,
                "memory_megabytes": (memory.temp_size_in_bytes + memory.argument_size_in_bytes)
                / 2**20,
            }
        start = time.perf_counter()
        result = jax.block_until_ready(self._compiled[stage](*arguments))
        self.costs[stage]["seconds"] = time.perf_counter() - start
        return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edited:
    """Clips of an edit.

    Attributes:
      reconstruction: of the source, by its own prompt. error: mean absolute difference to x0, as
          the networks see it.
      outputs: what each of the edited clips is.
      clips: one an output.
      masks: where each of them may differ from the source (all of it without blending).
      maps: the attention of the changed words, of the source and of each output; 0 where nothing
          was asked for.
      choices: what was chosen for each edit prompt, and by what (`strength.choose`), where that was
          asked for.
    """

    reconstruction: Clip
    error: float
    outputs: list[Output]
    clips: list[Clip]
    masks: list[np.ndarray]
    maps: Float[np.ndarray, "P F H W"]
    choices: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def chosen(self, choices: list[dict[str, Any]]) -> Edited:
        """The outputs of the strengths that were chosen, numbered as the prompts are."""
        each = len(CANDIDATES)
        kept = [
            i
            for i, row in enumerate(self.outputs)
            if row.strength == choices[row.number // each]["strength"]
        ]
        return dataclasses.replace(
            self,
            outputs=[self.outputs[i]._replace(number=self.outputs[i].number // each) for i in kept],
            clips=[self.clips[i] for i in kept],
            masks=[self.masks[i] for i in kept],
            maps=self.maps[[0, *(1 + i for i in kept)]],
            choices=choices,
        )


def edit_clip(
    editor: Editor,
    model: VideoDiffusion,
    clip: Clip,
    x0: Float[Array, "1 F H W C"],
    settings: EditSettings,
    programs: Programs,
) -> Edited:
    """Inversion, reconstruction and all edits of a clip, x0 as the networks see it, by a tuned
    model.
    """
    automatic = settings.edit.automatic
    settings = at_every_strength(settings) if automatic else settings
    video, edit, process = settings.video, settings.edit, editor.process
    text, null = editor.encode_text([video.prompt, *video.edit_prompts]), editor.encode_text([""])
    alignment = align(
        video.prompt, video.edit_prompts, editor.count_tokens, editor.text_length, edit
    )
    graph, state = nnx.split(model)

    stages = make_stages(graph, process, settings)
    path = programs.run("inversion", stages.inversion, state, x0, first_row(text))
    back = path[0, 0]
    if not MOVERS[edit.method].keeps_source:
        rest = state, path[0, -1], first_row(text)
        back = programs.run("reconstruction", stages.reconstruction, *rest)
    check_finite(back, "the reconstruction: its values are not finite; lower train.learning_rate")
    again, error = editor.decode(back), float(jnp.abs(back - x0).mean())
    psnr, ssim = scores.psnr(again, clip), scores.ssim(again, clip)
    LOGGER.info("reconstruction: PSNR %.2f dB, SSIM %.4f, mean error of x0 %.1e", psnr, ssim, error)
    clips, maps = programs.run("editing", stages.editing, state, path, text, null, alignment)
    frames = []
    for row, values in zip(settings.outputs, _by_prompt(clips[:, 1:]), strict=True):
        check_finite(
            values, f"the edit {row.prompt!r}: its values are not finite; lower edit.guidance"
        )
        frames.append(editor.decode(values[None]))
    full = jax.vmap(lambda m: jax.image.resize(m, (*m.shape[:2], *clip.shape[1:3]), "linear"))(maps)
    inside = jax.vmap(lambda m: blend_mask(m, edit))(full)[..., 0]
    source, own, _ = np.split(np.asarray(full), 3, axis=1)
    edited = Edited(
        reconstruction=again,
        error=error,
        outputs=settings.outputs,
        clips=frames,
        masks=list(np.asarray(_by_prompt(inside)) > 0),
        maps=np.concatenate([source.max((0, 1))[None], _by_prompt(own)]),
    )
    if not automatic:
        return edited
    fits = make_fits(graph, process, settings)
    fits = functools.partial(programs.run, "strength of an edit", fits, state)
    return edited.chosen(choices(fits, clips, text, video.edit_prompts))


def _by_prompt(rows: Shaped[ArrayLike, "S E *D"]) -> Shaped[ArrayLike, "N *D"]:
    """Rows of each seed and prompt in the order of `EditSettings.outputs`."""
    return rows.swapaxes(0, 1).reshape(-1, *rows.shape[2:])


def check_finite(values: Float[Array, "..."], message: str) -> None:
    """Raises RunError for a clip that would be written, and measured, as black pictures."""
    if not bool(jnp.isfinite(values).all()):
        raise RunError(message)


def run_edit(
    settings: EditSettings, config: Mapping[str, Any], workdir: pathlib.Path
) -> dict[str, Any]:
    """Reads the clip, tunes on it (or takes up the tuning in `workdir`), edits, writes all and the
    metrics, which are returned. `config` is what config.json records.

    Raises ValueError for what the user must change.
    """
    video, programs = settings.video, Programs()
    size = tuple(video.size) if max(video.size) else None
    clip = read_clip(
        video.path, num_frames=video.num_frames, start=video.start, stride=video.stride, size=size
    )
    mesh = make_mesh(settings.base.mesh)
    ways = mesh.shape["sequence"]
    if len(clip) % ways:
        raise ValueError(f"mesh.sequence={ways}: must divide the number of frames, {len(clip)}")
    editor = open_editor(settings)
    editor.check_size(clip)
    # Refused now, not after the tuning.
    align(video.prompt, video.edit_prompts, editor.count_tokens, editor.text_length, settings.edit)
    edit_timesteps(editor.process.schedule, settings.edit)
    config = {**config, TUNED_ON: {"clip": digest(clip), "model": editor.source}}
    check_workdir(workdir, config, settings)
    judges = open_judges(settings, *clip.shape[1:3])

    x0 = jax.device_put(editor.encode(clip), NamedSharding(mesh, PartitionSpec(None, "sequence")))
    start = time.perf_counter()
    text, null = editor.encode_text([video.prompt]), editor.encode_text([""])
    with tracing_for(mesh, FRAME_RULES):
        model = tune(editor.model, editor.process, x0, text, null, settings, config, workdir, mesh)
        programs.costs["tuning"] = {"seconds": time.perf_counter() - start}
        edited = edit_clip(editor, model, clip, x0, settings, programs)
    metrics = measure(clip, edited, settings, judges) | {
        "context_gain": float(model.context.gain),
        "frames": len(clip),
        "size": list(clip.shape[1:3]),
        "costs": programs.costs,
    }
    with checkpoints.writing(workdir, "the edited clips"):
        write(clip, edited, settings, metrics, workdir)
    return metrics


class Judges(NamedTuple):
    """Networks that score a clip: of its prompt, `text(clip, prompt) -> {name: value}`; beside the
    source, `lpips`.
    """

    text: tuple[Callable[[Clip, str], dict[str, float]], ...]
    lpips: Distance | None


def open_judges(settings: EditSettings, height: int, width: int) -> Judges:
    """The judges that the config names, for clips of that size.

    ValueError, one line, for a folder or file that doesn't fit.
    """
    edit = settings.edit
    folders = ((scores.make_clip_scorer, edit.clip), (scores.make_pick_scorer, edit.pickscore))
    lpips = load_lpips(edit.lpips, height, width) if edit.lpips else None
    return Judges(tuple(make(folder) for make, folder in folders if folder), lpips)


def measure(clip: Clip, edited: Edited, settings: EditSettings, judges: Judges) -> dict[str, Any]:
    """The metrics of the reconstruction and of each edit. Those of the background are where the
    edit may not differ.
    """
    rows = []
    named = [({"prompt": settings.video.prompt}, edited.reconstruction, None)]
    named += zip(map(_facts, edited.outputs), edited.clips, edited.masks, strict=True)
    for facts, frames, mask in named:
        prompt = facts["prompt"]
        row = facts | {"psnr": scores.psnr(frames, clip), "ssim": scores.ssim(frames, clip)}
        if mask is not None and not mask.all():
            row |= {
                "background_psnr": scores.psnr(frames, clip, ~mask),
                "background_ssim": scores.ssim(frames, clip, ~mask),
            }
        if judges.lpips is not None:
            values, maps = judges.lpips(frames, clip)  # [F], [F, H, W]
            row["lpips"] = float(values.mean())
            if "background_psnr" in row:
                row["background_lpips"] = float(maps[~mask].mean())
        if len(clip) > 1:
            row |= _warping(frames, clip)
        for judge in judges.text:
            row |= judge(frames, prompt)
        rows.append(row)
    return {
        "reconstruction": rows[0] | {"x0_error": edited.error},
        "edits": rows[1:],
        **({"strengths": edited.choices} if edited.choices else {}),
        "source": _warping(clip, clip),
    }


def _facts(row: Output) -> dict[str, Any]:
    """What the metrics say an output is."""
    seed = {} if row.seed is None else {"seed": row.seed}
    return {"prompt": row.prompt, "name": row.name, "strength": row.strength} | seed


def _warping(frames: Clip, clip: Clip) -> dict[str, float]:
    try:
        return {"warping_error": scores.warping_error(frames, clip)}
    except ImportError:
        LOGGER.warning("warping_error is left out: pip install opencv-python-headless")
        return {}


def table(metrics: Mapping[str, Any]) -> str:
    """The metrics as text, one row a clip."""
    rows = [("reconstruction", metrics["reconstruction"])]
    rows += [(f"{row['name']} {row['prompt']}", row) for row in metrics["edits"]]
    columns = list(dict.fromkeys(key for _, row in rows for key in row if key not in page.NAMES))
    widths = [max(len(column), 8) for column in columns]
    lines = [
        f"{'clip':40}"
        + "".join(f"  {column:>{width}}" for column, width in zip(columns, widths, strict=True))
    ]
    for label, row in rows:
        cells = [f"{row[column]:.4g}" if column in row else "" for column in columns]
        lines.append(
            f"{label[:40]:40}"
            + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        )
    return "\n".join(lines)


def write(
    clip: Clip,
    edited: Edited,
    settings: EditSettings,
    metrics: Mapping[str, Any],
    workdir: pathlib.Path,
) -> None:
    """Writes the files of an edit: edits/NN.gif, NN.mp4, NN/ (frames; NN-seedS of several seeds),
    strip.png, report.html, attention/.
    """
    video, folder = settings.video, workdir / "edits"
    remove_old(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    rows = {f"source: {video.prompt}": clip, "reconstruction": edited.reconstruction}
    for row, frames in zip(edited.outputs, edited.clips, strict=True):
        for form in settings.edit.formats:
            output.WRITERS[form](frames, folder / f"{row.name}.{form}", video.fps)
        output.save_frames(frames, folder / row.name)
        rows[f"{row.label}: {row.prompt}"] = frames
    output.strip(rows).save(workdir / "strip.png")
    if settings.edit.attention_maps:
        attention = workdir / "attention"
        attention.mkdir(exist_ok=True)
        for i, maps in enumerate(edited.maps):
            scaled = np.round(255 * maps / max(maps.max(), 1e-12)).astype(np.uint8)
            Image.fromarray(np.concatenate(list(scaled), axis=1)).save(attention / f"{i:02d}.png")
    (workdir / "report.html").write_text(_report(clip, edited, settings, metrics), encoding="utf-8")
    write_json(workdir / "metrics.json", _finite(metrics))


def _report(clip: Clip, edited: Edited, settings: EditSettings, metrics: Mapping[str, Any]) -> str:
    video = settings.video
    shown = [
        page.Shown(prompt, frames, maps, label)
        for (prompt, label), frames, maps in zip(
            [(video.prompt, ""), *((row.prompt, row.label) for row in edited.outputs)],
            (clip, *edited.clips),
            edited.maps,
            strict=True,
        )
    ]
    sections = {"video": video, "edit": settings.edit, "train": settings.base.train}
    told = {name: dataclasses.asdict(section) for name, section in sections.items()}
    return page.make_page(
        shown[0], edited.reconstruction, shown[1:], _finite(metrics), told, video.fps
    )


def remove_old(workdir: pathlib.Path) -> None:
    """Removes what an earlier edit, of more prompts or frames, wrote. Other files stay."""
    suffixes = {"", *(f".{form}" for form in output.WRITERS)}
    written = [p for p in (workdir / "edits").glob("*") if p.suffix in suffixes]
    written += (workdir / "attention").glob("*.png")
    for path in written:
        if not re.fullmatch(r"\d+(-seed\d+)?", path.stem):
            continue
        if not path.is_dir():
            path.unlink()
            continue
        for frame in path.glob("*.png"):
            if frame.stem.isdecimal():
                frame.unlink()
        if not any(path.iterdir()):
            path.rmdir()


def _finite(value: Any) -> Any:
    """JSON has no inf and no nan: null stands for them."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
