"""A share of an evaluation, and a program that does one of two: python two_processes.py PORT RANK
WORKDIR.
"""

import functools
import json
import pathlib
import sys

import jax
import numpy as np

from contextdiff_jax.data import load_tokenizer
from contextdiff_jax.evaluation import folders, metrics, shares, subject
from contextdiff_jax.evaluation.features import Moments
from contextdiff_jax.runs.model import model_graph
from contextdiff_jax.settings import parse


def evaluate_share(workdir: pathlib.Path) -> dict:
    """Metrics of a run whose samples are its pictures one record late, so right and wrong ones; and
    plain statistics.
    """
    settings = parse(json.loads((workdir / "config.json").read_text()))
    row, source = next(iter(subject.splits(settings.data).items()))
    made = subject.Evaluation(
        settings=settings,
        tokenizer=load_tokenizer(),
        graph=model_graph(settings),
        params=None,
        features=str(workdir / "classifier"),
        num=25,
        generate=lambda captions, first: np.stack(
            [source[first + 1 + i]["image"] for i in range(len(captions))]
        ),
        reference=41,
    )
    made.__dict__["sources"] = {row: source}
    names = ("composition", "fid", "kid", "precision_recall", "attributes")
    metrics.check(names, made)
    result = {name: metrics.METRICS[name](made).scores for name in names}

    rows = 1e6 + np.random.default_rng(0).normal(size=(101, 5))
    own = shares.share(len(rows))
    part = Moments.of(rows[own.start : own.stop])
    parts = shares.gather(
        {"count": np.array(part.count), "mean": part.mean, "scatter": part.scatter}
    )
    whole = functools.reduce(
        Moments.merge, (Moments(int(p["count"]), p["mean"], p["scatter"]) for p in parts)
    )
    same = (
        shares.gather_rows({"rows": rows[own.start : own.stop]})["rows"].tobytes() == rows.tobytes()
    )
    looking = folders.Looking(
        "means", lambda p: p.reshape(-1, 3).mean(0).astype(np.float32), lambda batch: batch
    )
    looked = folders.look(workdir / "pictures", looking)
    return {
        "folder": [looked.moments.count, looked.moments.mean.tolist(), looked.kept.tolist()],
        "scores": result,
        "pictures": len(made.samples(row)),
        "mean": whole.mean.tolist(),
        "rows are the same": same,
        "covariance": whole.covariance.tolist(),
    }


if __name__ == "__main__":
    port, rank, workdir = sys.argv[1:]
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
    print("\n" + json.dumps(evaluate_share(pathlib.Path(workdir))))
