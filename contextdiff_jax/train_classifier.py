"""python -m contextdiff_jax.train_classifier --config=shapes --workdir=DIR --steps=1000 --num=10000

Train a classifier of the attributes of a config's data. It is the feature network of `evaluate
--features=DIR`. Writes DIR/classifier.safetensors and DIR/classifier.json: what it answers, and its
accuracy on pictures kept aside.
"""

from __future__ import annotations

from absl import flags

from contextdiff_jax import cli
from contextdiff_jax.runtime import host

WORKDIR = cli.define_path("workdir", None, "Folder to write the classifier to.")
STEPS = flags.DEFINE_integer("steps", 1000, "Training steps.", lower_bound=1)
NUM = flags.DEFINE_integer(
    "num", 10_000, "Pictures, of which a tenth is kept aside for the accuracy.", lower_bound=100
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Pictures a step.", lower_bound=1)
LEARNING_RATE = cli.define_float("learning_rate", 3e-3, "Of AdamW.", lower=0)
SEED = cli.define_seed("Of the weights, the order of the pictures and which are kept aside.")


def main() -> None:
    """Parses, trains, prints the accuracy."""
    config = cli.read_config()
    workdir = cli.output_folder("workdir", WORKDIR.value)

    from contextdiff_jax.evaluation.fit_classifier import fit_classifier
    from contextdiff_jax.evaluation.networks.classifier import WEIGHTS_FILE
    from contextdiff_jax.settings import parse

    settings = parse(config)
    host.set_compilation_cache(workdir)
    accuracy, aside = fit_classifier(
        settings.data,
        workdir,
        steps=STEPS.value,
        num=NUM.value,
        batch_size=BATCH_SIZE.value,
        learning_rate=LEARNING_RATE.value,
        seed=SEED.value,
    )
    for name, estimate in accuracy.items():
        value, low, high = (100 * v for v in estimate)
        print(f"{name}: {value:.1f}% right [{low:.1f}, {high:.1f}]")
    print(f"{workdir / WEIGHTS_FILE}: accuracy on {aside} pictures kept aside")


def command() -> None:
    """Run `main` with the flags of the command line; contextdiff-train-classifier begins here."""
    cli.define_config()
    cli.run(main)


if __name__ == "__main__":
    command()
