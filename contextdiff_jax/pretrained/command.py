"""Pictures that are named on the command line: --image and --mask."""

from __future__ import annotations

from PIL import Image

from contextdiff_jax.data.decoding import UNDECODABLE, open_picture, shown


def read_picture(path: str, mode: str, shape: tuple[int, int] | None, flag: str) -> Image.Image:
    """The picture of a file as a viewer shows it, in PIL's `mode`, scaled to (height, width)
    `shape` (None: as it is).

    Raises ValueError, one line with the flag, for a file that is no picture.
    """
    try:
        with open_picture(path) as image:
            image = shown(image).convert(mode)
    except UNDECODABLE as error:
        raise ValueError(f"--{flag}={path}: can't be read as a picture ({error})") from None
    return image if shape is None else image.resize(shape[::-1], Image.Resampling.LANCZOS)


_read = read_picture  # its name in the first edition
