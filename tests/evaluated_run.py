"""A run with random weights, an evaluation of what a perfect model would make, and report pages."""

import html.parser
import json

import jax
import jax.numpy as jnp
import numpy as np
from conftest import SMALLEST, config_dict
from flax import nnx

from contextdiff_jax.evaluation import subject
from contextdiff_jax.evaluation.networks import classifier
from contextdiff_jax.runs import checkpoints
from contextdiff_jax.runs.model import model_graph
from contextdiff_jax.runs.reading import load_run
from contextdiff_jax.runs.workdir import claim_workdir
from contextdiff_jax.settings import parse
from contextdiff_jax.training.state import init_state


def write_run(folder):
    """A run as it stands in its folder, and a classifier, both of random weights: compiling and
    training them would take most of a minute.
    """
    config = config_dict(**SMALLEST, **{"data.num_objects": "(1,2)"})
    settings = parse(config)
    claim_workdir(folder, config)
    rng = np.random.default_rng(0)

    def fill(leaf):
        drawn = (
            rng.normal(scale=0.1, size=leaf.shape)
            if leaf.dtype == np.float32
            else np.full(leaf.shape, 3)
        )
        return jnp.asarray(drawn, leaf.dtype)  # the step is 3

    state = jax.tree.map(fill, jax.eval_shape(lambda: init_state(settings)))
    with checkpoints.open_manager(folder) as manager:
        checkpoints.save(manager, state, {"next_batch": 3})
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, "loss": 1 / i}) + "\n" for i in (1, 2, 3))
    )
    source = subject.classifier_source(settings.data)
    labels = [classifier.read_labels(source[i]["attributes"]) for i in range(200)]
    model = classifier.Classifier(
        classifier.choose_attributes(labels), settings.data.image_size, rngs=nnx.Rngs(0)
    )
    classifier.save_classifier(model, folder / "classifier", {})
    return folder


def perfect_evaluation(workdir):
    """Samples here are the real pictures of the captions: what a perfect model would make."""
    run = load_run(str(workdir))
    made = subject.Evaluation(
        settings=run.settings,
        tokenizer=run.tokenizer,
        graph=model_graph(run.settings),
        params=run.params,
        generate=lambda captions, first: None,
        features=str(workdir / "classifier"),
        num=24,
        reference=40,
        bound_timesteps=7,
    )

    def generate(captions, first):
        records = next(made.records(row) for row in made.sources if made.captions(row) == captions)
        return np.stack([record["image"] for record in records])

    object.__setattr__(made, "generate", generate)
    return made


def value(result, row, name):
    return result.scores[row][name].value


class Page(html.parser.HTMLParser):
    """Collects the addresses and the text of a page."""

    def __init__(self):
        super().__init__()
        self.addresses, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href")]
        assert tag not in ("script", "link", "iframe")

    def handle_data(self, data):
        self.text.append(data)
