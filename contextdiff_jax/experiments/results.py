"""What a person reads of a plan: OUT/PLAN.md with tables, plots, commands; only of cells that are
there.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from contextdiff_jax.experiments.plan import Plan

Results = dict[str, dict[int, dict[str, Any]]]  # {variant: {seed: the cell's file}}


class Summary(NamedTuple):
    """Over seeds: mean, its standard error (nan of one seed), and the number of seeds."""

    mean: float
    error: float
    count: int


class Paired(NamedTuple):
    """Mean difference to the baseline over the seeds that both have, and its 95% interval by
    Student's t.
    """

    mean: float
    low: float
    high: float
    count: int


def look_up(scores: Mapping[str, Any], path: str) -> float | None:
    """`a/b` in nested scores; None where this variant has no such score."""
    value: Any = scores
    for name in path.split("/"):
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return float(value)


def summarise(values: Sequence[float]) -> Summary:
    """ValueError of no values."""
    if not len(values):
        raise ValueError("summarise: no values")
    error = (
        float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    )
    return Summary(float(np.mean(values)), error, len(values))


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Paired | None:
    """By seed; None with fewer than two seeds in common, of which nothing can be said."""
    common = sorted(values.keys() & baseline.keys())
    if len(common) < 2:
        return None
    mean, error, count = summarise([values[seed] - baseline[seed] for seed in common])
    reach = float(stats.t.ppf(0.975, count - 1)) * error
    return Paired(mean, mean - reach, mean + reach, count)


def read_results(plan: Plan, folder: pathlib.Path) -> Results:
    """The cells of the plan, and those of other seeds of the same config, that are in `folder`."""
    results: Results = {}
    for variant in plan.variants:
        for path in folder.glob(f"{variant}-*.json"):
            seed = path.stem.removeprefix(f"{variant}-")
            result = plan.cell(variant, int(seed)).result(folder) if seed.isdecimal() else None
            if result is not None:
                results.setdefault(variant, {})[int(seed)] = result
        if variant in results:
            results[variant] = dict(sorted(results[variant].items()))
    return results


def scores_of(results: Results, variant: str, path: str) -> dict[int, float]:
    """{seed: score}, of the seeds that have it."""
    found = {
        seed: look_up(result["scores"], path) for seed, result in results.get(variant, {}).items()
    }
    return {seed: value for seed, value in found.items() if value is not None}


def table(plan: Plan, results: Results) -> str:
    """A row a variant: mean and standard error of each headline score."""
    lines = [
        "| variant | seeds | " + " | ".join(plan.headline) + " |",
        "|---" * (len(plan.headline) + 2) + "|",
    ]
    for variant, cells in results.items():
        values = [
            list(scores_of(results, variant, path).values()) for path in plan.headline.values()
        ]
        entries = [_mean_text(summarise(found)) if found else "-" for found in values]
        lines.append(f"| `{variant}` | {len(cells)} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def difference_table(plan: Plan, results: Results, baseline: str) -> str:
    """A row a variant: its difference to the baseline in each headline score, bold where the
    interval is clear of 0; empty if there is no pair of seeds. No correction for the number of
    comparisons.
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
        rows.append(f"| `{variant}` | {count} | " + " | ".join(map(_difference_text, found)) + " |")
    head = f"| minus `{baseline}` [95%] | pairs | " + " | ".join(plan.headline) + " |"
    return "\n".join([head, "|---" * (len(plan.headline) + 2) + "|", *rows]) if rows else ""


def _difference_text(difference: Paired | None) -> str:
    if difference is None:
        return "-"
    text = f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
    return f"**{text}**" if difference.low > 0 or difference.high < 0 else text


def _mean_text(summary: Summary) -> str:
    error = "" if np.isnan(summary.error) else f" ± {summary.error:.3f}"
    return f"{summary.mean:.3f}{error}"


def cost_table(plan: Plan, results: Results) -> str:
    """Parameters, FLOPs and time a step, size of the learned gain at the end, minutes: medians over
    seeds.
    """
    lines = [
        r"| variant | parameters | GFLOP a step | ms a step | \|gain\| at the end | minutes a cell |",
        "|---" * 6 + "|",
    ]
    for variant, cells in results.items():
        training = [cell["training"] for cell in cells.values()]
        if "parameters" not in training[0]:
            return ""
        flops = [t["flops_per_step"] for t in training if t["flops_per_step"]]
        lines.append(
            f"| `{variant}` | {training[0]['parameters']:,} | {f'{np.median(flops) / 1e9:.2f}' if flops else '-'} | "
            f"{1e3 * np.median([t['seconds_per_step'] for t in training]):.0f} | "
            f"{np.median([abs(t['context_gain'][-1]) for t in training]):.3f} | "
            f"{np.median([cell['seconds'] for cell in cells.values()]) / 60:.1f} |"
        )
    return "\n".join(lines)


def plot(plan: Plan, results: Results, out: pathlib.Path) -> None:
    """The decisive score of every seed by variant, and the context's gain over training, if the
    cells train.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    title, path = next(iter(plan.headline.items()))
    columns = 1 + any(
        cell["training"]["step"] for cells in results.values() for cell in cells.values()
    )
    figure, axes = plt.subplots(
        1, columns, figsize=(6 * columns, 0.5 * len(results) + 2.2), squeeze=False
    )
    left, *rest = axes[0]
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
    plt.close(figure)


def _plot_gains(axes: Any, results: Results) -> None:
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
    """Writes OUT/NAME.md and OUT/NAME.png; returns a line that says so."""
    results = read_results(plan, out / name)
    if not results:
        return f"{out / name}: no finished cell yet"
    plot(plan, results, out / f"{name}.png")
    cells = [
        (variant, seed, cell) for variant, seeds in results.items() for seed, cell in seeds.items()
    ]
    machines = sorted(
        {
            f"{c['machine']['cpu']}, {c['machine']['devices']}, jax {c['machine']['jax']}"
            for *_, c in cells
        }
    )
    missing = [cell.name for cell in plan.cells() if cell.seed not in results.get(cell.variant, {})]
    on_cpu = cells[0][2]["machine"]["devices"].endswith(
        "cpu"
    )  # elsewhere nobody has seen the same digits again
    pinned = "taskset -c 0 " if on_cpu else ""
    digits = (
        ", with the same digits at its commit, on the same machine and number of cores"
        if on_cpu
        else ""
    )
    parts = [
        f"# {plan.title}",
        plan.about,
        f"    python -m contextdiff_jax.experiment --plan={path}",
        f"{len(cells)} cells, {sum(c['seconds'] for *_, c in cells) / 3600:.1f} hours in all, on {'; '.join(machines)}. "
        "Mean ± standard error over seeds; differences are paired by seed, with Student's 95% interval.",
        f"Not run yet: {', '.join(missing)}." if missing else "",
        table(plan, results),
        *(difference_table(plan, results, baseline) for baseline in plan.baselines),
        cost_table(plan, results),
        f"![scores and gains]({name}.png)",
        "## Cells",
        f"Each again, in another folder{digits}:",
        f"    {pinned}python -m contextdiff_jax.experiment --plan={path} --variants={cells[0][0]} "
        f"--seeds={cells[0][1]} --out=/tmp/again --workdir=/tmp/again",
        "\n".join(
            ["| cell | config | commit | seconds |", "|---|---|---|---|"]
            + [
                f"| [{variant}-{seed}]({name}/{variant}-{seed}.json) | {c['config_hash']} | {c['commit'][:10]} | {c['seconds']:.0f} |"
                for variant, seed, c in cells
            ]
        ),
    ]
    page = out / f"{name}.md"
    page.write_text("\n\n".join(part for part in parts if part) + "\n")
    return f"{page}: {len(cells)} cells" + (f", {len(missing)} to go" if missing else "")
