"""A plan's page, OUT/PLAN.md: tables, plots and commands, of the cells that are finished."""

from __future__ import annotations

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from tabulate import tabulate

from contextdiff_jax.experiments.finished import read_finished
from contextdiff_jax.experiments.plan import Plan

Results = dict[str, dict[int, dict[str, Any]]]  # {variant: {seed: the finished cell}}


class Summary(NamedTuple):
    """Over seeds: mean, its standard error (nan of one seed), and the number of seeds."""

    mean: float
    error: float
    count: int


class Paired(NamedTuple):
    """Mean difference to the baseline over common seeds, and its 95% interval by Student's t."""

    mean: float
    low: float
    high: float
    count: int


def look_up(scores: Mapping[str, Any], path: str) -> float | None:
    """Return `a/b` of nested scores; None where this variant has no such score."""
    value: Any = scores
    for name in path.split("/"):
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return float(value)


def summarise(values: Sequence[float]) -> Summary:
    """Return the values' mean and its standard error. ValueError if there are none."""
    if not len(values):
        raise ValueError("summarise: no values")
    error = (
        float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    )
    return Summary(float(np.mean(values)), error, len(values))


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Paired | None:
    """Return the mean difference over the seeds that both have; None with fewer than two."""
    common = sorted(values.keys() & baseline.keys())
    if len(common) < 2:
        return None
    ours, theirs = ([scores[seed] for seed in common] for scores in (values, baseline))
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    return Paired(float(np.subtract(ours, theirs).mean()), float(low), float(high), len(common))


def read_results(plan: Plan, path: pathlib.Path) -> Results:
    """Read the plan's finished cells, and those of other seeds with the same settings."""
    results: Results = {variant: {} for variant in plan.variants}
    for line in read_finished(path):
        if line["variant"] in results and plan.cell(line["variant"], line["seed"]).made(line):
            results[line["variant"]][line["seed"]] = line
    return {variant: dict(sorted(cells.items())) for variant, cells in results.items() if cells}


def scores_of(results: Results, variant: str, path: str) -> dict[int, float]:
    """Return {seed: score} of the seeds that have it."""
    found = {
        seed: look_up(result["scores"], path) for seed, result in results.get(variant, {}).items()
    }
    return {seed: value for seed, value in found.items() if value is not None}


def table(plan: Plan, results: Results) -> str:
    """Make a row a variant: mean and standard error of each headline score."""
    rows = []
    for variant, cells in results.items():
        values = [
            list(scores_of(results, variant, path).values()) for path in plan.headline.values()
        ]
        entries = [_mean_text(summarise(found)) if found else "-" for found in values]
        rows.append([f"`{variant}`", len(cells), *entries])
    return _markdown(["variant", "seeds", *plan.headline], rows)


def difference_table(plan: Plan, results: Results, baseline: str) -> str:
    """Make a row a variant: its difference to the baseline in each headline score.

    It is bold where the interval is clear of 0, without a correction for the number of comparisons.
    Empty if there is no pair of seeds.
    """
    rows = []
    for variant in results:
        found = [
            paired(scores_of(results, variant, path), scores_of(results, baseline, path))
            for path in plan.headline.values()
        ]
        if variant == baseline or not any(found):
            continue
        count = max(difference.count for difference in found if difference)
        rows.append([f"`{variant}`", count, *map(_difference_text, found)])
    head = [f"minus `{baseline}` [95%]", "pairs", *plan.headline]
    return _markdown(head, rows) if rows else ""


def curve(plan: Plan, results: Results, variant: str, path: str) -> dict[str, dict[int, float]]:
    """Return {sampler: {number of evaluations: the score's mean over seeds}} of a plan's curve."""
    found: dict[str, dict[int, float]] = {}
    for label in plan.options["samplers"]:
        name, number = label.rsplit(", ", 1)
        values = scores_of(results, variant, path.format(label))
        if values:
            found.setdefault(name, {})[int(number)] = summarise(list(values.values())).mean
    return {name: dict(sorted(scores.items())) for name, scores in found.items()}


def curve_table(plan: Plan, results: Results, variant: str, title: str) -> str:
    """Make a row a sampler, a column a number of evaluations."""
    found = curve(plan, results, variant, plan.curves[title])
    numbers = sorted({number for scores in found.values() for number in scores})
    rows = [
        [f"`{name}`", *(f"{scores[n]:.3f}" if n in scores else "-" for n in numbers)]
        for name, scores in found.items()
    ]
    return _markdown([f"`{variant}`: {title}, by evaluations", *map(str, numbers)], rows)


def plot_curves(plan: Plan, results: Results, out: pathlib.Path) -> None:
    """Draw a row a variant, a column a curve: the score against the number of evaluations."""
    figure = Figure(figsize=(5.5 * len(plan.curves), 3.6 * len(results)))
    grid = figure.subplots(len(results), len(plan.curves), squeeze=False)
    for row, variant in zip(grid, results, strict=True):
        for axes, (title, path) in zip(row, plan.curves.items(), strict=True):
            for name, scores in curve(plan, results, variant, path).items():
                axes.plot(list(scores), list(scores.values()), "o-", label=name, markersize=4)
            numbers = (3, 4, 6, 8, 12, 16, 25, 50, 100)
            axes.set(title=f"{variant}: {title}", xlabel="evaluations of the network", xscale="log")
            axes.set_xticks(numbers, map(str, numbers))
            axes.minorticks_off()
            axes.grid(alpha=0.3)
    grid[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=90)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)


def _difference_text(difference: Paired | None) -> str:
    if difference is None:
        return "-"
    text = f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
    return f"**{text}**" if difference.low > 0 or difference.high < 0 else text


def _filled(part: str) -> str:
    """Return a paragraph in lines of 100 columns; headings, tables, code and pictures stay."""
    if part.startswith(("#", "|", "!", "    ")):
        return part
    return textwrap.fill(part, 100, break_long_words=False, break_on_hyphens=False)


def _mean_text(summary: Summary) -> str:
    error = "" if np.isnan(summary.error) else f" ± {summary.error:.3f}"
    return f"{summary.mean:.3f}{error}"


def cost_table(results: Results) -> str:
    """Make a row a variant: parameters, FLOPs and time of a step, the learned gain, minutes.

    Medians over seeds. Empty for cells that don't tell their parameters.
    """
    rows = []
    for variant, cells in results.items():
        training = [cell["training"] for cell in cells.values()]
        if "parameters" not in training[0]:
            return ""
        flops = [t["flops_per_step"] for t in training if t["flops_per_step"]]
        seconds = np.median([cell["seconds"] for cell in cells.values()])
        rows.append(
            [
                f"`{variant}`",
                f"{training[0]['parameters']:,}",
                f"{np.median(flops) / 1e9:.2f}" if flops else "-",
                f"{1e3 * np.median([t['seconds_per_step'] for t in training]):.0f}",
                f"{np.median([abs(t['context_gain'][-1]) for t in training]):.3f}",
                f"{seconds / 60:.1f}",
            ]
        )
    head = ["variant", "parameters", "GFLOP a step", "ms a step", r"\|gain\| at the end"]
    return _markdown([*head, "minutes a cell"], rows)


def plot(plan: Plan, results: Results, out: pathlib.Path) -> None:
    """Draw the decisive score of every seed, and, where cells train, the gain over training."""
    title, path = next(iter(plan.headline.items()))
    columns = 1 + any(
        cell["training"]["step"] for cells in results.values() for cell in cells.values()
    )
    figure = Figure(figsize=(6 * columns, 0.5 * len(results) + 2.2))
    left, *rest = figure.subplots(1, columns, squeeze=False)[0]
    for row, variant in enumerate(results):
        values = list(scores_of(results, variant, path).values())
        left.plot(values, [row] * len(values), "o", alpha=0.5)
        if values:
            left.plot([np.mean(values)], [row], "k|", markersize=18)
    left.set(
        yticks=range(len(results)),
        yticklabels=list(results),
        title=f"{title} (each seed; bar: mean)",
    )
    left.invert_yaxis()
    left.grid(alpha=0.3)
    for right in rest:
        _plot_gains(right, results)
    figure.tight_layout()
    figure.savefig(out, dpi=90)


def _plot_gains(axes: Axes, results: Results) -> None:
    for row, (variant, cells) in enumerate(results.items()):
        for number, cell in enumerate(cells.values()):
            curve = cell["training"]
            if any(curve["context_gain"]):
                axes.plot(
                    curve["step"],
                    np.abs(curve["context_gain"]),
                    color=f"C{row}",
                    alpha=0.6,
                    label=variant if number == 0 else None,
                )
    axes.set(title="size of the context (|gain|)", xlabel="step")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)


def write_page(plan: Plan, name: str, path: str, out: pathlib.Path) -> str:
    """Write OUT/NAME.md and OUT/NAME.png from OUT/NAME.jsonl; return a line that says so."""
    results = read_results(plan, out / f"{name}.jsonl")
    if not results:
        return f"{out / name}.jsonl: no finished cell yet"
    plot(plan, results, out / f"{name}.png")
    missing = [cell.name for cell in plan.cells() if cell.seed not in results.get(cell.variant, {})]
    cells = [cell for seeds in results.values() for cell in seeds.values()]
    machines = sorted({"{cpu}, {devices}, jax {jax}".format(**cell["machine"]) for cell in cells})
    parts = [
        f"# {plan.title}",
        plan.verdict,
        plan.about,
        f"    python -m contextdiff_jax.experiment --plan={path}",
        f"{len(cells)} cells, {sum(cell['seconds'] for cell in cells) / 3600:.1f} hours in all, on "
        f"{'; '.join(machines)}. Mean ± standard error over seeds; differences are paired by seed, "
        "with Student's 95% interval.",
        f"Not run yet: {', '.join(missing)}." if missing else "",
        table(plan, results),
        *(difference_table(plan, results, baseline) for baseline in plan.baselines),
        cost_table(results),
        f"![scores and gains]({name}.png)",
        *_curves_section(plan, results, name, out),
        *_cells_section(cells, name, path),
    ]
    page = out / f"{name}.md"
    page.write_text("\n\n".join(_filled(part) for part in parts if part) + "\n")
    return f"{page}: {len(cells)} cells" + (f", {len(missing)} to go" if missing else "")


def _curves_section(plan: Plan, results: Results, name: str, out: pathlib.Path) -> list[str]:
    """The page's part on the plan's curves, if it has any; draws OUT/NAME_curves.png."""
    if not plan.curves:
        return []
    plot_curves(plan, results, out / f"{name}_curves.png")
    tables = [
        curve_table(plan, results, variant, title) for variant in results for title in plan.curves
    ]
    return ["## By evaluations", *tables, f"![by evaluations]({name}_curves.png)"]


def _cells_section(cells: Sequence[dict[str, Any]], name: str, path: str) -> list[str]:
    """The page's paragraphs on each cell, and on how one is run again."""
    first = cells[0]
    on_cpu = first["machine"]["devices"].endswith("cpu")
    digits = ""  # nobody has seen the same digits again elsewhere
    if on_cpu:
        digits = ", with the same digits at its commit, on the same machine and number of cores"
    pinned = "taskset -c 0 " if on_cpu else ""
    rows = [
        [f"{cell['variant']}-{cell['seed']}", cell["commit"][:10], f"{cell['seconds']:.0f}"]
        for cell in cells
    ]
    return [
        "## Cells",
        f"Each is a line of [{name}.jsonl]({name}.jsonl). "
        f"The first one again, in another folder{digits}:",
        f"    {pinned}python -m contextdiff_jax.experiment --plan={path} "
        f"--variants={first['variant']} --seeds={first['seed']} --out=/tmp/again "
        "--workdir=/tmp/again",
        _markdown(["cell", "commit", "seconds"], rows),
    ]
