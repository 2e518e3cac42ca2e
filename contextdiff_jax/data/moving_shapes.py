"""Clips of one moving shape, with the true mask and the true edited clip, from the renderer of
`shapes`; `contextdiff_jax.draw_clip` writes them.
"""

from __future__ import annotations

import dataclasses
import pathlib
import runpy
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from contextdiff_jax.data.shapes import (
    COLOURS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    caption,
    diameter,
    heldout_triples,
    render,
)
from contextdiff_jax.runtime.files import write_json

EDITS = ("colour", "shape")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovingShape:
    """A clip and, by the attribute that changes (`EDITS`), what its true edits show."""

    scenes: tuple[Scene, ...]
    edited: dict[str, tuple[Scene, ...]]

    @property
    def prompt(self) -> str:
        """The clip's caption; that of an edit is `caption(clip.edited[name][0])`."""
        return caption(self.scenes[0])


def frames_of(scenes: Sequence[Scene], size: int) -> UInt8[np.ndarray, "F S S 3"]:
    """The scenes drawn."""
    return np.stack([render(scene, size) for scene in scenes])


def mask_of(
    clip: UInt8[np.ndarray, "F S S 3"], other: UInt8[np.ndarray, "F S S 3"]
) -> Bool[np.ndarray, "F S S"]:
    """The pixels where either clip shows its object.

    Both lie on one background, which fills the corners.
    """
    return ((clip != clip[:, :1, :1]) | (other != other[:, :1, :1])).any(-1)


def make_moving_shape(
    seed: int, num_frames: int = 8, size: int = 16, heldout_fraction: float = 0.125
) -> MovingShape:
    """A shape that crosses the picture at an even pace, from one place to another at least a
    quarter of the way off.

    Sources and edits show combinations that the split `train` has. One pixel about the picture
    stays free.
    """
    rng = np.random.default_rng((seed, 7))
    known = set(heldout_triples(heldout_fraction))

    def pick(values, last=None):
        return [str(value) for value in rng.permutation(list(values)) if value != last]

    while True:
        shape, colour, extent = (pick(values)[0] for values in (SHAPES, COLOURS, SIZES))
        shapes = [s for s in pick(SHAPES, shape) if (s, colour, extent) not in known]
        colours = [c for c in pick(COLOURS, colour) if (shape, c, extent) not in known]
        if (shape, colour, extent) not in known and shapes and colours:
            break
    width = diameter(extent, size)
    free = size - width - 2  # places, in pixels, of the left upper corner beyond the first
    while True:
        ends = rng.integers(0, free + 1, (2, 2))
        if np.abs(ends[1] - ends[0]).max() >= free / 2:
            break
    corners = np.round(np.linspace(ends[0], ends[1], num_frames)).astype(int) + 1
    centres = [tuple(float((c + width / 2) / size) for c in corner) for corner in corners]

    def scenes(shape, colour):
        return tuple(
            Scene(objects=(Object(shape=shape, colour=colour, size=extent, centre=centre),))
            for centre in centres
        )

    edited = {"colour": scenes(shape, colours[0]), "shape": scenes(shapes[0], colour)}
    return MovingShape(scenes=scenes(shape, colour), edited=edited)


def write_clip(
    folder: pathlib.Path, seed: int, num_frames: int = 8, size: int = 16
) -> dict[str, Any]:
    """Writes source/, colour/ and shape/ (frames) and clip.json, whose facts it returns."""
    clip = make_moving_shape(seed, num_frames, size)
    for name, scenes in {"source": clip.scenes, **clip.edited}.items():
        frames = folder / name
        frames.mkdir(parents=True, exist_ok=True)
        for old in frames.glob("[0-9]" * 5 + ".png"):  # an earlier clip may have been longer
            old.unlink()
        for i, frame in enumerate(frames_of(scenes, size)):
            Image.fromarray(frame).save(frames / f"{i:05d}.png")
    prompts = {name: caption(scenes[0]) for name, scenes in clip.edited.items()}
    facts = {"prompt": clip.prompt, "edit_prompts": prompts}
    write_json(folder / "clip.json", facts)
    return facts


if __name__ == "__main__":  # the first edition's name of the command
    runpy.run_module("contextdiff_jax.draw_clip", run_name="__main__", alter_sys=True)
