"""python -m contextdiff_jax.experiment --plan=configs/experiments/toy.py [--variants=none,plugin
--seeds=5,6]

Runs the cells of a plan that are missing, one JSON file each, and writes the table made of all:
OUT/PLAN.md, with its plots. An interrupted plan goes on where it was; several processes may work on
one plan. docs/results/README.md.
"""

from __future__ import annotations

import fcntl
import json
import logging
import pathlib
import subprocess
import time

from absl import flags

from contextdiff_jax import cli
from contextdiff_jax.files import replacing
from contextdiff_jax.keys import LARGEST

PLAN = cli.define_path(
    "plan", None, "Python file with get_plan(): see contextdiff_jax/experiments/plan.py."
)
OUT = cli.define_path(
    "out", "docs/results", "Folder of PLAN.md and of the cells' files, PLAN/VARIANT-SEED.json."
)
WORKDIR = cli.define_path(
    "workdir", "runs/experiments", "Folder of the cells' runs, PLAN/VARIANT-SEED."
)
VARIANTS = flags.DEFINE_list("variants", [], "Only these; default: the plan's.")
SEEDS = flags.DEFINE_list("seeds", [], "These seeds instead of the plan's, for the variants above.")
COMMIT = flags.DEFINE_bool("commit", False, "Commit each cell's file to git when it is finished.")
LOGGER = logging.getLogger(__name__)


def main() -> None:
    """Parses, runs what is missing, writes the page."""
    if not PLAN.value:
        raise ValueError("--plan: missing; as in --plan=configs/experiments/shapes.py")
    if not all(seed.isdecimal() and int(seed) <= LARGEST for seed in SEEDS.value):
        raise ValueError(
            f"--seeds={','.join(SEEDS.value)}: must be numbers from 0 to 2^64 - 1, as in --seeds=5,6"
        )
    out = cli.output_folder("out", OUT.value)
    workdir = cli.output_folder("workdir", WORKDIR.value) / pathlib.Path(PLAN.value).stem

    from contextdiff_jax.experiments.plan import load_plan
    from contextdiff_jax.experiments.results import write_page

    plan, name = load_plan(PLAN.value), pathlib.Path(PLAN.value).stem
    if SEEDS.value:
        cells = [plan.cell(v, int(s)) for s in SEEDS.value for v in VARIANTS.value or plan.variants]
    else:
        unknown = [
            plan.cell(variant, 0) for variant in VARIANTS.value
        ]  # raises for a name that isn't there
        names = {cell.variant for cell in unknown}
        cells = [cell for cell in plan.cells() if not names or cell.variant in names]
    (out / name).mkdir(parents=True, exist_ok=True)
    cli.set_compilation_cache(workdir)
    for cell in cells:
        folder = workdir / cell.folder
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                LOGGER.info("%s: another process is at it", cell.name)
                continue
            if cell.result(out / name) is None:
                run_cell(plan.kind, cell, folder, out / name)
    print(write_page(plan, name, PLAN.value, out))


def run_cell(kind: str, cell, folder: pathlib.Path, out: pathlib.Path) -> None:
    """Runs one cell and writes its file, whole or not at all."""
    from contextdiff_jax.evaluation.report import machine
    from contextdiff_jax.experiments.cells import CELLS

    LOGGER.info("%s: config %s", cell.name, cell.config_hash)
    start = time.time()
    found = CELLS[kind](cell, folder)
    result = {
        "variant": cell.variant,
        "seed": cell.seed,
        "config_hash": cell.config_hash,
        "commit": _git("rev-parse", "HEAD"),
        "machine": machine(),
        "seconds": round(time.time() - start, 1),
        **found,
    }
    path = out / f"{cell.name}.json"
    with replacing(path) as file:
        file.write_text(json.dumps(result) + "\n")
    print(f"{path}: {result['seconds']} s", flush=True)
    if COMMIT.value:
        _git("add", str(path))
        _git("commit", "-q", "-m", f"results: {out.name}, {cell.name}", "--", str(path))


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    if done.returncode and arguments[0] == "commit":
        raise cli.RunError(
            f"git commit: {done.stderr.strip()}; the cell's file is written, --nocommit leaves it at that"
        )
    return done.stdout.strip() if not done.returncode else "unknown"


if __name__ == "__main__":
    cli.run(main)
