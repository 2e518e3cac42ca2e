"""Outputs of an edit: films, GIFs, frames, and a strip of all clips side by side."""

from __future__ import annotations

import io
import pathlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import GifImagePlugin, Image, ImageDraw

from contextdiff_jax.runtime.pictures import caption_font

Clip = UInt8[np.ndarray, "F H W 3"]
_LABEL, _GAP, _LINE, _MIN_CELL = 190, 4, 15, 64


def save_gif(clip: Clip, path: pathlib.Path, fps: float) -> None:
    """An endless GIF; its clock counts hundredths of a second.

    Pillow's `save` joins equal neighbours into one frame, which no reader can take apart again.
    """
    with path.open("wb") as file:
        write_gif(clip, file, fps)


def write_gif(clip: Clip, file: BinaryIO, fps: float) -> None:
    """`save_gif`'s bytes."""
    frames = [Image.fromarray(frame).convert("P", palette=Image.Palette.ADAPTIVE) for frame in clip]
    options = {"duration": max(20, 10 * round(100 / fps)), "disposal": 2}
    header, _ = GifImagePlugin.getheader(frames[0], info={"loop": 0, **options})
    file.writelines(header)
    for frame in frames:
        file.writelines(GifImagePlugin.getdata(frame, include_color_table=True, **options))
    file.write(b";")


def mosaic(rows: Sequence[Sequence[Clip]], scale: int = 2) -> Clip:
    """Clips of one shape as one, in rows and columns, white between, enlarged by whole pixels."""
    gap = ((0, 0), (_GAP, _GAP), (_GAP, _GAP), (0, 0))

    def framed(clip):
        enlarged = clip.repeat(scale, axis=1).repeat(scale, axis=2)
        return np.pad(enlarged, gap, constant_values=255)

    return np.concatenate(
        [np.concatenate([framed(clip) for clip in row], axis=2) for row in rows], axis=1
    )


def save_mp4(clip: Clip, path: pathlib.Path, fps: float) -> None:
    """H.264 in 4:2:0, which every player shows: an odd side is made even by repeating its last row
    or column.
    """
    import av

    clip = np.pad(clip, [(0, 0), *((0, side % 2) for side in clip.shape[1:3]), (0, 0)], mode="edge")
    with av.open(str(path), "w") as film:
        stream = film.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "12"}
        )
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for image in clip:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        film.mux(stream.encode())


def save_webp(clip: Clip, path: pathlib.Path, fps: float) -> None:
    """An endless, lossless WebP animation.

    libwebp's own writer joins equal neighbours into one frame, so the pictures it encodes are put
    together here (RFC 9649, 2.7).
    """
    height, width = clip.shape[1:3]

    def chunk(name: bytes, data: bytes) -> bytes:
        return name + len(data).to_bytes(4, "little") + data + b"\0" * (len(data) % 2)

    def numbers(*values: int) -> bytes:
        return b"".join(value.to_bytes(3, "little") for value in values)

    size = numbers(width - 1, height - 1)
    chunks = [chunk(b"VP8X", bytes([2, 0, 0, 0]) + size), chunk(b"ANIM", b"\xff" * 4 + b"\0\0")]
    for frame in clip:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "WEBP", lossless=True)
        place = numbers(0, 0) + size + numbers(round(1000 / fps)) + bytes([2])  # replaces all
        chunks.append(chunk(b"ANMF", place + file.getvalue()[len("RIFF....WEBP") :]))
    path.write_bytes(chunk(b"RIFF", b"WEBP" + b"".join(chunks)))


def save_apng(clip: Clip, path: pathlib.Path, fps: float) -> None:
    """An endless, lossless animated PNG."""
    first, *rest = map(Image.fromarray, clip)
    # Two ways to lay an opaque frame over the one before, in turns: Pillow joins equal neighbours
    # that are laid alike.
    ways = [i % 2 for i in range(len(clip))]
    options = dict(save_all=True, append_images=rest, loop=0, blend=ways)
    first.save(path, "PNG", duration=round(1000 / fps), **options)


# What `edit.formats` names; a file has its format's name as suffix.
WRITERS: dict[str, Callable[[Clip, pathlib.Path, float], None]] = {
    "gif": save_gif,
    "mp4": save_mp4,
    "webp": save_webp,
    "apng": save_apng,
}


def save_frames(clip: Clip, folder: pathlib.Path) -> None:
    """00000.png, 00001.png, ..., as `read_clip` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(clip):
        Image.fromarray(frame).save(folder / f"{i:05d}.png")


def strip(clips: Mapping[str, Clip], max_frames: int = 8) -> Image.Image:
    """One row a clip with its label on the left, columns are frames; of longer clips `max_frames`
    spread evenly.

    Small frames are enlarged by whole pixels. ValueError if the clips differ in shape.
    """
    if len({clip.shape for clip in clips.values()}) != 1:
        raise ValueError(
            f"strip: clips of shapes {[clip.shape for clip in clips.values()]}; must be equal"
        )
    count, height, width = next(iter(clips.values())).shape[:3]
    shown = np.unique(np.linspace(0, count - 1, min(count, max_frames)).round().astype(int))
    scale = max(1, -(-_MIN_CELL // max(height, width)))
    cell = height * scale + _GAP, width * scale + _GAP
    sheet = Image.new("RGB", (_LABEL + cell[1] * len(shown), cell[0] * len(clips) + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), caption_font()
    for row, (label, clip) in enumerate(clips.items()):
        lines = textwrap.wrap(label, _LABEL // 7)[: max(1, cell[0] // _LINE)]
        draw.multiline_text(
            (_GAP, row * cell[0] + _GAP), "\n".join(lines), fill=(30, 30, 30), font=font
        )
        for column, i in enumerate(shown):
            picture = Image.fromarray(clip[i]).resize(
                (width * scale, height * scale), Image.Resampling.NEAREST
            )
            sheet.paste(picture, (_LABEL + column * cell[1], row * cell[0] + _GAP))
    return sheet
