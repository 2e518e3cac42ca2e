"""The work of a cell, by the plan's kind: `(cell, workdir) -> scores`, plain values for JSON."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from contextdiff_jax.data import DataConfig
from contextdiff_jax.evaluation import distances, metrics, subject
from contextdiff_jax.evaluation.composition import is_main, judge
from contextdiff_jax.evaluation.features import extract
from contextdiff_jax.evaluation.fit_classifier import fit_classifier
from contextdiff_jax.evaluation.networks.classifier import WEIGHTS_FILE, correct, read_labels
from contextdiff_jax.evaluation.report import machine
from contextdiff_jax.experiments.estimates import estimate_cell
from contextdiff_jax.experiments.finished import add_finished
from contextdiff_jax.experiments.oracle import OracleGenerator
from contextdiff_jax.experiments.plan import VALIDATION_SCENES, Cell
from contextdiff_jax.experiments.toy import toy_cell
from contextdiff_jax.experiments.trained import trained_params
from contextdiff_jax.inference.opening import of_run
from contextdiff_jax.runs.model import model_graph
from contextdiff_jax.runs.tokenizer import open_tokenizer
from contextdiff_jax.runtime.files import read_lines
from contextdiff_jax.settings import SampleConfig, Settings, parse

LOGGER = logging.getLogger(__name__)
Generate = Callable[[Sequence[dict[str, Any]]], UInt8[np.ndarray, "N H W 3"]]


def picture_cell(cell: Cell, workdir: pathlib.Path) -> dict[str, Any]:
    """Train, choose the guidance scale on validation captions, score the samples and the bound.

    Options: `num` samples a split; `guidances`, the grid; `scales`, of guidance "1" and "best";
    `validation` captions to choose on; `samplers` {name: steps}, or {label: (name, steps)}, the
    first of which chooses; `true_context`: whether the sampler is also given r of the true
    pictures; `bound` pictures a split (0: none), scored by the bound at `bound_timesteps` strata
    or, on a path, by the flow's likelihood in as many steps; `classifier` training steps (0: none)
    of the network whose features give the FID, and which judges what is not `shapes`. It is trained
    once a plan, next to the runs.
    """
    settings = parse(cell.config)
    study = _Study(settings, trained_params(cell, workdir), cell.seed, cell.options, workdir.parent)
    validation = study.validate()
    best = max(validation, key=validation.get)
    scores: dict[str, Any] = {
        "validation": {str(scale): share for scale, share in validation.items()},
        "guidance": best,
    }
    marks = {}
    for name in cell.options["samplers"]:
        found = {}
        for label, scale in (("1", 1.0), ("best", best)):
            if label not in cell.options.get("scales", ("1", "best")):
                continue
            if scale not in found:
                options = study.sampler(name, scale)
                found[scale] = study.score(study.generator(options), fidelity=True)
            for row, (values, exact) in found[scale].items():
                scores[f"{row}, {name}, guidance {label}"] = values
                marks[f"{row}, {name}, guidance {label}"] = exact
    # r(c) is known: its estimate is the true one
    if settings.context.network.reads_x0 and cell.options.get("true_context", True):
        options = study.first_sampler(best)
        oracle = OracleGenerator(settings, study.tokenizer, options)
        found = study.score(
            lambda records: oracle(study.params, records, cell.seed), fidelity=False
        )
        scores |= {
            f"{row}, {options.sampler}, guidance best, true context": values
            for row, (values, _) in found.items()
        }
    if cell.options["bound"]:
        score = metrics.likelihood if settings.process.schedule.continuous else metrics.bound
        bits = score(study.evaluation(cell.options["bound"]))
        scores["bound"] = {row: values["total"].value for row, values in bits.scores.items()}
    return {"scores": scores, "marks": marks, "training": _training(workdir, study.params)}


class _Study:
    """A trained model and the questions to it, about records: captions, for the oracle pictures."""

    def __init__(
        self,
        settings: Settings,
        params: Any,
        seed: int,
        options: dict[str, Any],
        folder: pathlib.Path,
    ):
        self.settings, self.params, self.seed, self.options = settings, params, seed, options
        self.tokenizer = open_tokenizer(settings)
        self.features = ""
        if options["classifier"]:
            path = folder / f"classifier-{options['classifier']}"
            if not (path / WEIGHTS_FILE).exists():
                fit_classifier(settings.data, path, steps=options["classifier"])
            self.features = str(path)
        self.main = self.evaluation(options["num"])  # one, for its cache of real pictures' features

    def evaluation(self, num: int, data: DataConfig | None = None) -> subject.Evaluation:
        settings = self.settings if data is None else dataclasses.replace(self.settings, data=data)
        return subject.Evaluation(
            settings=settings,
            tokenizer=self.tokenizer,
            graph=model_graph(self.settings),
            params=self.params,
            generate=None,
            features=self.features,
            num=num,
            seed=self.seed,
            bound_timesteps=self.options["bound_timesteps"],
        )

    def generator(self, options: SampleConfig) -> Generate:
        pipeline = of_run(self.settings, self.tokenizer, self.params, options=options)
        return lambda records: pipeline.text_to_image(
            [record["caption"] for record in records], seed=self.seed
        )

    def sampler(self, name: str, guidance: float) -> SampleConfig:
        chosen = self.options["samplers"][name]
        sampler, steps = (name, chosen) if isinstance(chosen, int) else chosen
        return dataclasses.replace(
            self.settings.sample, sampler=sampler, steps=steps, guidance=guidance
        )

    def first_sampler(self, guidance: float) -> SampleConfig:
        return self.sampler(next(iter(self.options["samplers"])), guidance)

    def validate(self) -> dict[float, float]:
        """Return {guidance scale: share of exact pictures} on captions of the training split.

        The scenes of `shapes` are others than those trained and evaluated on.
        """
        data = self.settings.data.kind.others(self.settings.data, VALIDATION_SCENES)
        evaluation = self.evaluation(self.options["validation"], data)
        row = next(iter(evaluation.sources))
        shares = {}
        for scale in self.options["guidances"]:
            images = self.generator(self.first_sampler(scale))(evaluation.records(row))
            shares[scale] = float(np.mean(_alignment(evaluation, row, images)["exact"]))
        return shares

    def score(self, generate: Generate, fidelity: bool) -> dict[str, tuple[dict[str, float], str]]:
        """Return {split: (means, one mark a record)}."""
        evaluation, found = self.main, {}
        for row in evaluation.sources:
            images = generate(evaluation.records(row))
            answers = _alignment(evaluation, row, images)
            values = {name: float(np.nanmean(v)) for name, v in answers.items()}
            if fidelity and self.features:
                real = evaluation.real_features(row, 0, evaluation.reference)
                values["fid"] = distances.fid(
                    extract(evaluation.feature_fns["features"], images), real
                ).value
            found[row] = values, "".join("01"[int(v)] for v in answers["exact"])
        return found


def _alignment(
    evaluation: subject.Evaluation, row: str, images: UInt8[np.ndarray, "N H W 3"]
) -> dict[str, Float[np.ndarray, "N"]]:
    """Judge which pictures show what their record says, by attribute, and `exact`: in all.

    By the pixels where that is possible, else by the classifier.
    """
    records = evaluation.records(row)
    if evaluation.settings.data.kind.has_scenes:
        judged = judge(images, [record["caption"] for record in records])
        return {name: values for name, values in judged.items() if is_main(name)}
    labels = [read_labels(record["attributes"]) for record in records]
    logits = extract(evaluation.feature_fns["logits"], images)
    answers = {
        n: v
        for n, v in correct(logits, labels, evaluation.network.attributes).items()
        if not np.isnan(v).all()
    }
    return {
        **answers,
        "exact": np.all([np.nan_to_num(v, nan=1.0) == 1 for v in answers.values()], axis=0).astype(
            float
        ),
    }


def _training(workdir: pathlib.Path, params: Any) -> dict[str, Any]:
    """Cost and course of the training, from its log."""
    rows = read_lines(workdir / "metrics.jsonl")
    speeds = [row["seconds_per_step"] for row in rows]
    flops = [
        row["model_flops_per_second"] * row["seconds_per_step"]
        for row in rows
        if "model_flops_per_second" in row
    ]
    return {
        "steps": rows[-1]["step"],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "seconds_per_step": float(np.median(speeds)),
        "flops_per_step": float(np.median(flops)) if flops else None,
        "step": [row["step"] for row in rows],
        "loss": [row["loss"] for row in rows],
        "context_gain": [row["context_gain"] for row in rows],
    }


CELLS: dict[str, Callable[[Cell, pathlib.Path], dict[str, Any]]] = {
    "pictures": picture_cell,
    "estimates": estimate_cell,
    "toy": toy_cell,
}


def run_cell(cell: Cell, folder: pathlib.Path, out: pathlib.Path) -> None:
    """Run one cell in its folder and add its line to the plan's file."""
    LOGGER.info("%s: run in %s", cell.name, folder)
    start = time.time()
    found = CELLS[cell.kind](cell, folder)
    finished = {
        "variant": cell.variant,
        "seed": cell.seed,
        "config": cell.config,
        "options": cell.options,
        "commit": _commit(),
        "machine": machine(),
        "seconds": round(time.time() - start, 1),
        **found,
    }
    add_finished(out, finished)
    print(f"{out}: {cell.name}, {finished['seconds']} s", flush=True)


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return "unknown" if done.returncode else done.stdout.strip()
