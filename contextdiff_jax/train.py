"""python -m contextdiff_jax.train --config=configs/shapes.py --workdir=runs/shapes [--config.train.steps=500]

Trains, or goes on with, the run in the workdir: config.json, metrics.jsonl, curves.png, events/, samples/,
checkpoints/.
"""

from __future__ import annotations

import pathlib

from absl import flags

from contextdiff_jax import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: everything it writes, and what it resumes from.")


def main() -> None:
    """Parses, then trains."""
    config = cli.read_config()
    if not WORKDIR.value:
        raise ValueError("--workdir: missing; name the folder of the run")
    # Imported when the flags are known to be right: JAX takes seconds to start.
    from contextdiff_jax.pretrained.finetuning import adopt
    from contextdiff_jax.settings import parse
    from contextdiff_jax.training.loop import train

    config = adopt(config)
    settings = parse(config)
    workdir = pathlib.Path(WORKDIR.value)
    cli.set_compilation_cache(workdir)
    train(settings, config, workdir)


if __name__ == "__main__":
    cli.define_config()
    cli.run(main)
