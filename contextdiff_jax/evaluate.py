"""python -m contextdiff_jax.evaluate --workdir=DIR --metrics=composition,bound,fid

Score a run's samples and its likelihood, with 95% intervals. A table on the terminal,
DIR/metrics.json, and the page DIR/report/index.html. What each metric is, and what it needs:
docs/evaluation.md.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from contextdiff_jax import cli
from contextdiff_jax.runtime import host
from contextdiff_jax.runtime.fields import check_choice
from contextdiff_jax.runtime.files import write_json
from contextdiff_jax.runtime.hub import find

if TYPE_CHECKING:  # JAX starts after the flags are read
    from contextdiff_jax.evaluation.subject import Evaluation
    from contextdiff_jax.runs.reading import Run
    from contextdiff_jax.settings import SampleConfig

cli.group("Run and metrics")
WORKDIR = cli.define_path(
    "workdir", None, "Folder of a trained run, or a model by its name (then with --out)."
)
OUT = cli.define_path("out", None, "Folder of the results; default: --workdir.")
METRICS = flags.DEFINE_list("metrics", ["composition"], "What each needs: docs/evaluation.md.")
cli.list_names("metrics", {"some of": cli.METRICS})
NUM = flags.DEFINE_integer(
    "num", 256, "Samples, and pictures of the bound, a split.", lower_bound=2
)
REFERENCE = flags.DEFINE_integer(
    "reference", 2048, "Real pictures a split to compare with.", lower_bound=2
)
FEATURES = cli.define_path(
    "features", "", "A classifier's folder or Inception's weights; default: DIR/classifier."
)
CLIP = cli.define_path("clip", "", "Folder of a transformers CLIPModel, for cmmd and clip_score.")
BOUND_TIMESTEPS = flags.DEFINE_integer(
    "bound_timesteps", 50, "KL terms a picture; 0: all.", lower_bound=0
)
cli.group("Sampling")
GUIDANCE = cli.define_float("guidance", None, "Guidance scale; default: the run's config.")
SAMPLER = flags.DEFINE_string("sampler", None, "Default: the run's config.")
cli.list_names("sampler", {"one of": cli.SAMPLERS})
STEPS = flags.DEFINE_integer("steps", None, "Sampling steps; default: the run's config.")
SPACING = flags.DEFINE_string("spacing", None, "Where they are; default: the run's config.")
cli.list_names("spacing", {"one of": cli.SPACINGS})
cli.group("Seed and weights")
SEED = cli.define_seed("Of the samples' noise, the bound's, and the bootstrap.")
WEIGHTS = flags.DEFINE_string("weights", "ema", "ema or params.")
EMA_LENGTH = cli.define_ema_length()


def checked_flags() -> dict[str, Any]:
    """The options of sampling that are given. ValueError, before a checkpoint is read, for a flag
    that can't be right.
    """
    from contextdiff_jax.evaluation.metrics import METRICS as KNOWN
    from contextdiff_jax.settings import SampleConfig

    if not METRICS.value:
        raise ValueError(f"--metrics: the list is empty; of {', '.join(KNOWN)}")
    for name in METRICS.value:
        check_choice("--metrics", name, KNOWN)
    flags_given = {flag.name: flag.value for flag in (SAMPLER, STEPS, SPACING, GUIDANCE)}
    given = {name: value for name, value in flags_given.items() if value is not None}
    SampleConfig().changed(**given)
    if WORKDIR.value:  # else `load_run` says what is missing
        if not OUT.value and find(WORKDIR.value) != WORKDIR.value:
            raise ValueError(f"--out: missing; --workdir={WORKDIR.value} is a name, not a folder")
        cli.output_folder("out" if OUT.value else "workdir", OUT.value or WORKDIR.value)
    return given


def _open(run: Run, options: SampleConfig) -> Evaluation:
    """The run's model, on this process's devices, with the flags' options."""
    from contextdiff_jax.evaluation.features import replicate
    from contextdiff_jax.evaluation.subject import Evaluation
    from contextdiff_jax.inference.opening import of_run
    from contextdiff_jax.parallel.mesh import local_mesh
    from contextdiff_jax.runs.frozen import load_frozen
    from contextdiff_jax.runs.model import model_graph

    params, frozen = replicate(run.params), replicate(load_frozen(run.settings))
    mesh = local_mesh()  # each process samples its own share
    pipeline = of_run(
        run.settings, run.tokenizer, params, options=options, frozen=frozen, mesh=mesh
    )
    return Evaluation(
        settings=run.settings,
        tokenizer=run.tokenizer,
        graph=model_graph(run.settings),
        params=params,
        generate=lambda captions, first: pipeline.text_to_image(
            captions, seed=SEED.value, first=first
        ),
        features=FEATURES.value or str(pathlib.Path(find(WORKDIR.value), "classifier")),
        clip=CLIP.value,
        num=NUM.value,
        seed=SEED.value,
        reference=REFERENCE.value,
        bound_timesteps=BOUND_TIMESTEPS.value,
    )


def main() -> None:
    """Parses, samples, scores, reports."""
    import jax

    from contextdiff_jax.evaluation import metrics, report

    given = checked_flags()

    from contextdiff_jax.runs.reading import load_run

    run = load_run(WORKDIR.value, WEIGHTS.value, ema_length=EMA_LENGTH.value)
    options = run.settings.sample.changed(**given)
    workdir = pathlib.Path(OUT.value or WORKDIR.value)
    host.set_compilation_cache(workdir)
    evaluation = _open(run, options)
    metrics.check(METRICS.value, evaluation)
    results, writes = {}, jax.process_index() == 0
    for name in METRICS.value:
        result = results[name] = metrics.METRICS[name](evaluation)
        if writes:
            print(
                f"{name}, step {run.step}, {NUM.value} a split, {options.sampler} {options.steps} "
                f"steps, guidance {options.guidance}: {result.note}\n"
                f"{report.table(result.scores, result.unit)}\n",
                flush=True,
            )

    if not writes:
        return
    facts = {
        "command": shlex.join(["python", "-m", "contextdiff_jax.evaluate", *sys.argv[1:]]),
        "step": run.step,
        "weights": WEIGHTS.value,
        "ema_length": EMA_LENGTH.value,
        "num": NUM.value,
        "seed": SEED.value,
        "sample": dataclasses.asdict(options),
        "machine": report.machine(),
    }
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "metrics.json", {**facts, **report.as_json(results)})
    samples = {
        row: (images, evaluation.captions(row)) for row, images in evaluation.sampled.items()
    }
    print(f"{report.write_report(workdir, results, samples, facts, run.config)}")


def command() -> None:
    """Run `main` with the flags of the command line; contextdiff-evaluate begins here."""
    cli.run(main)


if __name__ == "__main__":
    command()
