"""Edits scored against their true clips.

Of moving shapes the renderer knows the true clip, and frames are read back from their pixels. Of
real clips the true one is another clip with the same motion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from jaxtyping import Bool, Int, UInt8

from contextdiff_jax.data.moving_shapes import MovingShape, frames_of, mask_of
from contextdiff_jax.data.shapes import Object
from contextdiff_jax.evaluation.composition import CENTRE_TOLERANCE, find_objects
from contextdiff_jax.evaluation.edit_scores import psnr, ssim, warping_error
from contextdiff_jax.evaluation.networks.lpips import Distance

Clip = UInt8[np.ndarray, "F S S 3"]
# What a classifier sees in each frame: {attribute: index of its value}.
Answers = Callable[[UInt8[np.ndarray, "F H W 3"]], dict[str, Int[np.ndarray, "F"]]]
VISIBLE = 10  # of 255: pixels of source and true clip that differ by less are the same
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


def changed_region(
    source: UInt8[np.ndarray, "F H W 3"], true: UInt8[np.ndarray, "F H W 3"]
) -> Bool[np.ndarray, "F H W"]:
    """True where the true edit differs visibly from the source.

    Raises ValueError for clips of different shapes, or that differ nowhere or everywhere.
    """
    if source.shape != true.shape:
        raise ValueError(f"clips of {source.shape} and {true.shape}: must have one shape")
    region = (np.abs(source.astype(int) - true) > VISIBLE).any(-1)
    if region.all() or not region.any():
        raise ValueError("the true edit must differ from the source somewhere, not everywhere")
    return region


def score_true_clip(
    clip: UInt8[np.ndarray, "F H W 3"],
    source: UInt8[np.ndarray, "F H W 3"],
    true: UInt8[np.ndarray, "F H W 3"],
    answers: Answers | None = None,
    distances: Mapping[str, Distance] = MappingProxyType({}),
) -> dict[str, float]:
    """Scores of an edited clip whose true edit is known, in dB, infinite ones as 100.

    `psnr`, `ssim`: to the true clip. `changed_psnr`: where that differs from the source, and
    `gain`: how much more than the source itself has there (an edit that does nothing: 0).
    `kept_psnr`: to the source elsewhere. `warping_error`: by the true clip's flow, less the true
    clip's own. By the name of each of `distances`: `changed_NAME`, the mean distance to the true
    clip where that differs from the source, and `kept_NAME`, to the source elsewhere. `attribute`:
    of the attributes in which the true clip differs from the source, by the majority of `answers`,
    the share that the edit's frames have right (nan if there is none).
    """
    region = changed_region(source, true)
    changed = min(psnr(clip, true, region), 100.0)
    scores = {
        "psnr": psnr(clip, true),
        "ssim": ssim(clip, true),
        "changed_psnr": changed,
        "gain": changed - psnr(source, true, region),
        "kept_psnr": psnr(clip, source, ~region),
    }
    scores = {name: min(value, 100.0) for name, value in scores.items()}
    if len(clip) > 1:
        scores["warping_error"] = warping_error(clip, true) - warping_error(true)
    for name, distance in distances.items():
        (_, to_true), (_, to_source) = distance(clip, true), distance(clip, source)
        scores[f"changed_{name}"] = float(to_true[region].mean())
        scores[f"kept_{name}"] = float(to_source[~region].mean())
    if answers is not None:
        scores["attribute"] = _attributes_right(*map(answers, (clip, source, true)))
    return scores


def _attributes_right(*seen: dict[str, Int[np.ndarray, "F"]]) -> float:
    edited, source, true = seen
    wanted = {name: np.bincount(values).argmax() for name, values in true.items()}
    named = [n for n, value in wanted.items() if np.bincount(source[n]).argmax() != value]
    if not named:
        return float("nan")
    return float(np.mean([(edited[name] == wanted[name]).mean() for name in named]))


def paired(
    first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, float]]:
    """Differences by metric: both means, the pairs' mean difference, and its standard error.

    Pairs in which either is nan are left out.
    """
    rows = {}
    for name in first:
        a, b = np.asarray(first[name], np.float64), np.asarray(second[name], np.float64)
        known = ~(np.isnan(a) | np.isnan(b))
        a, b = a[known], b[known]
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


def means(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each score."""
    return {name: float(np.mean(values)) for name, values in columns(scores).items()}
