"""python -m contextdiff_jax.experiment --plan=toy --seeds=5,6

Run a plan of variants and seeds, and write the page that compares them. Only the cells that are
missing are run, each a line of OUT/PLAN.jsonl; the page of them all is OUT/PLAN.md, with its plots.
An interrupted plan goes on where it was; several processes may work on one plan. See
docs/experiments.md.
"""

from __future__ import annotations

import fcntl
import pathlib

from absl import flags

from contextdiff_jax import cli
from contextdiff_jax.runtime import host
from contextdiff_jax.runtime.keys import LARGEST

cli.group("Plan")
PLAN = cli.define_path(
    "plan", None, "Python file with get_plan(): see contextdiff_jax/experiments/plan.py."
)
OUT = cli.define_path(
    "out", "docs/results", "Folder of PLAN.md and of the finished cells, the lines of PLAN.jsonl."
)
WORKDIR = cli.define_path(
    "workdir", "runs/experiments", "Folder of the cells' runs, PLAN/VARIANT-SEED-HASH."
)
cli.group("A part of it")
VARIANTS = flags.DEFINE_list("variants", [], "Only these; default: the plan's.")
SEEDS = flags.DEFINE_list("seeds", [], "These seeds instead of the plan's, for the variants above.")


def main() -> None:
    """Run what is missing and write the page."""
    if not PLAN.value:
        raise ValueError("--plan: missing; as in --plan=configs/experiments/shapes.py")
    if not all(seed.isdecimal() and int(seed) <= LARGEST for seed in SEEDS.value):
        raise ValueError(
            f"--seeds={','.join(SEEDS.value)}: must be numbers from 0 to 2^64 - 1, as in "
            "--seeds=5,6"
        )
    out = cli.output_folder("out", OUT.value)
    workdir = cli.output_folder("workdir", WORKDIR.value) / pathlib.Path(PLAN.value).stem

    from contextdiff_jax.experiments.cells import run_cell
    from contextdiff_jax.experiments.plan import load_plan
    from contextdiff_jax.experiments.results import write_page

    plan, name = load_plan(PLAN.value), pathlib.Path(PLAN.value).stem
    if SEEDS.value:
        cells = [plan.cell(v, int(s)) for s in SEEDS.value for v in VARIANTS.value or plan.variants]
    else:
        names = {plan.cell(variant, 0).variant for variant in VARIANTS.value}  # unknown: an error
        cells = [cell for cell in plan.cells() if not names or cell.variant in names]
    out.mkdir(parents=True, exist_ok=True)
    host.set_compilation_cache(workdir)
    for cell in cells:
        folder = workdir / cell.folder
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                cli.LOGGER.info("%s: another process is at it", cell.name)
                continue
            if cell.result(out / f"{name}.jsonl") is None:
                run_cell(cell, folder, out / f"{name}.jsonl")
    print(write_page(plan, name, PLAN.value, out))


def command() -> None:
    """Run `main` with the flags of the command line; contextdiff-experiment begins here."""
    cli.run(main)


if __name__ == "__main__":
    command()
