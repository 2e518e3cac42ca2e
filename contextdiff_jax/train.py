"""python -m contextdiff_jax.train --config=shapes --workdir=runs/shapes --config.train.steps=500
python -m contextdiff_jax.train --replay=runs/shapes/nonfinite_120

Train a model, or go on with the run in the workdir. The workdir gets config.json, metrics.jsonl,
curves.png, events/, samples/ and checkpoints/. One of many processes learns of the others by flags,
environment or scheduler (docs/scaling.md).
"""

from __future__ import annotations

import os

from absl import flags

from contextdiff_jax import cli
from contextdiff_jax.runtime import host

cli.group("Run")
WORKDIR = cli.define_path(
    "workdir", None, "Folder of the run (local or gs://): all it writes and resumes from."
)
REPLAY = cli.define_path(
    "replay", None, "Folder of a dumped step (WORKDIR/nonfinite_N): does that step again."
)
cli.group("Many processes")
ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, for many processes."
)
COUNT = flags.DEFINE_integer("num_processes", None, "Number of processes.", lower_bound=1)
INDEX = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)


def main() -> None:
    """Parses, joins the other processes, then trains."""
    if REPLAY.value:
        from etils import epath

        from contextdiff_jax.training.replay import replay

        print(replay(epath.Path(REPLAY.value)))
        return
    config = cli.read_config()
    if not host.is_remote(WORKDIR.value or ""):
        cli.output_folder("workdir", WORKDIR.value)
    # Imported when the flags are known to be right: it takes seconds.
    from etils import epath

    from contextdiff_jax.parallel import processes
    from contextdiff_jax.pretrained.finetuning import adopt
    from contextdiff_jax.runs.workdir import held
    from contextdiff_jax.settings import parse
    from contextdiff_jax.training.loop import train

    config = adopt(config)
    workdir = epath.Path(WORKDIR.value)
    # Before all else: checking the settings computes, and then it is too late to join.
    timeout = int(config["train"].get("peer_timeout", 600))
    processes.start(ADDRESS.value, COUNT.value, INDEX.value, os.environ, timeout)
    settings = parse(config)
    host.set_compilation_cache(workdir)  # now: what is refused above leaves no folder behind
    with held(workdir):
        train(settings, config, workdir)


def command() -> None:
    """Run `main` with the flags of the command line; contextdiff-train begins here."""
    cli.define_config()
    cli.run(main)


if __name__ == "__main__":
    command()
