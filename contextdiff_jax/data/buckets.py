"""Aspect-ratio buckets: the few sizes that pictures are given out in, and which of them suits a
picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, UInt16

from contextdiff_jax.data.orders import Size


def derive_buckets(area: int, max_ratio: float, step: int) -> tuple[Size, ...]:
    """Sizes (height, width) in multiples of `step` of at most `area` pixels and a side ratio of at
    most `max_ratio`.

    For each height the widest such width, from the flattest to the tallest; as Stable Diffusion
    XL's (arXiv 2307.01952, appendix I) for area = 1024**2, max_ratio = 4 and step = 64 but for the
    sizes that fill the area less well.

    Raises:
        ValueError: if no size fits.
    """
    if max_ratio < 1:
        raise ValueError(f"data.bucket_max_ratio={max_ratio}: must be at least 1 (0: no buckets)")
    if step < 1:
        raise ValueError(f"data.bucket_step={step}: must be at least 1")
    sizes = []
    for height in range(step, int(math.sqrt(area * max_ratio)) + 1, step):
        width = area // height // step * step
        if width and max(height / width, width / height) <= max_ratio:
            sizes.append((height, width))
    if not sizes:
        raise ValueError(
            f"data.bucket_step={step}: no multiple of it fits into image_size squared = {area} "
            "pixels"
        )
    return tuple(sizes)


def check_buckets(buckets: Sequence[Sequence[int]]) -> tuple[Size, ...]:
    """The buckets as pairs of ints; ValueError unless they differ and both sides are above 0."""
    for bucket in buckets:
        pair = isinstance(bucket, (tuple, list)) and len(bucket) == 2
        if not pair or not all(isinstance(side, int) and side > 0 for side in bucket):
            raise ValueError(f"data.buckets: {bucket!r} is not (height, width) in pixels")
    sizes = tuple((height, width) for height, width in buckets)
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"data.buckets={sizes}: names a size twice")
    return sizes


def nearest_bucket(
    sizes: UInt16[np.ndarray, "N 2"], buckets: Sequence[Size]
) -> Int32[np.ndarray, " N"]:
    """The bucket of nearest ratio (in logarithm) for each (height, width); -1 for a size of 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.log(sizes[:, 0].astype(np.float64) / sizes[:, 1])  # [N]
    targets = np.log([height / width for height, width in buckets])  # [K]
    best, distance = np.full(len(sizes), -1, np.int32), np.full(len(sizes), np.inf)
    # One pass a bucket: [N, K] of a million records would be large.
    for k, target in enumerate(targets):
        nearer = np.abs(ratios - target) < distance
        best[nearer], distance[nearer] = k, np.abs(ratios - target)[nearer]
    return best
