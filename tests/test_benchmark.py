"""The benchmark command: rows, comparisons, what it refuses."""

from __future__ import annotations

import json

import pytest
from conftest import command

from contextdiff_jax.benchmarks import loading
from contextdiff_jax.benchmarks.loading import DataBenchmark, Pipeline, run
from contextdiff_jax.benchmarks.source_layouts import make_pictures, write_webdataset
from contextdiff_jax.data import DataConfig

SMALL = {"repeats": 1, "pictures": 16, "shape": (24, 32)}


def test_every_source_is_measured_on_the_same_pictures_where_the_config_names_none(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"images_per_second": {rate}}}\n' for rate in (10, 50, 1000))
    )
    config = DataConfig(image_size=16)
    result = run(config, DataBenchmark(**SMALL, compare="tfds", workdir=str(tmp_path)))
    rows = {row["name"]: row for row in result.rows}
    assert list(rows) == [*("shapes", "folder", "webdataset", "tfds", "tfds itself", "huggingface")]
    for row in rows.values():
        assert row["seconds"] > 0 and row["pictures_per_second"] == row["pictures"] / row["seconds"]
        assert row["need"] == 50 and row["cores_needed"] == 50 / row["pictures_per_second"]
    assert rows["tfds"]["ratio"] == rows["tfds itself"]["seconds"] / rows["tfds"]["seconds"]
    assert [name for name, row in rows.items() if "ratio" in row] == ["tfds"]
    assert all(name in result.text for name in rows) and "the 50 pictures/s" in result.text


def test_ratios_are_of_pairs_and_rows_of_medians(monkeypatch):
    """Ours takes 1, 2, 4 s and the peer 3, 2, 8: medians 2 and 3, paired ratios 3, 1, 2."""
    # Peer and ours take turns at the first place.
    clock = iter([0, 3, 0, 1, 0, 2, 0, 2, 0, 8, 0, 4])
    monkeypatch.setattr(loading.time, "process_time", lambda: next(clock))
    endless = iter(lambda: 0, 1)
    pipelines = [Pipeline("ours", endless, 0.0, "peer"), Pipeline("peer", endless, 0.0)]
    seconds = loading._measure(pipelines, repeats=3, batches=1)
    assert seconds == {"ours": [1, 2, 4], "peer": [3, 2, 8]}
    row = loading._row(pipelines[0], seconds, 30, 8, 0)
    assert (
        row["seconds"] == 2
        and row["ratio"] == 2
        and row["pictures_per_second"] == 15
        and "need" not in row
    )


def test_comparisons_that_cannot_be_are_refused_in_one_line(tmp_path):
    write_webdataset(tmp_path, make_pictures(8, 16, 16))
    shards = DataConfig(source="webdataset", path=str(tmp_path))
    for config, options, words in (
        (
            DataConfig(),
            {"compare": "torch"},
            "--compare='torch': unknown for --mode=data; one of webdataset, tfds",
        ),
        (shards, {"compare": "tfds"}, "--compare='tfds': data.path holds data.source='webdataset'"),
        (shards, {"workdir": str(tmp_path)}, "its metrics.jsonl holds no images_per_second"),
    ):
        with pytest.raises(ValueError) as error:
            run(config, DataBenchmark(**SMALL, **options))
        assert words in str(error.value) and "\n" not in str(error.value)


def test_the_command_measures_a_configs_own_data_against_the_package(tmp_path):
    path = write_webdataset(tmp_path / "shards", make_pictures(16, 24, 32))
    done = command(
        "benchmark",
        "--mode=data",
        "--config=configs/base.py",
        "--config.data.source=webdataset",
        f"--config.data.path={path}",
        "--config.data.image_size=16",
        "--compare=webdataset",
        "--need=100",
        "--pictures=16",
        "--repeats=1",
        f"--json={tmp_path / 'rows.json'}",
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["webdataset", "webdataset itself"] and rows[0][
        "ratio"
    ] > 0
    assert "webdataset itself" in done.stdout and "times" in done.stdout


def test_an_unknown_mode_is_one_line_and_exit_status_2():
    done = command("benchmark", "--mode=dta")
    assert done.returncode == 2
    said = "error: --mode='dta': unknown; one of data, train, sample, aot, roofline, reuse, "
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1
