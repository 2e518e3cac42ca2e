"""Clips of one moving shape, with the true mask and the true edited clip, from the renderer of
`shapes`.

    python -m contextdiff_jax.data.moving_shapes --out=runs/clip --seed=0 --num_frames=8 --size=16

writes source/, colour/ and shape/ (frames) and clip.json with the prompts.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

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
    """Where either shows its object; both lie on one background, which fills the corners."""
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description="Draws a clip of a moving shape and its true edits."
    )
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=16)
    args = parser.parse_args(argv)
    for name, least in (("seed", 0), ("num_frames", 1), ("size", 8)):
        if getattr(args, name) < least:
            parser.error(f"--{name}={getattr(args, name)}: must be at least {least}")
    args.out = args.out.expanduser()
    clip = make_moving_shape(args.seed, args.num_frames, args.size)
    for name, scenes in {"source": clip.scenes, **clip.edited}.items():
        folder = args.out / name
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("[0-9]" * 5 + ".png"):  # an earlier clip may have been longer
            old.unlink()
        for i, frame in enumerate(frames_of(scenes, args.size)):
            Image.fromarray(frame).save(folder / f"{i:05d}.png")
    prompts = {name: caption(scenes[0]) for name, scenes in clip.edited.items()}
    facts = {"prompt": clip.prompt, "edit_prompts": prompts}
    write_json(args.out / "clip.json", facts)
    print(f"{args.out}: {clip.prompt!r}; edits {prompts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
