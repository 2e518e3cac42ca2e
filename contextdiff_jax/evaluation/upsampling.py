"""An upsampler's pictures beside the true ones, which were shrunk for it, and beside bicubic's.

All comparisons are paired: contestants enlarge the same small pictures, and the interval is that of
the differences picture by picture.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Num, UInt8
from PIL import Image

from contextdiff_jax.evaluation import distances
from contextdiff_jax.evaluation.edit_scores import psnr, ssim
from contextdiff_jax.evaluation.features import batches, extract
from contextdiff_jax.evaluation.intervals import Estimate, mean_interval
from contextdiff_jax.evaluation.result import Scores, Shown
from contextdiff_jax.evaluation.shares import gather_rows
from contextdiff_jax.evaluation.subject import Evaluation
from contextdiff_jax.models import low_resolution
from contextdiff_jax.models.pixels import to_uint8, to_unit
from contextdiff_jax.settings import SampleConfig

Picture = UInt8[np.ndarray, "H W 3"]
Pictures = UInt8[np.ndarray, "N H W 3"]
Small = UInt8[np.ndarray, "N h w 3"]
Rows = dict[str, Num[np.ndarray, "N ..."]]  # a row a picture
Estimates = dict[str, Estimate]
BICUBIC, BASELINE, TRUE = "bicubic", "baseline", "true"
_OWN = ("upsampling", "upsampling_features")  # metrics of upsamplers alone
_OF_CAPTIONS_ALONE = ("bound", "branches", "likelihood")
_BATCH = 16
_MOST_DB = 100.0  # of pictures that are equal
_SHOWN, _SHOWN_OF_LEVELS = 8, 3  # pictures
_JPEG_QUALITY = 30


def sharpness(picture: Picture, true: Picture) -> float:
    """Energy of the picture's gradient as a share of the true one's: under 1 it is blurred, over 1
    it has edges or noise too many. nan if the true picture is of one colour.
    """
    energy, wanted = gradient_energy(picture), gradient_energy(true)
    return energy / wanted if wanted else float("nan")


def gradient_energy(picture: Picture) -> float:
    """Mean squared difference between pixels and those below, and those to the right."""
    x = picture.astype(np.float64)
    return float(sum((np.diff(x, axis=axis) ** 2).mean() for axis in (0, 1)))


# Scores of a picture beside the true one.
OF_PIXELS: dict[str, Callable[[Picture, Picture], float]] = {
    "psnr": lambda picture, true: min(psnr(picture[None], true[None]), _MOST_DB),
    "ssim": lambda picture, true: ssim(picture[None], true[None]),
    "sharpness": sharpness,
}


def jpeg(small: Small) -> Small:
    """The pictures as a file of low quality keeps them: blocks, rings at edges, washed colours."""
    made = []
    for picture in small:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=_JPEG_QUALITY)
        made.append(np.asarray(Image.open(file)))
    return np.stack(made)


# What is done to the small pictures before they are enlarged, for the curve over the augmentation.
CLEAN = "clean"
INPUTS: dict[str, Callable[[Small], Small]] = {
    CLEAN: lambda small: small,
    f"JPEG {_JPEG_QUALITY}": jpeg,
}


def bicubic(small: Small, factor: int) -> Pictures:
    """The enlarging that an upsampler's network reads, by itself."""
    made = []
    for start in range(0, len(small), _BATCH):
        part = to_unit(small[start : start + _BATCH])
        made.append(np.asarray(to_uint8(low_resolution.bicubic(part, factor))))
    return np.concatenate(made)


def check(names: Sequence[str], evaluation: Evaluation) -> None:
    """Raises ValueError for metrics and options that don't fit an upsampler, or that need one."""
    config = evaluation.settings.super_resolution
    own = [name for name in names if name in _OWN]
    if own and not config.is_upsampler:
        raise ValueError(
            f"--metrics={own[0]}: is of a model that enlarges pictures; the run has "
            "super_resolution.factor=0"
        )
    asked = evaluation.baseline is not None or evaluation.augmentations
    if asked and not own:
        raise ValueError(
            f"--baseline, --augmentations: are read by --metrics={','.join(_OWN)} alone"
        )
    for level in evaluation.augmentations:
        SampleConfig(augmentation=level)
        config.check_level(level)
    for name in names:
        if config.is_upsampler and name in _OF_CAPTIONS_ALONE:
            raise ValueError(
                f"--metrics={name}: is of pictures given their captions; an upsampler's are given "
                "their low-resolution pictures, too"
            )


class PixelJudge:
    """`OF_PIXELS` of pictures beside the true ones of a split."""

    def __init__(self, evaluation: Evaluation, row: str):
        self._true = evaluation.pictures(row)

    def look(self, pictures: Pictures) -> Rows:
        """The scores of this process's pictures."""
        pairs = list(zip(pictures, self._true, strict=True))
        return {
            name: np.array([score(*pair) for pair in pairs]) for name, score in OF_PIXELS.items()
        }

    def values(self, rows: Rows) -> Rows:
        """Values of each picture, from everybody's rows."""
        return {name: rows[name] for name in OF_PIXELS}

    def score(self, rows: Rows) -> Estimates:
        """Estimates for a contestant."""
        return {name: mean_interval(values) for name, values in self.values(rows).items()}

    def compare(self, rows: Rows, others: Rows) -> Estimates:
        """A contestant's scores minus another's, paired."""
        return self.paired(rows, others)

    def paired(self, rows: Rows, others: Rows) -> Estimates:
        """The part of `compare` that is of pictures one by one."""
        other = self.values(others)
        return {n: mean_interval(values - other[n]) for n, values in self.values(rows).items()}


class FeatureJudge(PixelJudge):
    """Distances in the features of --features: to each true picture, in a classifier's layers, too,
    and of all to all (FID).
    """

    def __init__(self, evaluation: Evaluation, row: str):
        def real(count: int) -> Float[np.ndarray, "N D"]:
            features = evaluation.real_features(row, 0, count)
            return gather_rows({"features": features})["features"]

        self._fn, self._seed = evaluation.feature_fns["features"], evaluation.seed
        self._true, self._reference = real(evaluation.num), real(evaluation.reference)
        self._pictures, self._distance = evaluation.pictures(row), evaluation.layer_distance
        self._resamples = distances.usual_resamples(self._true)

    def look(self, pictures: Pictures) -> Rows:
        rows = {"features": extract(self._fn, pictures)}
        if self._distance is None:
            return rows
        pairs = batches([pictures, self._pictures], _BATCH, "layer distance")
        values = [self._distance(*pair)[0][:real] for pair, real in pairs]
        return rows | {"layer_distance": np.concatenate(values)}

    def values(self, rows: Rows) -> Rows:
        difference = rows["features"].astype(np.float64) - self._true
        found = {"feature_distance": np.sqrt((difference**2).mean(1))}
        return found | {name: rows[name] for name in rows if name != "features"}

    def score(self, rows: Rows) -> Estimates:
        options = self._resamples, self._seed
        return super().score(rows) | {
            "fid": distances.fid(rows["features"], self._reference, *options)
        }

    def compare(self, rows: Rows, others: Rows) -> Estimates:
        pair = rows["features"], others["features"]
        options = self._resamples, self._seed
        return self.paired(rows, others) | {
            "fid": distances.fid_difference(*pair, self._reference, *options)
        }


def held_out(evaluation: Evaluation) -> str:
    """The split whose pictures are enlarged: held-out records where there are any."""
    return list(evaluation.sources)[-1]


def note(evaluation: Evaluation) -> str:
    """What was enlarged, in words."""
    factor, count = evaluation.settings.super_resolution.factor, evaluation.num
    row = held_out(evaluation)
    count = min(count, len(evaluation.sources[row]))
    told = f"{count} pictures shrunk {factor} times, enlarged at augmentation "
    told += f"{evaluation.augmentation:g}; minus: paired by picture"
    return told + (f"; {BASELINE}: {evaluation.baseline_name}" if evaluation.baseline else "")


def contestants(evaluation: Evaluation, row: str) -> dict[str, Pictures]:
    """The pictures of the others, by name."""
    factor = evaluation.settings.super_resolution.factor
    found = {BICUBIC: bicubic(evaluation.small(row), factor)}
    if evaluation.baseline is not None:
        found[BASELINE] = evaluation.once(
            (BASELINE, row), lambda: evaluation.enlarged(row, by=evaluation.baseline)
        )
    return found


def enlarged(evaluation: Evaluation, row: str, kind: str, level: float) -> Pictures:
    """The run's own pictures of `INPUTS[kind]` of the small ones, at that level."""
    if kind == CLEAN and level == evaluation.augmentation:
        return evaluation.samples(row)
    return evaluation.once(
        ("enlarged", row, kind, level),
        lambda: evaluation.enlarged(row, INPUTS[kind](evaluation.small(row)), level),
    )


def contest(evaluation: Evaluation, judge: PixelJudge) -> tuple[Scores, dict[str, Any]]:
    """Scores of the run and the others, paired differences, and with --augmentations the curve, in
    `details` once more by level.
    """
    row = held_out(evaluation)
    ours = gather_rows(judge.look(evaluation.samples(row)))
    scores = {row: judge.score(ours)}
    for name, pictures in contestants(evaluation, row).items():
        rows = gather_rows(judge.look(pictures))
        scores[f"{row}, {name}"] = judge.score(rows)
        scores[f"{row}, minus {name}"] = judge.compare(ours, rows)
    details = {}
    for kind in INPUTS if evaluation.augmentations else ():
        details[kind] = _curve(evaluation, judge, row, kind)
        scores[f"{row}, {kind}, {BICUBIC}"] = details[kind][BICUBIC]
        for level, estimates in details[kind]["by_level"].items():
            scores[f"{row}, {kind}, augmentation {level:g}"] = estimates
        for level, estimates in details[kind]["minus_lowest"].items():
            lowest = f"{level:g} minus {evaluation.augmentations[0]:g}"
            scores[f"{row}, {kind}, augmentation {lowest}"] = estimates
    return scores, {"curve": details} if details else {}


def _curve(evaluation: Evaluation, judge: PixelJudge, row: str, kind: str) -> dict[str, Any]:
    """Scores by level, and their paired differences to those of the lowest level."""
    levels = evaluation.augmentations
    found = {
        level: gather_rows(judge.look(enlarged(evaluation, row, kind, level))) for level in levels
    }
    small, factor = INPUTS[kind](evaluation.small(row)), evaluation.settings.super_resolution.factor
    return {
        BICUBIC: judge.score(gather_rows(judge.look(bicubic(small, factor)))),
        "by_level": {level: judge.score(rows) for level, rows in found.items()},
        "minus_lowest": {
            level: judge.paired(found[level], found[levels[0]]) for level in levels[1:]
        },
    }


def shown(evaluation: Evaluation) -> dict[str, Shown]:
    """The first pictures to look at: small, bicubic's, (the baseline's,) the run's, the true one;
    and those of the curve, by level.
    """
    row = held_out(evaluation)
    small, true = evaluation.small(row), evaluation.pictures(row)
    columns = {
        "small": _blocks(small, true),
        **contestants(evaluation, row),
        "ours": evaluation.samples(row),
        TRUE: true,
    }
    found = {f"{row}, enlarged": _grid(evaluation.captions(row), columns, true, _SHOWN)}
    for kind, spoil in INPUTS.items() if evaluation.augmentations else ():
        spoilt = spoil(small)
        columns = {"small": _blocks(spoilt, true)} | {
            f"augmentation {level:g}": enlarged(evaluation, row, kind, level)
            for level in evaluation.augmentations
        }
        columns[TRUE] = true
        title = f"{row}, {kind}, by augmentation"
        found[title] = _grid(evaluation.captions(row), columns, true, _SHOWN_OF_LEVELS)
    return found


def _blocks(small: Small, true: Pictures) -> Pictures:
    """Each pixel as a square, at the true pictures' size."""
    factor = true.shape[1] // small.shape[1]
    return small.repeat(factor, axis=1).repeat(factor, axis=2)


def _grid(texts: Sequence[str], columns: dict[str, Pictures], true: Pictures, count: int) -> Shown:
    images, captions = [], []
    for i in range(min(count, len(true))):
        for name, pictures in columns.items():
            images.append(pictures[i])
            score = OF_PIXELS["psnr"](pictures[i], true[i])
            told = texts[i] if name == TRUE else f"{score:.1f} dB"
            captions.append(name if name == "small" else f"{name}: {told}")
    return Shown(np.stack(images), captions, len(columns))
