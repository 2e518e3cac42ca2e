"""Edits of moving shapes, scored exactly: the renderer knows the true clip, and frames are read
back from their pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from contextdiff_jax.data.moving_shapes import MovingShape, frames_of, mask_of
from contextdiff_jax.data.shapes import Object
from contextdiff_jax.evaluation.composition import CENTRE_TOLERANCE, find_objects
from contextdiff_jax.evaluation.edit_scores import psnr

Clip = UInt8[np.ndarray, "F S S 3"]
KEPT = {"colour": ("shape", "size"), "shape": ("colour", "size")}


def score_frame(found: Sequence[Object], wanted: Object, attribute: str) -> dict[str, float]:
    """Answers about a frame's largest object: `attribute` as asked for, the rest and the place
    kept?
    """
    if not found:
        return {"changed": 0.0, "kept": 0.0, "motion": 0.0, "exact": 0.0}
    largest = found[0]
    changed = getattr(largest, attribute) == getattr(wanted, attribute)
    kept = all(getattr(largest, name) == getattr(wanted, name) for name in KEPT[attribute])
    near = np.abs(np.subtract(largest.centre, wanted.centre)).max() <= CENTRE_TOLERANCE
    exact = changed and kept and near and len(found) == 1
    return {
        "changed": float(changed),
        "kept": float(kept),
        "motion": float(near),
        "exact": float(exact),
    }


def score_edit(clip: Clip, moving: MovingShape, attribute: str) -> dict[str, float]:
    """Scores of an edited clip.

    They are shares of frames (`score_frame`), `background_psnr` in dB against the source where
    neither it nor the true edit shows an object, and `psnr` against the true edit. Infinite ones
    count as 100 dB.
    """
    scenes = moving.edited[attribute]
    frames = [
        score_frame(find_objects(f), s.objects[0], attribute)
        for f, s in zip(clip, scenes, strict=True)
    ]
    source, true = (frames_of(s, clip.shape[1]) for s in (moving.scenes, scenes))
    background = psnr(clip, source, ~mask_of(source, true))
    return {name: float(np.mean([f[name] for f in frames])) for name in frames[0]} | {
        "background_psnr": min(background, 100.0),
        "psnr": min(psnr(clip, true), 100.0),
    }


def paired(
    first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, float]]:
    """Differences by metric: both means, the pairs' mean difference, and its standard error."""
    rows = {}
    for name in first:
        a, b = np.asarray(first[name], np.float64), np.asarray(second[name], np.float64)
        error = np.std(a - b, ddof=1) / np.sqrt(len(a)) if len(a) > 1 else float("nan")
        rows[name] = {
            "first": a.mean(),
            "second": b.mean(),
            "difference": (a - b).mean(),
            "standard_error": float(error),
        }
    return rows


def columns(scores: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Rows of scores as columns."""
    return {name: [row[name] for row in scores] for name in scores[0]}
