"""A plan's page: tables, differences by seed, curves by the number of evaluations."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats
from test_experiments import PLAN, line_of

from contextdiff_jax.experiments import results
from contextdiff_jax.experiments.finished import add_finished


def test_the_page_has_paired_differences_by_students_t_and_names_what_is_missing(tmp_path):
    rng = np.random.default_rng(0)
    values = {"none": rng.normal(size=3), "more": rng.normal(size=2)}
    path = tmp_path / "t.jsonl"
    for cell in PLAN.cells():
        if cell.name != "none-2":
            found = {
                "scores": {"x": {"y": values[cell.variant][cell.seed]}},
                "training": {"step": [], "context_gain": []},
            }
            rest = {
                "seconds": 1,
                "commit": "c",
                "machine": dict(cpu="", devices="", jax=""),
            }
            add_finished(path, line_of(cell, **found, **rest))
    line = results.write_page(PLAN, "t", "configs/t.py", tmp_path)
    assert "4 cells, 1 to go" in line
    read = results.read_results(PLAN, path)
    scores = {name: results.scores_of(read, name, "x/y") for name in values}
    difference = results.paired(scores["more"], scores["none"])
    differences = values["more"][:2] - values["none"][:2]
    reach = stats.t.ppf(0.975, 1) * differences.std(ddof=1) / np.sqrt(2)
    expected = differences.mean() + np.array([0, -reach, reach])
    np.testing.assert_allclose(difference[:3], expected, rtol=1e-6)
    page = (tmp_path / "t.md").read_text()
    assert (
        "Not run yet: none-2." in page and f"{difference.mean:+.3f} [{difference.low:+.3f}" in page
    )
    assert "taskset" not in page and "same digits" not in page  # "": no CPU's cells
    stale = read["none"][0] | {"config": {"seed": 0, "a": {"b": 3}}}
    add_finished(path, stale)
    assert list(results.read_results(PLAN, path)["none"]) == [1]


def test_a_page_has_its_scores_by_the_number_of_evaluations(tmp_path):
    curves = {"exact": "held, {}/exact"}
    samplers = {"ddim, 4": ("ddim", 4), "ddim, 8": ("ddim", 8), "heun, 7": ("heun", 4)}
    plan = dataclasses.replace(PLAN, curves=curves, options={"samplers": samplers})
    values = {"ddim, 4": (0.25, 0.5), "ddim, 8": (0.5, 0.75), "heun, 7": (1.0, 0.0)}
    for seed in (0, 1):
        scores = {f"held, {label}": {"exact": pair[seed]} for label, pair in values.items()}
        rest = {"seconds": 1, "commit": "c", "machine": dict(cpu="", devices="", jax="")}
        training = {"step": [], "context_gain": []}
        line = line_of(plan.cell("none", seed), scores=scores, training=training, **rest)
        add_finished(tmp_path / "t.jsonl", line)
    results.write_page(plan, "t", "configs/t.py", tmp_path)
    read = results.read_results(plan, tmp_path / "t.jsonl")
    found = results.curve(plan, read, "none", curves["exact"])
    assert found == {"ddim": {4: 0.375, 8: 0.625}, "heun": {7: 0.5}}
    rows = [row.split("|")[1:-1] for row in (tmp_path / "t.md").read_text().splitlines()]
    cells = [[cell.strip() for cell in row] for row in rows if row]
    assert ["`none`: exact, by evaluations", "4", "7", "8"] in cells
    assert ["`ddim`", "0.375", "-", "0.625"] in cells and ["`heun`", "-", "0.500", "-"] in cells
    assert (tmp_path / "t_curves.png").stat().st_size > 1000


@pytest.mark.filterwarnings("ignore:Precision loss")
def test_differences_that_are_all_alike_have_an_interval_without_width():
    difference = results.paired({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.5, 1: 1.5, 2: 2.5})
    assert difference == results.Paired(0.5, 0.5, 0.5, 3)
    assert results.paired({0: 1.0, 1: 2.0}, {1: 1.0, 2: 5.0}) is None
