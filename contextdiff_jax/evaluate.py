"""python -m contextdiff_jax.evaluate --workdir=DIR --metrics=composition,bound,fid
python -m contextdiff_jax.evaluate --samples=DIR --reference=DIR --features=FILE --metrics=fid,kid
python -m contextdiff_jax.evaluate --workdir=DIR --protocol=coco30k --captions=F --reference=DIR

Score a run's samples and its likelihood, with 95% intervals. A table on the terminal,
DIR/metrics.json, and the page DIR/report/index.html. What each metric is, and what it needs:
docs/evaluation.md. With --samples two folders of pictures are compared, without a run. --protocol
draws captions and scores FID and CLIP score over guidance, of a run, a model or a folder.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from contextdiff_jax import cli
from contextdiff_jax.runtime import host
from contextdiff_jax.runtime.fields import check_choice
from contextdiff_jax.runtime.files import write_json
from contextdiff_jax.runtime.hub import find

if TYPE_CHECKING:  # JAX starts after the flags are read
    from contextdiff_jax.evaluation.captions import Caption
    from contextdiff_jax.evaluation.protocols import Judge, Protocol
    from contextdiff_jax.evaluation.subject import Evaluation
    from contextdiff_jax.inference import Pipeline
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
REFERENCE = cli.define_path(
    "reference",
    "2048",
    "Real pictures a split to compare with; with --samples a folder of pictures, or a file of "
    "--save_statistics.",
)
SAMPLES = cli.define_path(
    "samples", "", "A folder of pictures, whoever made them, to compare with --reference's."
)
RESIZE = flags.DEFINE_string(
    "resize", "pytorch-fid", "With --samples: whose way to Inception's 299 pixels."
)
cli.list_names("resize", {"one of": "contextdiff_jax.evaluation.folders:RESIZES"})
SAVE_STATISTICS = cli.define_path(
    "save_statistics", "", "With --samples: file for --reference's statistics, to be used again."
)
FEATURES = cli.define_path(
    "features", "", "A classifier's folder or Inception's weights; default: DIR/classifier."
)
CLIP = cli.define_path("clip", "", "Folder of a transformers CLIPModel, for cmmd and clip_score.")
MODEL = cli.define_path("model", None, "With --protocol, not --workdir: as `sample`'s.")
PROTOCOL = flags.DEFINE_string(
    "protocol", None, "Drawn captions, a picture of each, FID and CLIP score over guidance."
)
cli.list_names("protocol", {"one of": "contextdiff_jax.evaluation.protocols:PROTOCOLS"})
CAPTIONS = cli.define_path(
    "captions", None, "With --protocol: COCO's captions (.json), .jsonl, or .txt of one a line."
)
SCALES = flags.DEFINE_list(
    "guidance_scales", None, "With --protocol: of the curve; default: the protocol's."
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 64, "With --protocol: pictures at once.", lower_bound=1
)
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

    count_of(REFERENCE.value)
    if not METRICS.value:
        raise ValueError(f"--metrics: the list is empty; of {', '.join(KNOWN)}")
    for name in METRICS.value:
        check_choice("--metrics", name, KNOWN)
    flags_given = {flag.name: flag.value for flag in (SAMPLER, STEPS, SPACING, GUIDANCE)}
    given = {name: value for name, value in flags_given.items() if value is not None}
    SampleConfig().changed(**given)
    if WORKDIR.value:  # else `load_run` says what is missing
        results_folder()
    return given


def results_folder() -> pathlib.Path:
    """The folder of the results, once it can be written."""
    if not OUT.value and WORKDIR.value and find(WORKDIR.value) != WORKDIR.value:
        raise ValueError(f"--out: missing; --workdir={WORKDIR.value} is a name, not a folder")
    beside = WORKDIR.value and not OUT.value
    return cli.output_folder("workdir" if beside else "out", OUT.value or WORKDIR.value)


def _open(run: Run, options: SampleConfig) -> Evaluation:
    """The run's model, on this process's devices, with the flags' options."""
    from contextdiff_jax.evaluation.subject import Evaluation
    from contextdiff_jax.inference.opening import of_run
    from contextdiff_jax.parallel.mesh import local_mesh, replicate
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
        reference=count_of(REFERENCE.value),
        bound_timesteps=BOUND_TIMESTEPS.value,
    )


def count_of(reference: str) -> int:
    """--reference without --samples, a number."""
    if not reference.isdecimal() or int(reference) < 2:
        raise ValueError(
            f"--reference={reference}: must be at least 2; a folder goes with --samples"
        )
    return int(reference)


def compare_folders() -> None:
    """--samples against --reference: the distances, and DIR/distances.json with --out."""
    from contextdiff_jax.evaluation import folders, report

    names = METRICS.value if flags.FLAGS["metrics"].present else ["fid"]
    for name in names:
        check_choice("--metrics", name, folders.DISTANCES, "--samples")
    check_choice("--resize", RESIZE.value, folders.RESIZES)
    kinds = {folders.DISTANCES[name][1] for name in names}
    for kind, flag in (("features", FEATURES), ("clip", CLIP)):
        if kind in kinds and not flag.value:
            raise ValueError(f"--{flag.name}: missing; {', '.join(names)} need it")
    if SAVE_STATISTICS.value:
        cli.output_file("save_statistics", SAVE_STATISTICS.value, (".safetensors",))
    lookings = {}
    if "features" in kinds:
        lookings["features"] = folders.by_inception(FEATURES.value, RESIZE.value)
    if "clip" in kinds:
        lookings["clip"] = folders.by_clip(CLIP.value)
    save = pathlib.Path(SAVE_STATISTICS.value) if SAVE_STATISTICS.value else None
    found = folders.compare(names, SAMPLES.value, REFERENCE.value, lookings, SEED.value, save)
    for name, estimate in found.items():
        print(f"{name} {report.cell(estimate, '')}  {folders.NOTES[name]}")
    if OUT.value:
        out = pathlib.Path(cli.output_folder("out", OUT.value))
        out.mkdir(parents=True, exist_ok=True)
        told = {name: estimate._asdict() for name, estimate in found.items()}
        facts = {"command": shlex.join(["python", "-m", "contextdiff_jax.evaluate", *sys.argv[1:]])}
        lookings = {kind: looking.name for kind, looking in lookings.items()}
        write_json(out / "distances.json", {**facts, "features": lookings, **told})


def read_scales(default: Sequence[float]) -> list[float]:
    """The guidance scales of --guidance_scales, or --guidance alone, or the protocol's."""
    from contextdiff_jax.settings import SampleConfig

    if SCALES.value is None:
        return list(default) if GUIDANCE.value is None else [GUIDANCE.value]
    try:
        scales = sorted({float(text) for text in SCALES.value})
        for scale in scales:
            SampleConfig(guidance=scale)
    except ValueError as error:
        given = ",".join(SCALES.value)
        raise ValueError(f"--guidance_scales={given}: must be numbers ({error})") from None
    if GUIDANCE.value is not None or not scales:
        raise ValueError("--guidance_scales: give at least one, and --guidance not beside it")
    return scales


def draw_captions() -> tuple[Protocol, list[Caption], int]:
    """The protocol, its captions, and how many of them are asked for. ValueError for flags that
    don't fit together.
    """
    from contextdiff_jax.evaluation.captions import draw_captions
    from contextdiff_jax.evaluation.protocols import PROTOCOLS

    check_choice("--protocol", PROTOCOL.value, PROTOCOLS)
    protocol = PROTOCOLS[PROTOCOL.value]
    if flags.FLAGS["metrics"].present:
        raise ValueError("--metrics: isn't read with --protocol, which says what is scored")
    if sum(map(bool, (WORKDIR.value, MODEL.value, SAMPLES.value))) > 1:
        raise ValueError("--workdir, --model, --samples: only one of them")
    if not CAPTIONS.value:
        raise ValueError("--captions: missing; name COCO's captions, or a .jsonl or .txt file")
    captions = draw_captions(CAPTIONS.value, protocol.seed)[: protocol.count]
    num = NUM.value if flags.FLAGS["num"].present else protocol.count
    if num > len(captions):
        raise ValueError(
            f"--captions={CAPTIONS.value}: {len(captions)} pictures have some; "
            f"--protocol={PROTOCOL.value} draws {num}: --num={len(captions)} takes as many"
        )
    return protocol, captions, num


def open_judge(protocol: Protocol, folder: pathlib.Path) -> Judge:
    """The networks and the real pictures of --features, --clip and --reference."""
    from contextdiff_jax.evaluation import folders, protocols
    from contextdiff_jax.evaluation.networks.clip import load_clip
    from contextdiff_jax.parallel.processes import is_first

    for flag in (REFERENCE, FEATURES):
        if not (flag.value and flags.FLAGS[flag.name].present):
            raise ValueError(f"--{flag.name}: missing; FID needs real pictures and Inception")
    check_choice("--resize", RESIZE.value, folders.RESIZES)
    looking = folders.at_size(folders.by_inception(FEATURES.value, RESIZE.value), protocol.size)
    clip = load_clip(CLIP.value) if CLIP.value else None
    if clip is not None:
        clip.check(protocol.size)
    reference = protocols.open_reference(REFERENCE.value, looking, SEED.value, folder)
    if SAVE_STATISTICS.value:
        file = cli.output_file("save_statistics", SAVE_STATISTICS.value, (".safetensors",))
        if is_first():
            reference.save(file)
    name = f"CLIP {folders.digest(pathlib.Path(find(CLIP.value)))}" if clip else ""
    return protocols.Judge(
        protocol=protocol, looking=looking, reference=reference, clip=clip, clip_name=name
    )


def follow_protocol() -> None:
    """Draws captions, makes or takes a picture of each, and scores them."""
    from contextdiff_jax.evaluation import protocols, report
    from contextdiff_jax.evaluation.captions import write_captions
    from contextdiff_jax.parallel import processes
    from contextdiff_jax.settings import SampleConfig

    protocol, captions, num = draw_captions()
    scales, folder = read_scales(protocol.guidance), results_folder() / "protocols" / PROTOCOL.value
    options = {flag.name: flag.value for flag in (SAMPLER, STEPS, SPACING) if flag.value}
    SampleConfig().changed(**options)
    processes.start(None, None, None, os.environ, processes.TIMEOUT)
    if processes.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        write_captions(folder / "captions.jsonl", captions[:num])
    if not (WORKDIR.value or MODEL.value or SAMPLES.value):
        print(f"{folder / 'captions.jsonl'}: {num} captions; --samples=FOLDER for their pictures")
        return

    def tell(scale: float | None, scores: Mapping[str, Any]) -> None:
        row = "samples" if scale is None else f"guidance {scale:g}"
        if processes.is_first():
            print(report.table({row: scores}, ""), flush=True)

    if SAMPLES.value:
        files = protocols.numbered_pictures(pathlib.Path(SAMPLES.value), num)
        judge, source = open_judge(protocol, folder), SAMPLES.value
        points = {None: judge.scores(files, [caption.text for caption in captions[:num]])}
        tell(None, points[None])
    else:
        pipeline = open_pipeline(folder)
        judge, source = open_judge(protocol, folder), pipeline.opened.source
        options |= {"seed": SEED.value, "batch_size": BATCH_SIZE.value}
        arguments = pipeline, judge, captions, num, scales, folder, tell
        points = protocols.sample_curve(*arguments, **options)
    if not processes.is_first():
        return
    facts = {
        "command": shlex.join(["python", "-m", "contextdiff_jax.evaluate", *sys.argv[1:]]),
        "protocol": dataclasses.asdict(protocol) | {"name": PROTOCOL.value},
        "source": source,
        "num": num,
        **judge.about,
        "machine": report.machine(),
    }
    protocols.write_curve(folder, points, facts)
    if not SAMPLES.value:
        report.plot_curve(points, folder / "curve.png")
    print(folder / "curve.json")


def open_pipeline(folder: pathlib.Path) -> Pipeline:
    """The run or the model, on this process's devices; its programs are kept in the folder."""
    from etils import epath

    from contextdiff_jax.inference import Pipeline

    programs = host.set_compilation_cache(epath.Path(folder))
    read = {"weights": WEIGHTS.value, "ema_length": EMA_LENGTH.value}
    return Pipeline.open(MODEL.value or WORKDIR.value, **read, programs=programs)


def main() -> None:
    """Parses, samples, scores, reports."""
    if PROTOCOL.value is not None:
        follow_protocol()
        return
    if SAMPLES.value:
        compare_folders()
        return
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
