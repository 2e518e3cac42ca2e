"""Reports of an evaluation: text tables, plots, and one static page that needs no network."""

from __future__ import annotations

import html
import json
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from contextdiff_jax.evaluation.intervals import Estimate
from contextdiff_jax.evaluation.result import Result, Scores
from contextdiff_jax.runtime import pictures
from contextdiff_jax.runtime.files import replacing

_DPI = 110  # of plots
_SHOWN = 24  # samples a split
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff }
body { max-width: 1100px; margin: 2em auto; padding: 0 1em }
h1, h2, h3 { line-height: 1.2; margin: 1.6em 0 .4em } h1 { margin-top: 0 }
table { border-collapse: collapse; margin: .5em 0 }
th, td { padding: .25em .8em; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }
th { white-space: nowrap } details { margin: .5em 0 } summary { cursor: pointer }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap }
td small, p.note { color: #666 }
img { max-width: 100%; border: 1px solid #eee }
pre { background: #f6f6f6; padding: .8em; white-space: pre-wrap; font-size: 13px }
"""


def machine() -> dict[str, Any]:
    """The machine that the figures were made on."""
    cpu = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        cpu = f"{len(models)} x {models[0]}" if models else cpu
    devices = jax.devices()
    return {
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "cpu": cpu,
        "system": platform.platform(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def number(value: float, unit: str) -> str:
    """A value as a person writes it."""
    return f"{100 * value:.1f}%" if unit == "%" else f"{value:.4g}"


def _names(scores: Scores) -> list[str]:
    return list(dict.fromkeys(name for row in scores.values() for name in row))


def cell(estimate: Estimate | None, unit: str) -> str:
    """`81.2% [72.9, 88.5]`, or a dash."""
    if estimate is None:
        return "-"
    low, high = (number(v, unit).rstrip("%") for v in estimate[1:])
    return f"{number(estimate.value, unit)} [{low}, {high}]"


def _cells(scores: Scores, unit: str) -> list[list[str]]:
    """A line a name and a column a row; the other way round where rows are more, as those of a
    distance.
    """
    lines = [
        [name, *(cell(scores[row].get(name), unit) for row in scores)] for name in _names(scores)
    ]
    cells = [["", *scores], *lines]
    return (
        [list(column) for column in zip(*cells, strict=True)] if len(scores) > len(lines) else cells
    )


def table(scores: Scores, unit: str) -> str:
    """Scores with their 95% intervals as lines of text."""
    cells = _cells(scores, unit)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def as_json(results: Mapping[str, Result]) -> dict[str, Any]:
    """metrics.json's part: {metric: {row: {name: value}}}, `intervals` likewise, and `details`."""
    values, intervals, details = {}, {}, {}
    for metric, result in results.items():
        values[metric] = {
            row: {n: e.value for n, e in names.items()} for row, names in result.scores.items()
        }
        intervals[metric] = {
            row: {n: [e.low, e.high] for n, e in names.items()}
            for row, names in result.scores.items()
        }
        if result.details:
            details[metric] = result.details  # an Estimate inside is written as [value, low, high]
    return {**values, "intervals": intervals, "details": details}


def plot_bound(details: Mapping[str, Any], path: pathlib.Path) -> None:
    """Bits/dim of each timestep's KL term, a line a split."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axis = figure.subplots()
    for row, values in details["kl_by_t"].items():
        axis.stairs(values, details["edges"], baseline=None, label=row, linewidth=1.5)
    axis.set(
        xlabel="t (1: nearly clean)", ylabel="bits/dim a timestep", title="KL terms of the bound"
    )
    # The terms fall by orders of magnitude over the first timesteps.
    axis.set(xscale="log", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=_DPI)


def plot_shares(scores: Scores, path: pathlib.Path) -> None:
    """Bars with intervals, a colour a row."""
    names, width = _names(scores), 0.8 / len(scores)
    figure = Figure(figsize=(max(7, 1.1 * len(names)), 3.5), layout="constrained")
    axis = figure.subplots()
    for i, (row, estimates) in enumerate(scores.items()):
        found = [(x, estimates[name]) for x, name in enumerate(names) if name in estimates]
        middle = np.array([e.value for _, e in found])
        reach = [middle - [e.low for _, e in found], [e.high for _, e in found] - middle]
        axis.bar(
            [x + (i - (len(scores) - 1) / 2) * width for x, _ in found],
            middle,
            width,
            label=row,
            yerr=np.maximum(reach, 0),
            capsize=2,
        )
    axis.set_xticks(range(len(names)), names)
    axis.set(ylim=(0, 1.05), ylabel="share")
    axis.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=_DPI)


def plot_curve(points: Mapping[float, Mapping[str, Estimate]], path: pathlib.Path) -> None:
    """FID over CLIP score, a point a guidance scale; without CLIP score, FID over the scale."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis, scales = figure.subplots(), sorted(points)
    fids = [points[scale]["fid"].value for scale in scales]
    scored = all("clip_score" in points[scale] for scale in scales)
    across = [points[scale]["clip_score"].value if scored else scale for scale in scales]
    axis.plot(across, fids, marker="o")
    for scale, place in zip(scales, zip(across, fids, strict=True), strict=True):
        axis.annotate(f"{scale:g}", place, (4, 4), textcoords="offset points")
    what = "CLIP score (at each point its guidance scale)" if scored else "guidance scale"
    axis.set(xlabel=what, ylabel="FID")
    axis.grid(alpha=0.3)
    with replacing(path) as file:
        figure.savefig(file, dpi=_DPI, format="png")


def plot_levels(curves: Mapping[str, Mapping[str, Any]], path: pathlib.Path) -> None:
    """A panel a score over an upsampler's augmentation, a colour an input; bicubic's is dashed."""
    by_level = next(iter(curves.values()))["by_level"]
    names = list(next(iter(by_level.values())))
    figure = Figure(figsize=(4 * len(names), 3.5), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for i, (kind, found) in enumerate(curves.items()):
            levels, colour = list(found["by_level"]), f"C{i}"  # matplotlib's
            value, low, high = np.array([found["by_level"][level][name] for level in levels]).T
            axis.plot(levels, value, marker="o", color=colour, label=kind)
            axis.fill_between(levels, low, high, color=colour, alpha=0.15)
            axis.axhline(found["bicubic"][name].value, color=colour, ls="--", lw=1)
        axis.set(xlabel="augmentation (dashed: bicubic)", title=name)
        axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=_DPI)


def write_report(
    workdir: pathlib.Path,
    results: Mapping[str, Result],
    samples: Mapping[str, tuple[np.ndarray, Sequence[str]]],
    facts: Mapping[str, Any],
    config: Mapping[str, Any],
) -> pathlib.Path:
    """Writes DIR/report/index.html and its pictures: tables, plots, the `samples` ({row: (pictures,
    captions)}) and the run's curves, then `facts` (command, step, machine) and the config. Returns
    the page's path.
    """
    folder = workdir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    title = html.escape(f"{workdir.absolute().name}, step {facts['step']}")
    body = [f"<h1>{title}</h1>", _pre(facts["command"])]
    for metric, result in results.items():
        body += _metric(metric, result, folder)
    marks = results["composition"].details["exact_by_sample"] if "composition" in results else {}
    body.append("<h2>samples</h2>" if samples else "")
    for i, (row, (images, captions)) in enumerate(samples.items()):
        captions = list(captions)[:_SHOWN]
        if row in marks:
            captions = [
                f"{'✓' if right else '✗'} {text}"
                for right, text in zip(marks[row], captions, strict=False)
            ]
        pictures.caption_grid(images[:_SHOWN], captions, columns=6).save(
            folder / f"samples_{i}.png"
        )
        body += [
            f"<h3>{html.escape(row)}</h3>",
            _image(f"samples_{i}.png", f"samples for captions of {row}"),
        ]
    if (workdir / "metrics.jsonl").exists():
        pictures.plot_curves(workdir / "metrics.jsonl", folder / "curves.png")
        if (folder / "curves.png").exists():  # a log without any known curve has none
            body += ["<h2>training</h2>", _image("curves.png", "training curves")]
    # It is at the top.
    flat = {name: value for name, value in _flat(facts).items() if name != "command"}
    rows = "".join(
        f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in flat.items()
    )
    body += ["<h2>how it was made</h2>", f"<table>{rows}</table>"]
    body.append(
        "<details><summary>the run's "
        f"config</summary>{_pre(json.dumps(config, indent=1))}</details>"
    )
    meta = "<meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
    page = (
        f"<!doctype html><html lang='en'>{meta}<title>{title}: "
        f"evaluation</title><style>{_STYLE}</style>"
    )
    with replacing(folder / "index.html") as file:
        file.write_text(page + "\n".join(body) + "</html>\n", encoding="utf-8")
    return folder / "index.html"


def _metric(metric: str, result: Result, folder: pathlib.Path) -> list[str]:
    """A metric's part of the page: note, table, plot. The plot is written to `folder`."""
    body = [
        f"<h2>{metric}</h2>",
        _paragraph(result.note),
        _html_table(result.scores, result.unit),
    ]
    if "kl_by_t" in result.details:
        plot_bound(result.details, folder / f"{metric}.png")
        body.append(_image(f"{metric}.png", "bits per dimension by timestep"))
    elif result.unit == "%":
        plot_shares(result.scores, folder / f"{metric}.png")
        body.append(_image(f"{metric}.png", f"{metric} with 95% intervals"))
    if "curve" in result.details:
        plot_levels(result.details["curve"], folder / f"{metric}.png")
        body.append(_image(f"{metric}.png", f"{metric} over the augmentation"))
    for i, (title, shown) in enumerate(result.shown.items()):
        grid = pictures.caption_grid(shown.images, shown.captions, columns=shown.columns)
        grid.save(folder / f"{metric}_{i}.png")
        body += [f"<h3>{html.escape(title)}</h3>", _image(f"{metric}_{i}.png", title)]
    if "parts" in result.details:
        parts = _html_table(result.details["parts"], result.unit)
        summary = "<summary>by number of objects, and exact by what is asked for</summary>"
        body.append(f"<details>{summary}{parts}</details>")
    return body


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in facts.items():
        flat |= (
            {f"{name}: {k}": v for k, v in value.items()}
            if isinstance(value, Mapping)
            else {name: value}
        )
    return flat


def _pre(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def _paragraph(text: str) -> str:
    return f"<p class='note'>{html.escape(text)}; 95% bootstrap intervals in brackets</p>"


def _image(name: str, alt: str) -> str:
    return f"<p><img src='{name}' alt='{html.escape(alt)}'></p>"


def _html_table(scores: Scores, unit: str) -> str:
    head, *lines = _cells(scores, unit)
    rows = ["".join(f"<th>{html.escape(name)}</th>" for name in head)]
    for name, *cells in lines:
        parts = (text.partition(" ") for text in cells)
        tds = "".join(
            f"<td class='number'>{value} <small>{interval}</small></td>"
            for value, _, interval in parts
        )
        rows.append(f"<th>{html.escape(name)}</th>{tds}")
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
