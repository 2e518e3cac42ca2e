"""Distances between two sets of feature vectors, and scores of pairs; float64 numpy.

FID     |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2)                  (1)  Heusel et al. 2017, eq. 6
MMD^2   mean k(x, x') + mean k(y, y') - 2 mean k(x, y)             (2)  Gretton et al. 2012
KID     (2) with k = (x.y / D + 1)^3, no pair of a vector with itself   Binkowski et al. 2018
CMMD    1000 x (2) with k = exp(-|x - y|^2 / (2 10^2)), pairs of a vector with itself too,
        on normalised CLIP embeddings                                   Jayasumana et al. 2024
precision, recall: share of one set inside the other's k-nearest-neighbour balls,
                                                                        Kynkaanniemi et al. 2019
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Float

from contextdiff_jax.evaluation.features import Moments, check_finite
from contextdiff_jax.evaluation.intervals import Estimate, resample_counts, spread_interval

Features = Float[np.ndarray, "N D"]
Others = Float[np.ndarray, "M D"]
Kernel = Callable[[Features, Others], Float[np.ndarray, "N M"]]
_FEW_FEATURES = 256  # a Frechet distance of 2048 takes a second or more
_BLOCK = 1024  # rows of a pairwise matrix in memory at once


def frechet_distance(first: Moments, second: Moments) -> float:
    """(1). The trace of (C1 C2)^1/2 is the sum of the singular values of C1^1/2 C2^1/2: real and
    stable for singular covariances too (fewer pictures than features), where the general square
    root needs an offset.
    """
    roots = []
    for moments in (first, second):
        values, vectors = np.linalg.eigh(moments.covariance)
        roots.append((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T)
    shared = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return float(np.sum((first.mean - second.mean) ** 2) + traces - 2 * shared)


def fid(generated: Features, real: Others, resamples: int = 0, seed: int = 0) -> Estimate:
    """Frechet distance of two sets; `resamples` (at least 2) give the interval, without them it is
    a point.

    FID is biased upwards, the more the fewer pictures there are: only sets of equal sizes compare.
    """
    check_finite(generated=generated, real=real)
    value = frechet_distance(Moments.of(generated), Moments.of(real))
    if not resamples:
        return Estimate(value, value, value)
    rng, replicates = np.random.default_rng(seed), []
    for _ in range(resamples):
        drawn = (a[rng.integers(len(a), size=len(a))] for a in (generated, real))
        replicates.append(frechet_distance(*map(Moments.of, drawn)))
    return spread_interval(value, np.array(replicates))


def fid_difference(
    generated: Features,
    others: Features,
    real: Others,
    resamples: int,
    seed: int = 0,
) -> Estimate:
    """FID of `generated` minus that of `others`, whose rows belong together: a resample takes the
    same ones of both, and the same real ones.
    """
    check_finite(generated=generated, others=others, real=real)

    def difference(rows, columns):
        moments = Moments.of(real[columns])
        first, second = (
            frechet_distance(Moments.of(a[rows]), moments) for a in (generated, others)
        )
        return first - second

    rng, whole = np.random.default_rng(seed), slice(None)
    replicates = [
        difference(*(rng.integers(len(a), size=len(a)) for a in (generated, real)))
        for _ in range(resamples)
    ]
    return spread_interval(difference(whole, whole), np.array(replicates))


def usual_resamples(features: Features) -> int:
    """How many resamples a Frechet distance can afford."""
    return 100 if features.shape[1] <= _FEW_FEATURES else 10


def polynomial_kernel(x: Features, y: Others) -> Float[np.ndarray, "N M"]:
    """KID's: (x.y / D + 1)^3."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(x: Features, y: Others, sigma: float = 10.0) -> Float[np.ndarray, "N M"]:
    """CMMD's: exp(-|x - y|^2 / (2 sigma^2))."""
    return np.exp(-_squared_distances(x, y) / (2 * sigma**2))


def _squared_distances(x, y):
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T, 0)


def _blocks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, size)) for start in range(0, size, _BLOCK))


def _weighted_mean(kernel, x, y, u, v, own: bool):
    """[R]: mean of k(x_i, y_j) with counts u_ri, v_rj; with `own`, x is y and pairs i = j are left
    out.
    """
    total = np.zeros(len(u))
    for rows in _blocks(len(x)):
        k = kernel(x[rows], y)
        if own:
            k[np.arange(len(k)), np.arange(rows.start, rows.stop)] = 0
        total += ((u[:, rows] @ k) * v).sum(1)
    pairs = u.sum(1, dtype=np.float64) * v.sum(1)
    return total / (pairs - (u.astype(np.float64) ** 2).sum(1) if own else pairs)


def mmd2(
    x: Features,
    y: Others,
    kernel: Kernel,
    unbiased: bool = True,
    resamples: int = 0,
    seed: int = 0,
) -> Estimate:
    """(2). `unbiased` leaves out the pairs of a vector with itself, so it can be negative; in a
    resample, copies of one picture are no pair either, or every resample would look too alike. The
    kernel's matrices are never whole.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if min(len(x), len(y)) < 2:
        raise ValueError(
            f"generated={len(x)}, real={len(y)} pictures: the distance needs at least 2 of each"
        )
    check_finite(generated=x, real=y)
    rng = np.random.default_rng(seed)
    # Row 0 counts every vector once: the value itself.
    u, v = (
        np.concatenate([np.ones((1, len(a)), int), resample_counts(len(a), resamples, rng)])
        for a in (x, y)
    )
    values = (
        _weighted_mean(kernel, x, x, u, u, unbiased)
        + _weighted_mean(kernel, y, y, v, v, unbiased)
        - 2 * _weighted_mean(kernel, x, y, u, v, False)
    )
    return (
        spread_interval(values[0], values[1:]) if resamples else Estimate(*(float(values[0]),) * 3)
    )


def kid(
    generated: Features, real: Others, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID as the packages report it: mean and standard deviation over random subsets, each without
    repeats. The mean estimates what `mmd2` with `polynomial_kernel` computes from all pairs.
    """
    check_finite(generated=generated, real=real)
    size = min(subset_size, len(generated), len(real))
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        parts = (a[rng.choice(len(a), size, replace=False)] for a in (generated, real))
        values.append(mmd2(*parts, polynomial_kernel).value)
    return float(np.mean(values)), float(np.std(values))


def cmmd(generated: Features, real: Others, resamples: int = 0, seed: int = 0) -> Estimate:
    """CMMD of two sets of CLIP image embeddings, which are normalised here. The paper's are of
    ViT-L/14 at 336.
    """
    x, y = _normalised(generated, "generated"), _normalised(real, "real")
    return Estimate(*(1000 * v for v in mmd2(x, y, gaussian_kernel, False, resamples, seed)))


def clip_score(image: Features, text: Features) -> Float[np.ndarray, "N"]:
    """100 max(cos(image, text), 0) of each pair: Hessel et al. 2021, whose factor is 2.5, in
    torchmetrics' scale.
    """
    return 100 * np.maximum(cosines(image, text), 0)


def cosines(image: Features, text: Features) -> Float[np.ndarray, "N"]:
    """The cosine of each pair."""
    return (_normalised(image, "image") * _normalised(text, "text")).sum(1)


def _normalised(x: Features, name: str) -> Features:
    x = np.asarray(x, np.float64)
    check_finite(**{name: x})
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    if not norms.all():
        raise ValueError(f"{name}: row {norms.argmin()} is all 0, which has no direction")
    return x / norms


def _radii(x: Features, k: int) -> Float[np.ndarray, "N"]:
    """Squared distance of each vector to its k-th nearest other."""
    # Index 0 of the sorted row is the vector itself.
    return np.concatenate(
        [np.partition(_squared_distances(x[rows], x), k, axis=1)[:, k] for rows in _blocks(len(x))]
    )


def _inside(
    points: Features, centres: Others, radii: Float[np.ndarray, "M"]
) -> Bool[np.ndarray, "N"]:
    return np.concatenate(
        [(_squared_distances(points[b], centres) <= radii).any(1) for b in _blocks(len(points))]
    )


def precision_recall(
    generated: Features, real: Others, k: int = 3
) -> tuple[Bool[np.ndarray, "N"], Bool[np.ndarray, "M"]]:
    """Whether each generated vector lies inside the real ones' balls (precision is its mean), and
    each real vector inside the generated ones' (recall). ValueError unless both sets have more than
    k vectors.
    """
    generated, real = np.asarray(generated, np.float64), np.asarray(real, np.float64)
    if min(len(generated), len(real)) <= k:
        raise ValueError(
            f"generated={len(generated)}, real={len(real)} pictures: k={k} neighbours need more "
            "of each"
        )
    check_finite(generated=generated, real=real)
    return _inside(generated, real, _radii(real, k)), _inside(real, generated, _radii(generated, k))
