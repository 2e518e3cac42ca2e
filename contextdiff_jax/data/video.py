"""Clips from files, as uint8 [F, H, W, 3]: a folder of pictures, an animated picture, or a film.

Frames are what a player shows: upright, of square pixels, transparency over white. A clip has one
constant rate. Where the time stamps of an animation or a film are not evenly spaced, `_step` finds
the rate that fits them and `_evenly` gives each frame as often as it is shown.
"""

from __future__ import annotations

import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageSequence

from contextdiff_jax.data.decoding import UNDECODABLE, check_size, open_picture, shown

if TYPE_CHECKING:
    import av

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")  # PIL's names; the pages of other formats are no frames
_PROBE = 256  # frames whose time stamps decide the rate
_BLINK, _BLINK_SHOWN = 0.01, 0.1  # seconds; browsers show frames of up to 0.01 for 0.1
_TICK = 0.01  # seconds; a GIF's clock, and that of the animations that are made from GIFs
_SHORTEST = 1 / 125  # seconds; time stamps that are closer in a slower clip are noise
Frame = UInt8[np.ndarray, "H W 3"]


def _step(durations: Sequence[float] | Float[np.ndarray, "N"], tick: float) -> float:
    """Seconds between frames at the slowest constant rate that fits: each time stamp within an
    eighth of a frame, or a `tick` of the file's clock. The mean duration where none fits (jitter).
    """
    stamps = np.cumsum(durations)
    fastest = min(float(np.median(durations)), _SHORTEST)
    shortest = min(duration for duration in durations if duration >= fastest)
    for parts in range(1, int(shortest / fastest) + 1):
        step = stamps[-1] / np.rint(np.multiply(durations, parts / shortest)).sum()
        if np.abs(stamps - step * np.rint(stamps / step)).max() <= max(step / 8, tick):
            return float(step)
    return float(np.mean(durations))


def _evenly(frames: Iterable[tuple[float, Frame]], step: float) -> Iterator[Frame]:
    """Each of (duration in seconds, frame) as often as it is shown every `step`: never, if it is
    much shorter. As FFmpeg's `-fps_mode cfr`.
    """
    time, given = 0.0, 0
    for duration, frame in frames:
        time += max(duration, 0.0)
        while given < int(time / step + 0.5):
            yield frame
            given += 1


def _by_numbers(path: pathlib.Path) -> tuple[list[str | int], str]:
    """Sorts names as people count: frame_9 before frame_10."""
    parts = re.split(r"(\d+)", path.name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


def _from_folder(folder: pathlib.Path) -> Iterator[Frame]:
    paths = [p for p in folder.iterdir() if p.suffix.lower() in PICTURES and p.is_file()]
    for path in sorted((p for p in paths if not p.name.startswith(".")), key=_by_numbers):
        try:
            with open_picture(path) as image:
                frame = np.asarray(shown(image))
        except UNDECODABLE as error:
            raise ValueError(
                f"video.path={path}: can't be read as a picture ({error}); remove or replace it"
            ) from None
        yield frame


def _is_picture(path: pathlib.Path) -> bool:
    """Whether the content, whatever the name, is a picture or an animation for PIL."""
    try:
        open_picture(path, formats=(*_ANIMATED, "JPEG", "BMP", "TIFF")).close()
    except UNDECODABLE:
        return False
    return True


def _animation(path: pathlib.Path) -> Iterator[tuple[float, Image.Image]]:
    """(duration in seconds, frame that isn't `shown` yet)."""
    with open_picture(path) as image:
        frames = ImageSequence.Iterator(image) if image.format in _ANIMATED else [image]
        # A PNG may open with a picture for viewers that don't animate.
        for frame in itertools.islice(frames, int(image.info.get("default_image", False)), None):
            check_size(frame)  # a GIF's later frames may be larger
            frame.load()  # tells the duration, in some formats
            duration = frame.info.get("duration", 0) / 1000
            yield (duration if duration > _BLINK else _BLINK_SHOWN), frame


def _from_picture(path: pathlib.Path) -> Iterator[Frame]:
    durations = []
    try:
        for duration, _ in itertools.islice(_animation(path), _PROBE):
            durations.append(duration)
    except UNDECODABLE as error:
        if not durations:
            raise ValueError(f"video.path={path}: can't be read as a picture ({error})") from None
    try:  # damage after the first frame counts where reading comes to it
        timed = ((duration, np.asarray(shown(frame))) for duration, frame in _animation(path))
        yield from _evenly(timed, _step(durations, _TICK))
    except UNDECODABLE as error:
        raise ValueError(f"video.path={path}: can't be read as a picture ({error})") from None


def _film_step(path: pathlib.Path, index: int) -> float | None:
    """`_step` of the film's stream `index`; None if it has no time stamps."""
    import av

    with av.open(str(path), metadata_errors="replace") as film:
        stream = film.streams[index]
        packets = itertools.islice(film.demux(stream), _PROBE)
        marks = [p.dts if p.pts is None else p.pts for p in packets if not p.is_discard]
        stamps = np.unique([mark for mark in marks if mark is not None])
        if len(marks) == _PROBE:  # the latest wait for frames that are stored after them
            stamps = stamps[:-16]
        if len(stamps) < 2:
            return None
        tick = float(stream.time_base)
        return _step(np.diff(stamps) * tick, tick)


def _timed(
    frames: Iterator[av.VideoFrame], step: float, longest: float
) -> Iterator[tuple[float, av.VideoFrame]]:
    """(duration in seconds, frame), from the time stamps; `step` where they are missing or leap by
    more than `longest`.
    """
    previous = None
    for frame in frames:
        if previous is not None:
            known = frame.time is not None and previous.time is not None
            duration = frame.time - previous.time if known else step
            yield (duration if abs(duration) <= longest else step), previous
        previous = frame
    if previous is not None:
        yield max(float((previous.duration or 0) * (previous.time_base or 0)), step), previous


def _turned(image: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """The frame turned and mirrored as its display matrix says."""
    found = [bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"]
    if not found:
        return image
    a, b, _, c, d = np.frombuffer(found[0], np.int32)[:5] / 2**16  # (x, y) -> (ax + cy, bx + dy)
    straight, swapped = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, swapped) > 0.02 * max(straight, swapped):
        angle = np.degrees(np.arctan2(b, a))
        raise ValueError(f"is turned by {angle:.0f} degrees; only multiples of 90 are read")
    if swapped > straight:
        image, a, d = image.swapaxes(0, 1), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _pixels(frame: av.VideoFrame, aspect: float) -> Frame:
    """The frame as players show it, of square pixels: the side that is too short is stretched."""
    form = "rgba" if any(part.is_alpha for part in frame.format.components) else "rgb24"
    options = {}
    width = round(frame.width * max(aspect, 1))
    height = round(frame.height / min(aspect, 1))
    if (width, height) != (frame.width, frame.height):
        options = {"width": width, "height": height, "interpolation": "BICUBIC"}
    image = frame.to_ndarray(format=form, **options)
    if form == "rgba":
        image = np.asarray(shown(Image.fromarray(image)))
    return np.ascontiguousarray(_turned(image, frame))


def _from_film(path: pathlib.Path) -> Iterator[Frame]:
    import av  # FFmpeg; only for films

    try:
        with av.open(str(path), metadata_errors="replace") as film:
            covers = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
            streams = [s for s in film.streams.video if not s.disposition & covers]
            if not streams:
                raise ValueError("holds no video stream")
            step = _film_step(path, streams[0].index) or 1.0
            aspect = float(streams[0].sample_aspect_ratio or 1)
            # A broadcast's clock may start anew; FFmpeg's -dts_delta_threshold is 10 seconds, too.
            leaps = bool(film.format.flags & av.format.Flags.ts_discont.value)
            timed = _timed(film.decode(streams[0]), step, 10.0 if leaps else np.inf)
            yield from _evenly(((length, _pixels(f, aspect)) for length, f in timed), step)
    except av.FFmpegError as error:
        raise ValueError(
            f"video.path={path}: can't be decoded ({error}); "
            "a folder of pictures, a GIF or an MP4 is wanted"
        ) from None
    except ValueError as error:
        raise ValueError(f"video.path={path}: {error}") from None


def resize(frame: Frame, size: tuple[int, int]) -> UInt8[np.ndarray, "H2 W2 3"]:
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
    most: int = 0,
) -> UInt8[np.ndarray, "F H W 3"]:
    """`num_frames` frames (0: all that there are, but no more than `most` where that isn't 0) from
    `start`, every `stride`-th, at `size` (None: as they are).

    A folder's frames come in the order of the numbers in their names, hidden files left out; those
    of an animation or a film at the slowest constant rate that fits their time stamps.

    Raises ValueError, one line: a path that is missing, unreadable or without frames; frames of
    different sizes; fewer frames than asked.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ValueError(f"video.path={path}: no such file or folder")
    if path.is_dir():
        read = _from_folder
    else:
        read = _from_picture if _is_picture(path) else _from_film
    count = num_frames or most
    stop = start + (count - 1) * stride + 1 if count else None
    frames, seen, first = [], 0, None
    for seen, frame in enumerate(itertools.islice(read(path), stop), start=1):
        if seen > start and (seen - 1 - start) % stride == 0:
            first = first or frame.shape
            if frame.shape != first:
                sizes = ["{} x {}".format(*shape[:2]) for shape in (first, frame.shape)]
                raise ValueError(
                    f"video.path={path}: frame {seen - 1} is {sizes[1]}, the first {sizes[0]}; "
                    "all must agree"
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
