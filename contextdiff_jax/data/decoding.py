"""Encoded pictures to arrays of a wanted size (PIL): numpy in the loader's workers, outside of the
GIL.

A JPEG that is at least twice as large as wanted is decoded at 1/2, 1/4 or 1/8 of its size, by
libjpeg's scaled inverse DCT, and resampling does the rest. The result differs from resampling the
full picture by a PSNR above 40 dB (tests/test_sources.py) and costs a fraction of the time
(docs/data.md).
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image

# What a damaged record raises: OSError, SyntaxError, RuntimeError and DecompressionBombError by PIL
# in 2,800 mutated JPEG, PNG, WebP, GIF, TIFF, BMP and AVIF files; RuntimeError by ArrayRecord;
# ValueError by JSON and by ourselves. The others are what the parsing of headers in PIL's Python
# plugins can come to. No MemoryError: that is the machine's.
UNDECODABLE = (
    OSError,
    SyntaxError,
    RuntimeError,
    Image.DecompressionBombError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)

CENTRE = (0.5, 0.5)
FILTERS = {  # from the sharpest to the quickest; all of them average over what shrinks
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}


def picture_size(data: bytes) -> tuple[int, int]:
    """(height, width) from a picture's header; raises one of `UNDECODABLE` if it has none."""
    with Image.open(io.BytesIO(data)) as image:
        return image.height, image.width


def decode(
    data: bytes,
    size: tuple[int, int],
    place: tuple[float, float] = CENTRE,
    resample: str = "lanczos",
) -> UInt8[np.ndarray, "H W 3"]:
    """A picture of exactly `size` (height, width): transparency over white, scaled until both sides
    reach, then cut.

    Args:
        data: an encoded picture, of any format that PIL knows.
        size: (height, width) of the result.
        place: which part of what hangs over to keep, (down, across): 0 the upper/left one, 0.5 the
            centre, 1 the other.
        resample: a name in `FILTERS`.

    Raises:
        One of `UNDECODABLE` for data that PIL cannot decode.
    """
    height, width = size
    with Image.open(io.BytesIO(data)) as image:
        full_width, full_height = image.size
        scale = max(width / full_width, height / full_height)
        image.draft(
            "RGB", (int(full_width * scale), int(full_height * scale))
        )  # JPEG only; never below this size
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        image = image.convert("RGB") if image.mode != "RGB" else image
        # A draft rounds its size up: 525 rows become 263, of which 262.5 are the picture's.
        reduced = round(full_height / image.height)
        down, across = place
        top, left = (full_height - height / scale) * down, (full_width - width / scale) * across
        box = np.array((left, top, left + width / scale, top + height / scale)) / reduced
        box = np.clip(box, 0, (image.width, image.height) * 2)  # rounding errors
        return np.asarray(
            image.resize((width, height), FILTERS[resample], box=tuple(box), reducing_gap=3.0)
        )
