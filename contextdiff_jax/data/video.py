"""Clips from files: a folder of pictures, a GIF, or whatever FFmpeg decodes, as uint8 [F, H, W, 3]."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageSequence, UnidentifiedImageError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
Frame = UInt8[np.ndarray, "H W 3"]


def _opaque(image: Image.Image) -> Frame:
    """RGB; what is transparent lies on white."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("RGB"))


def _from_folder(folder: pathlib.Path) -> Iterator[Frame]:
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES):
        try:
            with Image.open(path) as image:
                yield _opaque(image)
        except OSError as error:
            raise ValueError(
                f"video.path={path}: can't be read as a picture ({error}); remove or replace it"
            ) from None


def _from_gif(path: pathlib.Path) -> Iterator[Frame]:
    try:
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                yield _opaque(frame)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"video.path={path}: can't be read as a GIF ({error})") from None


def _from_film(path: pathlib.Path) -> Iterator[Frame]:
    import av  # FFmpeg; only for films

    try:
        with av.open(str(path)) as film:
            if not film.streams.video:
                raise ValueError(f"video.path={path}: holds no video stream")
            for frame in film.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except av.FFmpegError as error:
        raise ValueError(
            f"video.path={path}: can't be decoded ({error}); a folder of pictures, a GIF or an MP4 is wanted"
        ) from None


def resize(frame: Frame, size: tuple[int, int]) -> Frame:
    """`frame` at (height, width) `size`: scaled until it covers it, then cut about the middle,
    nothing distorted.
    """
    height, width = frame.shape[:2]
    if (height, width) == tuple(size):
        return frame
    scale = max(size[0] / height, size[1] / width)
    box_height, box_width = size[0] / scale, size[1] / scale
    top, left = (height - box_height) / 2, (width - box_width) / 2
    box = (left, top, left + box_width, top + box_height)
    return np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.LANCZOS, box=box))


def read_clip(
    path: str | pathlib.Path,
    *,
    num_frames: int,
    start: int = 0,
    stride: int = 1,
    size: tuple[int, int] | None = None,
) -> UInt8[np.ndarray, "F H W 3"]:
    """`num_frames` frames (0: all that there are) from `start`, every `stride`-th, at `size` (None:
    as they are).

    Raises ValueError, one line: a path that is missing, unreadable or without frames; frames of
    different sizes; fewer frames than asked.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ValueError(f"video.path={path}: no such file or folder")
    read = (
        _from_folder
        if path.is_dir()
        else _from_gif
        if path.suffix.lower() == ".gif"
        else _from_film
    )
    stop = start + (num_frames - 1) * stride + 1 if num_frames else None
    frames, seen, first = [], 0, None
    for seen, frame in enumerate(itertools.islice(read(path), stop), start=1):
        if seen > start and (seen - 1 - start) % stride == 0:
            first = first or frame.shape
            if frame.shape != first:
                sizes = ["{} x {}".format(*shape[:2]) for shape in (first, frame.shape)]
                raise ValueError(
                    f"video.path={path}: frame {seen - 1} is {sizes[1]}, the first {sizes[0]}; all must agree"
                )
            frames.append(frame if size is None else resize(frame, size))
    if not seen:
        raise ValueError(
            f"video.path={path}: has no frames ({', '.join(PICTURES)} are read in a folder)"
        )
    if len(frames) < max(num_frames, 1):
        wanted = (
            f"video.num_frames={num_frames} from video.start={start} every video.stride={stride}"
        )
        raise ValueError(
            f"video.path={path}: has {seen} frames; {wanted} needs at least {stop or start + 1}"
        )
    return np.stack(frames)
