"""python -m contextdiff_jax.benchmark --mode=data --config=configs/shapes.py [--compare=webdataset]
[--json=FILE]

Measures one part of the work, and prints a table. Modes:
    data      pictures a second and core that the loader gives, per source, against the device's
              need (docs/data.md)
    train     our training step against torch's (--compare=torch), and what the context adds to it
              (docs/performance.md)
    sample    the same of the sampling loop
    aot       a train step or sampling loop compiled for a TPU that isn't here: fits, seconds,
              collectives (docs/tpu.md)
    roofline  a step's layers against peak and bandwidth, here or (--topology) on a TPU
              (docs/tpu.md)
    reuse     a run's (--workdir) pictures with fewer evaluations of the UNet: seconds and
              differences (docs/performance.md)
"""

from __future__ import annotations

import shlex
import sys

from absl import flags

from contextdiff_jax import cli
from contextdiff_jax.runtime import host
from contextdiff_jax.runtime.fields import check_choice
from contextdiff_jax.runtime.files import write_json

MODE = flags.DEFINE_string("mode", "data", "What to measure: see the list above.")
COMPARE = flags.DEFINE_string(
    "compare", "", "Run in turns with ours; of data: webdataset, tfds; of train, sample: torch."
)
JSON = cli.define_path("json", "", "File for the table as one JSON object with `rows`.")
REPEATS = flags.DEFINE_integer(
    "repeats", 5, "Measurements of each row; the table has their medians.", lower_bound=1
)
NEED = cli.define_float(
    "need", 0.0, "data: pictures a second that the devices take; 0: those of --workdir.", lower=0
)
WORKDIR = cli.define_path(
    "workdir", "", "data: a run whose metrics.jsonl tells the need; reuse: the run to sample."
)
PICTURES = flags.DEFINE_integer("pictures", 256, "data: pictures a measurement.", lower_bound=8)
SHAPE = flags.DEFINE_list(
    "shape", ["384", "512"], "data, without data.path: height,width of the pictures made."
)
TOPOLOGY = flags.DEFINE_string(
    "topology", "", "aot, roofline: chips and their arrangement, as in v5e:4x4."
)
PROGRAM = flags.DEFINE_string("program", "train", "aot: train (a step) or sample (the loop).")
BATCH_PER_CHIP = flags.DEFINE_integer(
    "batch_per_chip", 0, "aot, roofline: instead of train.batch_size.", lower_bound=0
)
SWEEP = flags.DEFINE_boolean(
    "sweep", False, "aot: meshes x rematerialisations x batches, the best that fits first."
)
PLOT = cli.define_path("plot", "", "roofline: file for the plot, a PNG.")


def _data(settings):
    from contextdiff_jax.benchmarks.loading import DataBenchmark, run

    if len(SHAPE.value) != 2 or not all(side.isdecimal() and int(side) for side in SHAPE.value):
        raise ValueError(f"--shape={','.join(SHAPE.value)}: must be HEIGHT,WIDTH, as in 384,512")
    return run(
        settings.data,
        DataBenchmark(
            compare=COMPARE.value,
            repeats=REPEATS.value,
            need=NEED.value,
            workdir=WORKDIR.value,
            pictures=PICTURES.value,
            shape=tuple(int(side) for side in SHAPE.value),
        ),
    )


def _aot(settings):
    from contextdiff_jax.benchmarks.tpu.aot import AotBenchmark, run

    return run(
        settings,
        AotBenchmark(
            topology=TOPOLOGY.value,
            program=PROGRAM.value,
            batch_per_chip=BATCH_PER_CHIP.value,
            sweep=SWEEP.value,
        ),
    )


def _speed(settings):
    from contextdiff_jax.benchmarks.speed import SpeedBenchmark, run

    return run(
        settings, SpeedBenchmark(program=MODE.value, compare=COMPARE.value, rounds=REPEATS.value)
    )


def _roofline(settings):
    from contextdiff_jax.benchmarks.tpu.roofline import RooflineBenchmark, run

    return run(
        settings,
        RooflineBenchmark(
            topology=TOPOLOGY.value,
            batch=BATCH_PER_CHIP.value,
            rounds=REPEATS.value,
            plot=PLOT.value,
        ),
    )


def _reuse(_):
    from contextdiff_jax.benchmarks.reuse import run

    return run(WORKDIR.value, REPEATS.value)


MODES = {
    "data": _data,
    "train": _speed,
    "sample": _speed,
    "aot": _aot,
    "roofline": _roofline,
    "reuse": _reuse,
}
WITHOUT_CONFIG = ("reuse",)  # its run has one


def main() -> None:
    """Parses, measures, prints, writes."""
    check_choice("--mode", MODE.value, MODES)
    file = cli.output_file("json", JSON.value) if JSON.value else None
    if PLOT.value:
        cli.output_file("plot", PLOT.value, (".png",))
    config = None if MODE.value in WITHOUT_CONFIG else cli.read_config()
    if MODES[MODE.value] is _speed:
        host.one_device_a_core(config["train"]["batch_size"])
    from contextdiff_jax.evaluation.report import machine
    from contextdiff_jax.settings import parse

    result = MODES[MODE.value](config and parse(config))
    print(result.text)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "command": shlex.join(["python", "-m", "contextdiff_jax.benchmark", *sys.argv[1:]]),
            "machine": machine(),
        }
        write_json(file, {**facts, "rows": result.rows})


if __name__ == "__main__":
    cli.define_config()
    cli.run(main)
