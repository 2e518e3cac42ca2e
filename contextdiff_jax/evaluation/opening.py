"""A run opened to be evaluated, on this process's devices."""

from __future__ import annotations

from typing import Any

from contextdiff_jax.evaluation.subject import Enlarge, Evaluation
from contextdiff_jax.inference.opening import of_run
from contextdiff_jax.inference.pipeline import Pipeline
from contextdiff_jax.parallel.mesh import local_mesh, replicate
from contextdiff_jax.runs.frozen import load_frozen
from contextdiff_jax.runs.model import model_graph
from contextdiff_jax.runs.reading import Run
from contextdiff_jax.settings import SampleConfig


def open_evaluation(
    run: Run,
    options: SampleConfig,
    *,
    seed: int,
    baseline: Run | None = None,
    **asked: Any,
) -> Evaluation:
    """The run's evaluation with those options of sampling; `asked`: other fields of `Evaluation`.
    `baseline`: another upsampler, sampled with the same options and noise.

    Raises ValueError for a baseline that enlarges other pictures, and levels out of range.
    """
    pipeline = _open(run, options)
    if run.settings.super_resolution.is_upsampler:
        asked |= {"enlarge": _enlarge(pipeline, seed), "augmentation": options.augmentation}
        run.settings.super_resolution.check_level(options.augmentation)
    elif options.augmentation != run.settings.sample.augmentation:
        raise ValueError(
            f"--augmentation={options.augmentation:g}: is of a model that enlarges pictures; the "
            "run has super_resolution.factor=0"
        )
    if baseline is not None:
        _check_baseline(run, baseline, asked["baseline_name"], options)
        asked["baseline"] = _enlarge(_open(baseline, options), seed)
    return Evaluation(
        settings=run.settings,
        tokenizer=run.tokenizer,
        graph=model_graph(run.settings),
        params=pipeline.opened.weights[0],
        generate=lambda captions, first: pipeline.text_to_image(captions, seed=seed, first=first),
        seed=seed,
        **asked,
    )


def _open(run: Run, options: SampleConfig) -> Pipeline:
    """The run's model; each process samples its own share."""
    params, frozen = replicate(run.params), replicate(load_frozen(run.settings))
    return of_run(
        run.settings, run.tokenizer, params, options=options, frozen=frozen, mesh=local_mesh()
    )


def _enlarge(pipeline: Pipeline, seed: int) -> Enlarge:
    return lambda captions, small, first, level: pipeline.upsample(
        captions, small, seed=seed, first=first, augmentation=level
    )


def _check_baseline(run: Run, other: Run, name: str, options: SampleConfig) -> None:
    config, theirs = run.settings.super_resolution, other.settings.super_resolution
    if config.factor != theirs.factor:
        raise ValueError(
            f"--baseline={name}: has super_resolution.factor={theirs.factor}, the run "
            f"{config.factor}; only upsamplers of one factor compare"
        )
    theirs.check_level(options.augmentation)
