"""The page of an edit, one file with everything in it: it opens anywhere, without a network."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from contextdiff_jax.editing import output

Clip = UInt8[np.ndarray, "F H W 3"]
_SIDE = 192  # pixels that a frame is shown at, about
NAMES = ("prompt", "name")  # what a row of the metrics is of
_AMPLIFIED = 4  # a difference, so that it is seen
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em;
  color: #222; background: #fff } figure { display: inline-block; margin: 0 1em 1em 0;
  vertical-align: top } img { image-rendering: pixelated; border: 1px solid #ddd; display: block }
figcaption { max-width: 14em; color: #555 } table { border-collapse: collapse } th, td {
  border-bottom: 1px solid #eee; padding: .3em .8em; text-align: right } th:first-child,
td:first-child { text-align: left } pre { white-space: pre-wrap; background: #f6f6f6; padding: 1em }
"""


class Shown(NamedTuple):
    """An edit: its prompt, its clip, where the changed words are looked at, where known, and what
    tells it from edits by the same prompt.
    """

    prompt: str
    clip: Clip
    attention: Float[np.ndarray, "F H W"] | None = None
    label: str = ""


def make_page(
    source: Shown,
    reconstruction: Clip,
    edits: Sequence[Shown],
    metrics: Mapping[str, Any],
    settings: Mapping[str, Any],
    fps: float,
) -> str:
    """HTML: the source and its reconstruction, each edit with its difference to the source and its
    attention, the metrics, the seconds and memory of each stage, and the settings.
    """
    title = html.escape(f"An edit of: {source.prompt}")
    body = [
        f"<h1>{title}</h1>",
        _figure(source.clip, f"source: {source.prompt}", fps),
        _figure(reconstruction, "reconstruction, by its own prompt", fps),
        *(_attention(source, "attention of the changed words", fps)),
    ]
    for edit in edits:
        difference = np.abs(edit.clip.astype(int) - source.clip)
        amplified = np.minimum(_AMPLIFIED * difference, 255).astype(np.uint8)
        body += [
            f"<h2>{html.escape(f'{edit.label}: {edit.prompt}')}</h2>",
            _figure(edit.clip, "the edit", fps),
            _figure(amplified, f"its difference to the source, times {_AMPLIFIED}", fps),
            *_attention(edit, "attention of its changed words", fps),
        ]
    if metrics.get("strengths"):
        body += ["<h2>Strengths</h2>", _strengths(metrics["strengths"])]
    body += ["<h2>Metrics</h2>", _metrics(metrics), "<h2>Stages</h2>", _costs(metrics["costs"])]
    body += [f"<h2>Settings</h2><pre>{html.escape(json.dumps(settings, indent=1))}</pre>"]
    meta = "<meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
    head = f"<!doctype html><html lang='en'>{meta}<title>{title}</title><style>{_STYLE}</style>"
    return head + "\n".join(body) + "</html>\n"


def _attention(shown: Shown, caption: str, fps: float) -> list[str]:
    if shown.attention is None or not shown.attention.any():
        return []
    scaled = np.round(255 * shown.attention / shown.attention.max()).astype(np.uint8)
    return [_figure(np.repeat(scaled[..., None], 3, axis=-1), caption, fps)]


def _figure(clip: Clip, caption: str, fps: float) -> str:
    """An endless GIF, enlarged by whole pixels; of one frame a PNG."""
    scale = max(1, _SIDE // max(clip.shape[1:3]))
    height, width = (scale * side for side in clip.shape[1:3])
    file = io.BytesIO()
    if len(clip) == 1:
        Image.fromarray(clip[0]).save(file, "png")
    else:
        output.write_gif(clip, file, fps)
    kind = "png" if len(clip) == 1 else "gif"
    data = base64.b64encode(file.getvalue()).decode()
    text = html.escape(caption)
    return (
        f"<figure><img src='data:image/{kind};base64,{data}' alt='{text}' width='{width}' "
        f"height='{height}'><figcaption>{text}</figcaption></figure>"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *lines = ([html.escape(cell) for cell in row] for row in rows)
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in line)}</tr>" for line in lines)
    return f"<table><tr>{cells}</tr>{body}</table>"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""


def _metrics(metrics: Mapping[str, Any]) -> str:
    """A row a clip. What a metric is: docs/video.md."""
    rows = {"reconstruction": metrics["reconstruction"]}
    rows |= {f"{row['name']}: {row['prompt']}": row for row in metrics["edits"]}
    names = list(dict.fromkeys(n for row in rows.values() for n in row if n not in NAMES))
    cells = [[label, *(_number(row.get(name)) for name in names)] for label, row in rows.items()]
    return _table([["", *names], *cells])


def _strengths(strengths: Sequence[Mapping[str, Any]]) -> str:
    """A row a prompt: what was chosen, and the fits that it went by (editing/strength.py)."""
    head = ["", "chosen", "the clip's fit", *(f"fit at {name}" for name in strengths[0]["fits"])]
    cells = [
        [
            row["prompt"],
            _number(row["strength"]) + ("" if row["reached"] else ", the best of none that do"),
            *map(_number, (row["fit_of_the_clip"], *row["fits"].values())),
        ]
        for row in strengths
    ]
    return _table([head, *cells])


def _costs(costs: Mapping[str, Mapping[str, float]]) -> str:
    names = list(dict.fromkeys(name for row in costs.values() for name in row))
    head = ["", *(name.replace("_", " ") for name in names)]
    cells = [[stage, *(_number(row.get(n)) for n in names)] for stage, row in costs.items()]
    return _table([head, *cells])
