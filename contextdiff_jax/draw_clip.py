"""python -m contextdiff_jax.draw_clip --out=DIR --seed=0 --num_frames=8 --size=32

Draw a clip of one moving shape to edit, and its true edits. DIR gets the frames, in source/,
colour/ and shape/, and clip.json with the prompts.
"""

from __future__ import annotations

from absl import flags

from contextdiff_jax import cli

OUT = cli.define_path("out", None, "Folder of the clip.")
SEED = cli.define_seed("Of the shape and its way.")
NUM_FRAMES = flags.DEFINE_integer("num_frames", 8, "Frames of the clip.", lower_bound=1)
SIZE = flags.DEFINE_integer("size", 32, "Pixels a side.", lower_bound=8)


def main() -> None:
    """Draws and writes."""
    out = cli.output_folder("out", OUT.value)
    from contextdiff_jax.data.moving_shapes import write_clip

    facts = write_clip(out, SEED.value, NUM_FRAMES.value, SIZE.value)
    print(f"{out}: {facts['prompt']!r}; edits {facts['edit_prompts']}")


def command() -> None:
    """Run `main` with the flags of the command line; contextdiff-draw-clip begins here."""
    cli.run(main)


if __name__ == "__main__":
    command()
