"""Encoded pictures to arrays of a wanted size (PIL): numpy in the loader's workers, outside of the
GIL.

Every picture is opened by `open_picture` and made what a viewer shows by `shown`: turned as its
EXIF orientation says, 8 bits, RGB, transparency over white.

A JPEG that is at least twice as large as wanted is decoded at 1/2, 1/4 or 1/8 of its size, by
libjpeg's scaled inverse DCT, and resampling does the rest. The result differs from resampling the
full picture by a PSNR above 40 dB (tests/test_decoding.py) and costs a fraction of the time
(docs/data.md).
"""

from __future__ import annotations

import io
import os
import pathlib
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import ExifTags, Image, ImageFile

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


MAX_PIXELS = 300_000_000

_TURNS = {  # EXIF orientation -> what brings the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_EXIF = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # where a PNG may keep it


def open_picture(
    file: bytes | str | os.PathLike,
    max_pixels: int = MAX_PIXELS,
    formats: Sequence[str] | None = None,
) -> Image.Image:
    """A picture, encoded or by its path, whose pixels aren't decoded yet: `shown` does that.
    `formats` are PIL's names; None: all.

    Raises:
        One of `UNDECODABLE`: for no picture, for an empty one, and for one above `max_pixels`.
    """
    # Two switches of the process: Pillow's limit of 179 million pixels, where ours is an argument,
    # and half a picture in grey, which tfds allows.
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
    image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=formats)
    try:
        check_size(image, max_pixels)
    except ValueError:
        image.close()
        raise
    if image.format == "WEBP" and image.is_animated and image.mode == "RGB":
        # No frame has alpha, but what all leave uncovered is transparent; Pillow needs the flag.
        data = bytearray(file if isinstance(file, bytes) else pathlib.Path(file).read_bytes())
        data[20] |= 0x10
        image = Image.open(io.BytesIO(data))
    return image


def check_size(image: Image.Image, max_pixels: int = MAX_PIXELS) -> None:
    """ValueError for a picture without pixels or with more than `max_pixels`."""
    if not 0 < image.width * image.height <= max_pixels:
        raise ValueError(
            f"{image.width} x {image.height} pixels; 1 to {max_pixels} are read (data.max_pixels)"
        )


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The transposition that brings the picture upright; None: it is."""
    if image.format == "TIFF":  # Pillow turns these itself
        return None
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except UNDECODABLE:  # viewers show a picture with damaged EXIF as it is stored
        return None


def _shown_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of the upright picture."""
    turn = _turn(image)
    swaps = turn is not None and turn.name in ("TRANSPOSE", "TRANSVERSE", "ROTATE_90", "ROTATE_270")
    return image.size[::-1] if swaps else image.size


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 12, 16 or 32 bits as 8 bits: the upper 8 of an integer, 255 times a fraction.

    What 32 bits hold shows in the values: fractions of 1, numbers of 8 bits, numbers of 16 bits.
    ValueError for others.
    """
    values, bits = np.asarray(image), 16
    low, high, whole = values.min(), values.max(), (values == np.rint(values)).all()
    if image.mode.startswith("I;16"):
        tags = image.tag_v2 if image.format == "TIFF" else {}
        bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]  # 12, too
        if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is 0
            values = 2**bits - 1 - values
    elif image.mode == "F" and 0 <= low <= high <= 1:
        values, bits = np.rint(values * 255), 8
    elif not whole or not 0 <= low <= high < 2**16:
        raise ValueError(
            f"grey values from {low:g} to {high:g}; must be fractions in 0..1 or whole in 0..65535"
        )
    elif high < 2**8 and image.format != "PPM":  # a PGM of 16 bits has this mode too
        bits = 8
    grey = (values.astype(np.int32) >> (bits - 8)).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        grey[np.asarray(image) == transparent] = 255
    return Image.fromarray(grey)


def shown(image: Image.Image) -> Image.Image:
    """The picture in RGB as a viewer shows it: upright, of 8 bits, transparency over white.

    Raises:
        One of `UNDECODABLE` for data that PIL cannot decode.
    """
    turn = _turn(image)
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    image = image.convert("RGB") if image.mode != "RGB" else image
    return image if turn is None else image.transpose(turn)


def picture_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of the upright picture from its header; raises one of `UNDECODABLE` if it has
    none.
    """
    with open_picture(data, max_pixels) as image:
        # Pillow would decode a whole PNG to look for EXIF behind the pixels.
        plain = image.format == "PNG" and not any(mark in data for mark in _PNG_EXIF)
        return (image.size if plain else _shown_size(image))[::-1]


def size_condition(
    full: tuple[int, int], size: tuple[int, int], place: tuple[float, float] = CENTRE
) -> Float32[np.ndarray, "6"]:
    """What XL's networks read of a picture's sizes (Podell et al., 2023, 2.2): its own height and
    width `full`, how many rows and columns of the scaled picture `decode` cuts off above and on the
    left, and the height and width that it has then.
    """
    scale = max(wanted / own for wanted, own in zip(size, full, strict=True))
    cut = [
        round(share * max(own * scale - wanted, 0.0))
        for own, wanted, share in zip(full, size, place, strict=True)
    ]
    return np.array((*full, *cut, *size), np.float32)


def decode(
    data: bytes,
    size: tuple[int, int],
    place: tuple[float, float] = CENTRE,
    resample: str = "lanczos",
    max_pixels: int = MAX_PIXELS,
) -> UInt8[np.ndarray, "H W 3"]:
    """A picture as `shown`, of exactly `size` (height, width): scaled until both sides reach, then
    cut.

    Args:
        data: an encoded picture, of any format that PIL knows.
        size: (height, width) of the result.
        place: which part of what hangs over to keep, (down, across): 0 the upper/left one, 0.5 the
            centre, 1 the other.
        resample: a name in `FILTERS`.
        max_pixels: a larger picture is refused.

    Raises:
        One of `UNDECODABLE` for data that PIL cannot decode.
    """
    height, width = size
    with open_picture(data, max_pixels) as image:
        full_width, full_height = upright = _shown_size(image)
        scale = max(width / full_width, height / full_height)
        reach = int(full_width * scale), int(full_height * scale)
        # JPEG only; never below this size, which is that of the stored picture
        image.draft("RGB", reach if image.size == upright else reach[::-1])
        image = shown(image)
        # A draft rounds its size up: 525 rows become 263, of which 262.5 are the picture's.
        reduced = round(full_height / image.height)
        down, across = place
        top, left = (full_height - height / scale) * down, (full_width - width / scale) * across
        box = np.array((left, top, left + width / scale, top + height / scale)) / reduced
        box = np.clip(box, 0, (image.width, image.height) * 2)  # rounding errors
        return np.asarray(
            image.resize((width, height), FILTERS[resample], box=tuple(box), reducing_gap=3.0)
        )
