"""python -m contextdiff_jax.benchmark --mode=data --config=shapes --compare=webdataset

Measure the speed of one part of the work, as a table. Modes:
    accelerator  all that follows on the GPU or TPU that is here, the most telling first, in
              --minutes; --json=FILE and a page beside it (docs/accelerators.md)
    data      pictures a second and core that the loader gives, per source, against the device's
              need (docs/data.md)
    train     our training step against torch's (--compare=torch), and what the context adds to it
              (docs/performance.md)
    sample    the same of the sampling loop
    aot       a train step, a sampling loop or a clip's edit compiled for a TPU that isn't here:
              fits, seconds, collectives (docs/tpu.md)
    roofline  a step's layers against peak and bandwidth, here or (--topology) on a TPU
              (docs/tpu.md)
    facts     the device, and the most that it does
    kernels   attention, norms and the relational network in each form that the device has
    agree     one training step here and on the CPU, in float32
    collectives  what the devices send each other in a second
    predicted  a run's (--workdir) seconds a step beside those of --mode=aot (--prediction)
    largest   the largest batch that a training step of --side has memory for
    reuse     a run's (--workdir) pictures with fewer evaluations of the UNet: seconds and
              differences (docs/performance.md)
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from contextdiff_jax import cli
from contextdiff_jax.runtime import host
from contextdiff_jax.runtime.fields import check_choice
from contextdiff_jax.runtime.files import write_json

cli.group("Measurement")
MODE = flags.DEFINE_string("mode", "data", "What to measure: see the list above.")
COMPARE = flags.DEFINE_string(
    "compare", "", "Run in turns with ours; of data: webdataset, tfds; of train, sample: torch."
)
JSON = cli.define_path("json", "", "File for the table as one JSON object with `rows`.")
REPEATS = flags.DEFINE_integer(
    "repeats", 5, "Measurements of each row; the table has their medians.", lower_bound=1
)
cli.group("Of --mode=data and reuse")
NEED = cli.define_float(
    "need", 0.0, "data: pictures a second that the devices take; 0: those of --workdir.", lower=0
)
WORKDIR = cli.define_path(
    "workdir",
    "",
    "data: a run whose metrics.jsonl tells the need; reuse: the run to sample; predicted: the run.",
)
PICTURES = flags.DEFINE_integer("pictures", 256, "data: pictures a measurement.", lower_bound=8)
SHAPE = flags.DEFINE_list(
    "shape", ["384", "512"], "data, without data.path: height,width of the pictures made."
)
cli.group("Of --mode=aot and roofline")
TOPOLOGY = flags.DEFINE_string(
    "topology", "", "aot, roofline: chips and their arrangement, as in v5e:4x4."
)
PROGRAM = flags.DEFINE_string(
    "program",
    "train",
    "aot: train (a step), sample (the loop), or, with a config of edit, edit (its parts).",
)
BATCH_PER_CHIP = flags.DEFINE_integer(
    "batch_per_chip", 0, "aot, roofline: instead of train.batch_size.", lower_bound=0
)
IMAGES = flags.DEFINE_integer(
    "images",
    0,
    "aot: of the whole training, whose days are told; 0: train.steps x train.batch_size.",
    lower_bound=0,
)
SWEEP = flags.DEFINE_boolean(
    "sweep", False, "aot: meshes x rematerialisations x batches, the best that fits first."
)
MINUTES = cli.define_float("minutes", 8.0, "accelerator: for all of it.", lower=0)
TINY = flags.DEFINE_boolean(
    "tiny", False, "accelerator, kernels: small shapes, to see on any machine that all of it runs."
)
SUBJECTS = flags.DEFINE_list(
    "subjects",
    ["network", "method"],
    "train, sample: the network alone, and the whole method with and without its context.",
)
PROFILE = cli.define_path(
    "profile", "", "train, sample: folder for a profile of our network; its kernels are told."
)
PREDICTION = cli.define_path("prediction", "", "predicted: what --mode=aot --json wrote.")
SIDE = flags.DEFINE_enum("side", "ours", ["ours", "torch"], "largest: whose step.")
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
    from contextdiff_jax.benchmarks.tpu import aot, aot_edit

    options = aot.AotBenchmark(
        topology=TOPOLOGY.value,
        program=PROGRAM.value,
        batch_per_chip=BATCH_PER_CHIP.value,
        images=IMAGES.value,
        sweep=SWEEP.value,
    )
    return (aot_edit if options.program == aot.EDIT else aot).run(settings, options)


def _speed(settings):
    from contextdiff_jax.benchmarks.speed import SpeedBenchmark, run

    return run(
        settings,
        SpeedBenchmark(
            program=MODE.value,
            compare=COMPARE.value,
            rounds=REPEATS.value,
            subjects=tuple(SUBJECTS.value),
            profile=PROFILE.value,
        ),
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


def _facts(_):
    from contextdiff_jax.benchmarks.facts import run

    return run()


def _kernels(_):
    from contextdiff_jax.benchmarks.kernels import KernelBenchmark, run

    return run(KernelBenchmark(tiny=TINY.value, rounds=REPEATS.value))


def _agree(settings):
    from contextdiff_jax.benchmarks.agreement import run

    return run(settings)


def _largest(settings):
    from contextdiff_jax.benchmarks.largest import run

    return run(settings, SIDE.value)


def _collectives(_):
    from contextdiff_jax.benchmarks.collectives import run

    return run(rounds=REPEATS.value)


def _predicted(_):
    from contextdiff_jax.benchmarks.predicted import run

    return run(WORKDIR.value, PREDICTION.value)


def _accelerator(_):
    from contextdiff_jax.benchmarks.accelerator import AcceleratorBenchmark, run

    if not JSON.value:
        raise ValueError("--json: missing; --mode=accelerator writes each result there as it comes")
    file = cli.output_file("json", JSON.value)
    file.parent.mkdir(parents=True, exist_ok=True)
    return run(AcceleratorBenchmark(minutes=MINUTES.value, json=file, tiny=TINY.value))


@dataclasses.dataclass(frozen=True)
class Mode:
    """`run(settings)` measures. `config`: whether it has one. `shares`: whether a CPU's cores are
    to be devices. `writes`: whether it writes --json itself, and leaves the device alone.
    """

    run: Callable[[Any], Any]
    config: bool = True
    shares: bool = False
    writes: bool = False


MODES = {
    "data": Mode(_data),
    "train": Mode(_speed, shares=True),
    "sample": Mode(_speed, shares=True),
    "aot": Mode(_aot),
    "roofline": Mode(_roofline),
    "reuse": Mode(_reuse, config=False),  # its run has one
    "accelerator": Mode(_accelerator, config=False, writes=True),
    "facts": Mode(_facts, config=False),
    "kernels": Mode(_kernels, config=False),
    "collectives": Mode(_collectives, config=False),
    "predicted": Mode(_predicted, config=False),
    "agree": Mode(_agree),
    "largest": Mode(_largest),
}


def main() -> None:
    """Parses, measures, prints, writes."""
    check_choice("--mode", MODE.value, MODES)
    mode = MODES[MODE.value]
    if mode.writes:
        print(mode.run(None).text)
        return
    file = cli.output_file("json", JSON.value) if JSON.value else None
    if PLOT.value:
        cli.output_file("plot", PLOT.value, (".png",))
    config = cli.read_config() if mode.config else None
    if COMPARE.value == "torch":
        host.leave_memory()
    if mode.shares:
        host.one_device_a_core(config["train"]["batch_size"])
    from contextdiff_jax.benchmarks import turns
    from contextdiff_jax.editing.settings import parse_edit
    from contextdiff_jax.evaluation.report import machine
    from contextdiff_jax.settings import parse

    turns.begin()
    edits = (MODE.value, PROGRAM.value) == ("aot", "edit")
    result = mode.run(config and (parse_edit if edits else parse)(config))
    print(result.text)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "command": shlex.join(["python", "-m", "contextdiff_jax.benchmark", *sys.argv[1:]]),
            "machine": machine(),
        }
        write_json(file, {**facts, "rows": result.rows})


def command() -> None:
    """Run `main` with the flags of the command line; contextdiff-benchmark begins here."""
    cli.define_config()
    cli.run(main)


if __name__ == "__main__":
    command()
