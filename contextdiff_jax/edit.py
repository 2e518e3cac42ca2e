"""python -m contextdiff_jax.edit --config=edit_shapes --workdir=DIR --config.video.path=FILE

Edit a clip by text. A video model is tuned on the clip (or goes on with the tuning in the workdir);
then the clip is inverted, and sampled anew by its own prompt and by each of `video.edit_prompts`.
The workdir gets edits/NN.gif, NN.mp4 (or the files of edit.formats) and NN/, strip.png,
metrics.json, report.html, beside the tuning's config.json, metrics.jsonl, events/ and checkpoints/.

Two benchmarks edit many clips whose true edits are known, with and without the context, and score
them (benchmark.json, benchmark.png): --shapes=50 clips of moving shapes, in colour and in shape;
--benchmark=60 of the clips that video.path/edits.jsonl names (docs/video.md).
"""

from __future__ import annotations

from absl import flags

from contextdiff_jax import cli
from contextdiff_jax.runtime import host

cli.group("Edit")
WORKDIR = cli.define_path(
    "workdir", None, "Folder of the edit: everything it writes, and what it resumes from."
)

cli.group("Benchmark")
SHAPES = flags.DEFINE_integer(
    "shapes", 0, "Edit this many clips of moving shapes instead, and score them.", lower_bound=0
)
BENCHMARK = flags.DEFINE_integer(
    "benchmark",
    0,
    "Edit this many of the clips in video.path/edits.jsonl instead, and score them against the "
    "true edits that stand there.",
    lower_bound=0,
)
BASELINE = cli.define_path(
    "baseline", "", "With --shapes, --benchmark: another model for the side without context."
)
OTHERS = flags.DEFINE_list(
    "others",
    [],
    "With --shapes, --benchmark: other ways of editing beside it, as in sdedit,flowedit.",
)
cli.list_names("others", {"ways": "contextdiff_jax.editing.benchmark:OTHERS"})
TUNINGS = flags.DEFINE_integer(
    "tunings",
    1,
    "With --shapes, --benchmark: seeds of the tuning on each clip; scores are their means.",
    lower_bound=1,
)
JUDGE = cli.define_path(
    "judge", "", "With --benchmark: a folder of train_classifier, which says what the frames show."
)


def main() -> None:
    """Parses, edits, prints the table."""
    config = cli.read_config()
    workdir = cli.output_folder("workdir", WORKDIR.value)
    # Imported when the flags are known to be right: it takes seconds.
    from contextdiff_jax.editing import benchmark
    from contextdiff_jax.editing.end_to_end import run_edit, table
    from contextdiff_jax.editing.settings import parse_edit
    from contextdiff_jax.runs.workdir import held

    settings = parse_edit(config)
    host.set_compilation_cache(workdir)
    count = SHAPES.value or BENCHMARK.value
    if count:
        with held(workdir):
            report = benchmark.run_benchmark(
                settings,
                workdir,
                benchmark.cases_of(settings, SHAPES.value, BENCHMARK.value, JUDGE.value),
                count,
                BASELINE.value,
                OTHERS.value,
                TUNINGS.value,
            )
        print(benchmark.table(report))
        return
    with held(workdir):
        metrics = run_edit(settings, config, workdir)
    print(table(metrics))
    print(
        f"{len(metrics['edits'])} edited clips: {workdir / 'edits'}, side by side: "
        f"{workdir / 'strip.png'}"
    )


def command() -> None:
    """Run `main` with the flags of the command line; contextdiff-edit begins here."""
    cli.define_config()
    cli.run(main)


if __name__ == "__main__":
    command()
