"""python -m contextdiff_jax.train_classifier --config=configs/shapes.py --workdir=DIR [--steps=1000] [--num=10000]

Trains a classifier of the attributes of a config's data: the feature network of `evaluate --features=DIR`. Writes
DIR/classifier.safetensors and DIR/classifier.json: what it answers, and its accuracy on pictures kept aside.
"""

from __future__ import annotations

import dataclasses
import pathlib

from absl import flags

from contextdiff_jax import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Folder to write the classifier to.")
STEPS = flags.DEFINE_integer("steps", 1000, "Training steps.", lower_bound=1)
NUM = flags.DEFINE_integer("num", 10_000, "Pictures, of which a tenth is kept aside for the accuracy.", lower_bound=100)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Pictures a step.", lower_bound=1)
LEARNING_RATE = flags.DEFINE_float("learning_rate", 3e-3, "Of AdamW.", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "Of the weights, the order of the pictures and which are kept aside.")


def main() -> None:
    """Parses, reads the pictures, trains, judges, saves."""
    config = cli.read_config()
    if not WORKDIR.value:
        raise ValueError("--workdir: missing; name the folder for the classifier")

    import numpy as np

    from contextdiff_jax.evaluation import classifier
    from contextdiff_jax.evaluation.features import extract
    from contextdiff_jax.evaluation.intervals import mean_interval
    from contextdiff_jax.evaluation.metrics import classifier_source, feature_fns
    from contextdiff_jax.settings import parse

    settings = parse(config)
    workdir = pathlib.Path(WORKDIR.value)
    cli.set_compilation_cache(workdir)
    source = classifier_source(settings.data)
    order = np.random.default_rng(SEED.value).permutation(len(source))[: NUM.value]
    records = [source[int(i)] for i in order]
    images = np.stack([record["image"] for record in records])
    labels = [classifier.read_labels(record["attributes"]) for record in records]
    aside = len(records) // 10
    model = classifier.train_classifier(
        images[aside:], labels[aside:], steps=STEPS.value, batch_size=BATCH_SIZE.value,
        learning_rate=LEARNING_RATE.value, seed=SEED.value,
    )
    logits = extract(feature_fns(model)["logits"], images[:aside], label="accuracy")
    accuracy = {}
    for name, answers in classifier.correct(logits, labels[:aside], model.attributes).items():
        accuracy[name] = mean_interval(answers)
        value, low, high = (100 * v for v in accuracy[name])
        print(f"{name}: {value:.1f}% right [{low:.1f}, {high:.1f}]")
    report = {
        "accuracy": {name: e._asdict() for name, e in accuracy.items()}, "pictures_kept_aside": aside,
        "pictures": len(records) - aside, "steps": STEPS.value, "batch_size": BATCH_SIZE.value,
        "learning_rate": LEARNING_RATE.value, "seed": SEED.value, "data": dataclasses.asdict(settings.data),
    }
    classifier.save_classifier(model, workdir, report)
    print(f"{workdir / classifier.WEIGHTS_FILE}: {len(records) - aside} pictures, accuracy on {aside} others")


if __name__ == "__main__":
    cli.define_config()
    cli.run(main)
