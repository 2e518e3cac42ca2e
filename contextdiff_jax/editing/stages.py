"""The programs of an edit: the way to the noise, the way back, and the edits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from flax import nnx
from jaxtyping import Array, Float

from contextdiff_jax.diffusion.process import Process
from contextdiff_jax.editing.edits import MOVERS, for_each_seed
from contextdiff_jax.editing.inversion import reconstruct
from contextdiff_jax.editing.settings import EditSettings


class Stages(NamedTuple):
    """Functions of the networks' state, to be jitted.

    Attributes:
      inversion: (state, x0, the source's caption) -> the source's path for each seed.
      reconstruction: (state, its noisiest state, the source's caption) -> the clip.
      editing: (state, path, captions, null, alignment) -> (clips, maps) for each seed.
    """

    inversion: Callable[..., Float[Array, "S S1 1 F H W C"]]
    reconstruction: Callable[..., Float[Array, "1 F H W C"]]
    editing: Callable[..., tuple[Float[Array, "S P F H W C"], Float[Array, "S M F H W"]]]


def make_stages(graph: nnx.GraphDef, process: Process, settings: EditSettings) -> Stages:
    """The stages of `edit.method`, by the networks of that structure."""
    video, edit = settings.video, settings.edit
    mover = MOVERS[edit.method]

    def inversion(state, x0, source):
        model = nnx.merge(graph, state)

        def path(key):
            return mover.make_path(key, model, process, x0, source, video, edit)

        return for_each_seed(path, edit.seeds)

    def reconstruction(state, x, source):
        return reconstruct(nnx.merge(graph, state), process, x, source, video, edit)

    def editing(state, path, text, null, alignment):
        model = nnx.merge(graph, state)

        def move(key, path):
            return mover.move(key, model, process, path, text, null, alignment, video, edit)

        return for_each_seed(move, edit.seeds, path)

    return Stages(inversion, reconstruction, editing)
