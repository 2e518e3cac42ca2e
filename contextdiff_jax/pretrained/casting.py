"""Numbers of one type copied into an array of another."""

from __future__ import annotations

import numpy as np

_ROWS, _BLOCK = 16, 2**18  # a cache line of float32; the numbers that stay in a core's cache


def copy_finite(values: np.ndarray, target: np.ndarray) -> None:
    """`target[...] = values`, all finite, whichever of the two is turned about."""
    if (values.dtype, target.dtype) == (np.float16, np.float32) and values.ndim:
        _widen(values, target)
    else:
        np.copyto(target, values, casting="same_kind")


def _widen(halves: np.ndarray, target: np.ndarray) -> None:
    """float16 to float32 by moving bits, in blocks that lie together in memory.

    numpy converts one number after the other: twice the time, the greater part of what reading
    Stable Diffusion takes. The exponent's bias is 15 in the one and 127 in the other, hence 2^112,
    which also makes float16's subnormal numbers normal. Not for infinities and NaN.
    """
    axis = int(np.argmax(halves.strides))
    halves, target = np.moveaxis(halves, axis, 0), np.moveaxis(target, axis, 0)
    rows = max(_ROWS, _BLOCK * len(halves) // max(halves.size, 1))
    for start in range(0, len(halves), rows):
        bits = halves[start : start + rows].view(np.int16).astype(np.int32)
        bits <<= 13  # sign, exponent and fraction come to their places; copies of the sign between
        bits &= ~0x70000000
        values = bits.view(np.float32)
        values *= np.float32(2.0**112)
        target[start : start + rows] = values
