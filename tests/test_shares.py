"""Shares of the records and what brings them together: in one process, and in two real ones."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SMALLEST, XLA_FLAGS, config_dict
from flax import nnx
from PIL import Image
from two_processes import evaluate_share

from contextdiff_jax.data import load_tokenizer
from contextdiff_jax.evaluation import metrics, shares, subject
from contextdiff_jax.evaluation.networks import classifier
from contextdiff_jax.runs.model import model_graph
from contextdiff_jax.settings import parse


def test_shares_are_a_partition_in_order_of_almost_equal_sizes():
    for size, count in ((7, 1), (7, 3), (2, 4), (0, 2), (1000, 64)):
        parts = [shares.share(size, index, count) for index in range(count)]
        assert [i for part in parts for i in part] == list(range(size))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert shares.share(9) == range(9)  # of one process


def test_a_name_that_a_part_lacks_is_nan_there():
    parts = [
        {"exact": np.array([1.0, 0.0]), "relation": np.array([1.0, np.nan])},
        {"exact": np.array([1.0])},
    ]
    joined = shares.join(parts)
    np.testing.assert_array_equal(joined["exact"], [1, 0, 1])
    np.testing.assert_array_equal(joined["relation"], [1, np.nan, np.nan])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run, as the metrics of pictures read it: its config and a classifier."""
    folder = tmp_path_factory.mktemp("run")
    config = config_dict(**SMALLEST, **{"data.num_objects": "(1,2)"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "pictures").mkdir()
    for i in range(5):
        Image.new("RGB", (3, 3), (50 * i, i, 9)).save(folder / "pictures" / f"{i}.png")
    data = parse(config).data
    source = subject.classifier_source(data)
    labels = [classifier.read_labels(source[i]["attributes"]) for i in range(200)]
    model = classifier.Classifier(
        classifier.choose_attributes(labels), data.image_size, rngs=nnx.Rngs(0)
    )
    classifier.save_classifier(model, folder / "classifier", {})
    return folder


def test_two_processes_with_a_share_each_have_the_figures_of_one(workdir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": XLA_FLAGS,
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    program = [sys.executable, str(ROOT / "tests/two_processes.py"), str(port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    running = [subprocess.Popen([*program, str(rank), str(workdir)], **pipes) for rank in range(2)]
    one = json.loads(json.dumps(evaluate_share(workdir)))  # meanwhile
    outputs = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)

    assert (first.pop("pictures"), second.pop("pictures"), one.pop("pictures")) == (12, 13, 25)
    assert first == second and first["rows are the same"]
    np.testing.assert_allclose(first["mean"], one["mean"], rtol=1e-15)
    (count, mean, rows), (_, own_mean, own_rows) = first["folder"], one["folder"]
    assert count == 5 and rows == own_rows == [[50.0 * i, i, 9.0] for i in range(5)]
    np.testing.assert_allclose(mean, own_mean, rtol=1e-15)
    # At 1e6, of squares 1e12.
    np.testing.assert_allclose(first["covariance"], one["covariance"], rtol=1e-9, atol=1e-9)
    for name, rows in one["scores"].items():
        for row, scores in rows.items():
            for key, estimate in scores.items():
                np.testing.assert_allclose(
                    first["scores"][name][row][key], estimate, rtol=1e-5, atol=1e-6
                )
    exact = one["scores"]["composition"]["seen combinations"]["exact"]
    assert 0 <= exact[0] < 0.5 and first["scores"]["composition"] == one["scores"]["composition"]


def test_fewer_pictures_than_processes_are_refused(workdir, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 3)
    settings = parse(json.loads((workdir / "config.json").read_text()))
    made = subject.Evaluation(
        settings=settings,
        tokenizer=load_tokenizer(),
        graph=model_graph(settings),
        params=None,
        features="",
        num=2,
        generate=lambda *_: None,
    )
    with pytest.raises(
        ValueError,
        match="--num, --reference: 2 pictures of seen combinations for 3 processes; each",
    ):
        metrics.check(["composition"], made)
