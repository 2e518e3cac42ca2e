"""The classifier of a data set's attributes, from its config to a folder: features and judge of
later evaluations.
"""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np

from contextdiff_jax.data import DataConfig
from contextdiff_jax.evaluation.features import extract
from contextdiff_jax.evaluation.intervals import Estimate, mean_interval
from contextdiff_jax.evaluation.networks import classifier
from contextdiff_jax.evaluation.subject import classifier_source, feature_fns


def fit_classifier(
    data: DataConfig,
    folder: pathlib.Path,
    *,
    steps: int = 1000,
    num: int = 10_000,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> tuple[dict[str, Estimate], int]:
    """Trains on nine tenths of `num` pictures and writes FOLDER/classifier.{safetensors,json}.

    Returns its accuracy by attribute on the tenth that was kept aside, and how many pictures that
    was.
    """
    source = classifier_source(data)
    order = np.random.default_rng(seed).permutation(len(source))[:num]
    records = [source[int(i)] for i in order]
    images = np.stack([record["image"] for record in records])
    labels = [classifier.read_labels(record["attributes"]) for record in records]
    aside = len(records) // 10
    options = dict(steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
    model = classifier.train_classifier(images[aside:], labels[aside:], **options)
    logits = extract(feature_fns(model)["logits"], images[:aside], label="accuracy")
    answers = classifier.correct(logits, labels[:aside], model.attributes)
    accuracy = {name: mean_interval(values) for name, values in answers.items()}
    classifier.save_classifier(
        model,
        folder,
        {
            "accuracy": {name: e._asdict() for name, e in accuracy.items()},
            "pictures_kept_aside": aside,
            "pictures": len(records) - aside,
            **options,
            "data": dataclasses.asdict(data),
        },
    )
    return accuracy, aside
