"""The report's tables."""

from contextdiff_jax.evaluation import report
from contextdiff_jax.evaluation.intervals import Estimate


def test_tables_show_values_with_intervals_and_dashes():
    second = {"exact": Estimate(1, 1, 1), "more": Estimate(0.25, 0, 1)}
    scores = {"a": {"exact": Estimate(0.5, 0.4, 0.625)}, "b": second}
    lines = report.table(scores, "%").splitlines()
    assert lines[0].split() == ["a", "b"]
    assert lines[1].split() == ["exact", "50.0%", "[40.0,", "62.5]", "100.0%", "[100.0,", "100.0]"]
    assert lines[2].split() == ["more", "-", "25.0%", "[0.0,", "100.0]"]
    assert "0.01235 [-1.5, 2e-06]" in report.table(
        {"a": {"kid": Estimate(0.012345678, -1.5, 2e-6)}}, ""
    )


def test_distances_are_a_line_a_row_so_that_long_names_fit():
    scores = {
        "seen combinations": {"fid": Estimate(1, 0, 2)},
        "real pictures instead": {"fid": Estimate(3, 2, 4)},
    }
    lines = report.table(scores, "").splitlines()
    assert [line.split() for line in lines] == [
        ["fid"],
        ["seen", "combinations", "1", "[0,", "2]"],
        ["real", "pictures", "instead", "3", "[2,", "4]"],
    ]
