"""An edit's programs compiled for TPUs that aren't here: a tuning step, the inversion, and the
edits of a clip, at any size, without weights.

Networks are those of `model` and `context`, not a folder's. Without an autoencoder `video.size` is
that of the latents. What happens once a frame, the autoencoder's work, is left out.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from contextdiff_jax.benchmarks.loading import Result
from contextdiff_jax.benchmarks.tpu import aot
from contextdiff_jax.benchmarks.tpu.aot_table import table
from contextdiff_jax.editing.attention import align
from contextdiff_jax.editing.settings import EditSettings
from contextdiff_jax.editing.stages import make_stages
from contextdiff_jax.editing.tuning import init_tuning, make_tuning_step, trainable
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.models.undrawn import Undrawn
from contextdiff_jax.models.video import VideoDiffusion, inflate
from contextdiff_jax.parallel.chips import CHIPS
from contextdiff_jax.parallel.mesh import FRAME_RULES, make_mesh, replicated, tracing_for
from contextdiff_jax.runs.model import make_model
from contextdiff_jax.runtime.keys import make_key

LOGGER = logging.getLogger(__name__)


def run(settings: EditSettings, options: aot.AotBenchmark) -> Result:
    """Compiles, and tells what each part of the edit would need. ValueError as `aot.run`."""
    devices = aot.described_devices(options.topology)
    base, video = settings.base, settings.video
    mesh = make_mesh(base.mesh, 1, 1, devices)
    if video.num_frames % mesh.shape["sequence"] or mesh.size > mesh.shape["sequence"]:
        raise ValueError(
            f"mesh={dict(mesh.shape)}: an edit's frames are split by mesh.sequence alone, which "
            f"must divide video.num_frames={video.num_frames}"
        )
    chip = CHIPS[devices[0].device_kind].described()
    rows = []
    for part in parts(settings, mesh):
        height, width = video.size
        name = f"{part.name} {video.num_frames} frames of {height}x{width}, {part.clips} at a time"
        row = {
            "name": name if part.trips == 1 else f"{name}, {part.trips} steps",
            "program": part.name,
            "trips": part.trips,
            "frames": video.num_frames,
            "chip": chip.name,
            "chips": mesh.size,
            "mesh": dict(mesh.shape),
            "remat": video.remat,
            "hbm": chip.hbm,
            "optimization_level": jax.config.jax_optimization_level,
        }
        found = aot.tried(part.lowered, mesh, part.trips, part.clips * video.num_frames)
        rows.append(row | found)
        fits = "fits" if found["fits"] else "doesn't fit"
        LOGGER.info("%s: %s, %s s", row["name"], fits, found["seconds"])
    return Result(table(rows, aot.EDIT, options.topology, aot.KERNEL_EFFICIENCY), rows)


class Part(NamedTuple):
    """A program of an edit, how often its loop runs, and the batch of clips in it."""

    name: str
    lowered: jax.stages.Lowered
    trips: int
    clips: int


def video_networks(settings: EditSettings) -> VideoDiffusion:
    """The networks that a new model's edit has, as shapes alone."""
    base, video = settings.base, settings.video

    def make():
        image = make_model(base, Undrawn())
        return inflate(
            image.backbone,
            image.context,
            seed=base.seed,
            remat=video.remat,
            reads_mask=not image.text.reads_padding,
        )

    return nnx.eval_shape(make)


def parts(settings: EditSettings, mesh: Mesh) -> Iterator[Part]:
    """The programs, lowered for the mesh's platform, frames over `sequence`.

    The inversion is the explicit one, whose steps take one evaluation each: an exact one's take as
    many as they need. Raises ValueError as the edit itself would.
    """
    base, video, whole = settings.base, settings.video, replicated(mesh)
    edit = dataclasses.replace(settings.edit, inversion="ddim")
    settings = dataclasses.replace(settings, edit=edit)
    rows, length = 1 + len(video.edit_prompts), base.data.max_length

    def shaped(tree: Any, sharding: NamedSharding = whole) -> Any:
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree
        )

    def captions(count: int) -> Captions:
        tokens = jax.ShapeDtypeStruct((count, length, base.model.text_width), jnp.float32)
        return shaped(Captions(tokens, jax.ShapeDtypeStruct((count, length), jnp.bool_)))

    frames = (1, video.num_frames, *video.size, base.model.in_channels)
    x0 = jax.ShapeDtypeStruct(
        frames, jnp.float32, sharding=NamedSharding(mesh, P(None, "sequence"))
    )
    model = video_networks(settings)
    graph, params, frozen = nnx.split(model, trainable(video.tune), ...)
    step = make_tuning_step(graph, base.process, base.train, video.window)
    key = make_key(base.seed)
    state = jax.eval_shape(lambda params: init_tuning(params, base.train, key), params)
    arguments = shaped(state), shaped(frozen), x0, captions(1), captions(1)
    with tracing_for(mesh, FRAME_RULES):
        yield Part(
            "tuning step",
            jax.jit(step, donate_argnums=0).lower(*arguments),
            1,
            base.train.batch_size,
        )
        graph, state = nnx.split(model)
        stages, state = make_stages(graph, base.process, settings), shaped(state)
        inversion = jax.jit(stages.inversion).lower(state, x0, captions(1))
        yield Part("inversion", inversion, max(edit.moves), 1)
        path = jax.eval_shape(stages.inversion, state, x0, captions(1))
        path = shaped(path, NamedSharding(mesh, P(None, None, None, "sequence")))
        found = align(video.prompt, video.edit_prompts, lambda word: 1, length, edit)
        found = shaped(jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), found))
        editing = jax.jit(stages.editing).lower(state, path, captions(rows), captions(1), found)
        branches = 1 if edit.guidance == 1 else 2
        yield Part("editing", editing, max(edit.moves), rows * branches * len(edit.seeds))
