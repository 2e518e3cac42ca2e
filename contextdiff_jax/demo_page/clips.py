"""A clip edited by text within a visitor's patience: tuning, inversion, sampling.

The settings are those of configs/edit_shapes.py, by exact inversion; a long or careful edit is the
command `edit`'s.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import UInt8

from contextdiff_jax.data.moving_shapes import frames_of, make_moving_shape
from contextdiff_jax.data.shapes import caption
from contextdiff_jax.demo_page.limits import EDITED_FRAMES, MAX_GUIDANCE, MAX_TUNING
from contextdiff_jax.demo_page.wishes import check_number, check_text
from contextdiff_jax.demo_page.worker import Worker
from contextdiff_jax.editing import output
from contextdiff_jax.editing.attention import align
from contextdiff_jax.editing.end_to_end import Programs, edit_clip
from contextdiff_jax.editing.settings import EditConfig, EditSettings, VideoConfig
from contextdiff_jax.editing.tuning import begin_tuning, trainable
from contextdiff_jax.editing.video_model import Editor, open_editor
from contextdiff_jax.evaluation import edit_scores
from contextdiff_jax.inference.pipeline import Pipeline
from contextdiff_jax.models.video import VideoDiffusion
from contextdiff_jax.parallel.mesh import FRAME_RULES, MeshConfig, local_mesh, tracing_for
from contextdiff_jax.settings import Settings, TrainConfig

Clip = UInt8[np.ndarray, "F H W 3"]
FPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipWish:
    """An edit that is asked for: what the clip shows, what it shall show, and how."""

    prompt: str
    edit: str
    strength: float = 0.55
    guidance: float = 3.0
    tuning: int = 20
    keep: bool = False

    @classmethod
    def read(cls, prompt: Any, edit: Any, strength: Any, guidance: Any, tuning: Any, keep: Any):
        """Return the wish of the page's controls.

        Raises ValueError, one sentence, for what isn't allowed.
        """
        return cls(
            prompt=check_text("The text of what the clip shows", prompt),
            edit=check_text("The text of what it shall show", edit),
            strength=check_number("The strength", strength, 0.05, 1),
            guidance=check_number("The guidance", guidance, 0, MAX_GUIDANCE),
            tuning=check_number("The number of tuning steps", tuning, 1, MAX_TUNING, whole=True),
            keep=bool(keep),
        )


@dataclasses.dataclass(frozen=True)
class EditedClip:
    """An edit's clips, source first, by what they are; and what was measured."""

    clips: dict[str, Clip]
    fidelity: float  # PSNR of the reconstruction


class ClipStudio:
    """A run's model for visitors' clips; `why_not` says why there is none of it."""

    def __init__(self, pipeline: Pipeline, folder: str, worker: Worker):
        self.folder, self.worker = folder, worker
        self.side = pipeline.opened.shape[0] * pipeline.opened.factor
        trained = pipeline.opened.identity  # a run's settings; a folder has none
        self.trained = trained if isinstance(trained, Settings) else None
        self.why_not = ""
        if self.trained is None:
            self.why_not = (
                "Clips are edited here by models that this package trained. A Stable Diffusion "
                "folder takes minutes to hours a clip: python -m contextdiff_jax.edit does it."
            )

    @property
    def draws_shapes(self) -> bool:
        """Whether the model knows moving shapes, which the page can draw as an example."""
        return self.trained is not None and self.trained.data.source == "shapes"

    def example(self, seed: int) -> tuple[Clip, str, str]:
        """Return a clip of a moving shape, what it shows, and an edit of its colour."""
        moving = make_moving_shape(seed, EDITED_FRAMES, self.side)
        edit = caption(moving.edited["colour"][0])
        return frames_of(moving.scenes, self.side), moving.prompt, edit

    def edit(self, clip: Clip, wish: ClipWish) -> Iterator[str | EditedClip]:
        """Yields what is being done, in words, and at last the edited clip.

        Raises ValueError or RunError, one line, for what the model doesn't allow.
        """
        if self.why_not:
            raise ValueError(self.why_not)
        settings = self.settings(len(clip), wish)
        running = self.worker.run(lambda report: _edit(clip, settings, report))
        while True:
            try:
                report = next(running)
            except StopIteration as end:
                yield end.value
                return
            waits = "Waiting for the device." if report is None else "Opening the model."
            yield report[0] if report else waits

    def settings(self, frames: int, wish: ClipWish) -> EditSettings:
        """Return the edit's settings: the run's own, tuned for seconds, with the wish's."""
        train = TrainConfig(
            steps=wish.tuning,
            batch_size=1,
            learning_rate=1e-3,
            warmup_steps=min(5, wish.tuning),
            decay="constant",
            ema_decay=0.9,
        )
        video = VideoConfig(
            path="clip",
            model=self.folder,
            prompt=wish.prompt,
            edit_prompts=(wish.edit,),
            num_frames=frames,
            size=(self.side, self.side),
            fps=FPS,
        )
        edit = EditConfig(
            steps=20,
            strength=(wish.strength,),
            guidance=wish.guidance,
            negative="empty",
            inversion="exact",
            iterations=10,
            blend="changed" if wish.keep else "",
        )
        base = dataclasses.replace(self.trained, train=train, mesh=MeshConfig())
        return EditSettings(base=base, video=video, edit=edit)


def _edit(clip: Clip, settings: EditSettings, report: Callable[[str], None]) -> EditedClip:
    editor, video = open_editor(settings), settings.video
    editor.check_size(clip)
    counts = editor.count_tokens, editor.text_length
    align(video.prompt, video.edit_prompts, *counts, settings.edit)  # refuses before the tuning
    x0 = editor.encode(clip)
    mesh = local_mesh()
    with tracing_for(mesh, FRAME_RULES):
        model = _tune(editor, x0, settings, mesh, report)
        report("Inverting the clip, and sampling it anew.")
        edited = edit_clip(editor, model, clip, x0, settings, Programs())
    clips = {"the clip": clip, "its reconstruction": edited.reconstruction}
    return EditedClip(
        clips | {video.edit_prompts[0]: edited.clips[0]},
        min(edit_scores.psnr(edited.reconstruction, clip), 100.0),
    )


def _tune(
    editor: Editor, x0: Any, settings: EditSettings, mesh: Mesh, report: Callable[[str], None]
) -> VideoDiffusion:
    """As `tuning.tune`, and nothing is written: visitors can leave at any step."""
    train, video = settings.base.train, settings.video
    graph, params, frozen = nnx.split(editor.model, trainable(video.tune), ...)
    state, step = begin_tuning(graph, params, editor.process, settings, mesh)
    text, null = editor.encode_text([video.prompt]), editor.encode_text([""])
    report("Compiling the tuning.")
    for i in range(train.steps):
        state, loss = step(state, frozen, x0, text, null)
        if not np.isfinite(loss):
            raise ValueError("The tuning's loss is not finite: use another clip or fewer steps.")
        report(f"Tuning the model on the clip: step {i + 1} of {train.steps}.")
    return nnx.merge(graph, state.ema, frozen)


def encoded(clip: Clip) -> dict[str, bytes]:
    """Return the clip as files: an endless GIF, and an MP4 (H.264)."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: pathlib.Path(folder, f"clip.{name}") for name in ("gif", "mp4")}
        output.save_gif(clip, files["gif"], FPS)
        output.save_mp4(clip, files["mp4"], FPS)
        return {name: file.read_bytes() for name, file in files.items()}
