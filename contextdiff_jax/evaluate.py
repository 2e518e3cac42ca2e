"""python -m contextdiff_jax.evaluate --workdir=DIR --metrics=composition [--num=256] [--guidance=3]

Scores of a run's samples, as a table on the terminal and in DIR/metrics.json. `composition`: pictures for captions of
training and of held-out attribute combinations, judged from their pixels (data.source=shapes).
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

from absl import flags

from contextdiff_jax import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained run.")
METRICS = flags.DEFINE_list("metrics", ["composition"], "Comma-separated names of metrics.")
NUM = flags.DEFINE_integer("num", 256, "Captions a split.", lower_bound=1)
GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale; default: the run's config.")
SAMPLER = flags.DEFINE_string("sampler", None, "ddim or ddpm; default: the run's config.")
STEPS = flags.DEFINE_integer("steps", None, "Sampling steps; default: the run's config.")
SEED = flags.DEFINE_integer("seed", 0, "Of the samples' noise.")
WEIGHTS = flags.DEFINE_string("weights", "ema", "ema or params.")


def composition(run, generator, num: int, seed: int) -> dict[str, dict[str, float]]:
    """{split: {exact, shape, colour, ...}} over `num` captions of each split of `shapes`."""
    from contextdiff_jax.data import make_source
    from contextdiff_jax.evaluation.composition import composition as score

    if run.settings.data.source != "shapes":
        raise ValueError(
            f"--metrics=composition: judges scenes of data.source='shapes'; the run's is {run.settings.data.source!r}"
        )
    scores = {}
    for split, name in (("train", "seen combinations"), ("heldout", "held-out combinations")):
        # Other scenes than those trained on, of the same combinations.
        source = make_source(dataclasses.replace(run.settings.data, scene_seed=run.settings.data.scene_seed + 1), split)
        captions = [source[i]["caption"] for i in range(num)]
        scores[name] = score(generator(run.params, captions, seed), captions)
    return scores


COMMAND_METRICS = {"composition": composition}


def table(scores: dict[str, dict[str, float]]) -> str:
    """Rows of scores as text, a column a name, in per cent."""
    columns = list(dict.fromkeys(name for row in scores.values() for name in row))
    width = max(len(row) for row in scores)
    lines = [" " * width + "".join(f"{name:>10}" for name in columns)]
    for row, values in scores.items():
        cells = (f"{100 * values[c]:9.1f}%" if c in values else " " * 9 + "-" for c in columns)
        lines.append(f"{row:<{width}}" + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    """Parses, samples, scores."""
    for name in METRICS.value:
        if name not in COMMAND_METRICS:
            raise ValueError(f"--metrics={name!r}: unknown; one of {', '.join(COMMAND_METRICS)}")

    from contextdiff_jax.generation import Generator
    from contextdiff_jax.run import load_run

    run = load_run(WORKDIR.value, WEIGHTS.value)
    given = {"sampler": SAMPLER.value, "steps": STEPS.value, "guidance": GUIDANCE.value}
    options = dataclasses.replace(
        run.settings.sample, **{name: value for name, value in given.items() if value is not None}
    )
    workdir = pathlib.Path(WORKDIR.value)
    cli.set_compilation_cache(workdir)
    generator = Generator(run.settings, run.tokenizer, options)
    report = {"step": run.step, "num": NUM.value, "seed": SEED.value, "sample": dataclasses.asdict(options)}
    for name in METRICS.value:
        report[name] = COMMAND_METRICS[name](run, generator, NUM.value, SEED.value)
        print(f"{name}, step {run.step}, {NUM.value} captions a row, {options.sampler} {options.steps} steps, "
              f"guidance {options.guidance}\n{table(report[name])}")
    (workdir / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
