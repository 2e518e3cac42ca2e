"""Files that strangers send, decoded within bounds.

Nothing is decoded before its format and its size in pixels are read from its header. Every
refusal is a ValueError of one sentence.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from contextdiff_jax.data.decoding import UNDECODABLE, open_picture, shown
from contextdiff_jax.data.video import read_clip, resize
from contextdiff_jax.demo_page.limits import (
    EDITED_FRAMES,
    MAX_CLIP_FRAMES,
    MAX_FRAME_PIXELS,
    MAX_PIXELS,
    MAX_UPLOAD,
)

PICTURES = ("PNG", "JPEG", "WEBP")
ANIMATIONS = ("GIF", "PNG", "WEBP")
FILMS = (".mp4", ".webm", ".mov", ".mkv")
DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm"  # FFmpeg's names of the films' formats
Picture = UInt8[np.ndarray, "H W 3"]


def _opened(
    file: bytes | str, formats: Sequence[str], most: int, what: str, kinds: str
) -> Image.Image:
    """The picture, not yet decoded, of at most `most` pixels."""
    size = len(file) if isinstance(file, bytes) else pathlib.Path(file).stat().st_size
    if size > MAX_UPLOAD:
        raise ValueError(f"{what} has {size / 2**20:.0f} MB; at most 10 MB are read.")
    try:
        image = open_picture(file, most, formats)
    except UNDECODABLE as error:
        if "pixels; 1 to" in str(error):
            given = str(error).partition(" pixels")[0]
            raise ValueError(
                f"{what} is too large: {given} pixels, and at most {most / 1e6:.0f} million in all "
                "are read. Send a smaller copy."
            ) from None
        raise ValueError(f"{what} can't be read: {kinds} is wanted.") from None
    return image


def read_picture(
    file: bytes | str, size: tuple[int, int] | None = None, what: str = "The picture"
) -> Picture:
    """Return a PNG, JPEG or WebP as a viewer shows it; at `size`, (height, width), scaled to cover
    it and cut about the middle.
    """
    with _opened(file, PICTURES, MAX_PIXELS, what, "a PNG, JPEG or WebP") as image:
        try:
            frame = np.asarray(shown(image))
        except UNDECODABLE:
            raise ValueError(f"{what} is damaged or cut off: it can't be decoded.") from None
    return frame if size is None else resize(frame, size)


def read_strokes(
    layers: Sequence[bytes | str], size: tuple[int, int]
) -> Float[np.ndarray, "H W"] | None:
    """Return the mask that is drawn in the layers, 1 where a stroke is; None without any stroke."""
    mask = np.zeros(size, np.float32)
    for layer in layers:
        with _opened(layer, PICTURES, MAX_PIXELS, "The mask", "a PNG or WebP") as image:
            try:
                alpha = np.asarray(image.convert("RGBA").getchannel("A"))
            except UNDECODABLE:
                raise ValueError("The mask is damaged: draw it again.") from None
        frame = resize(np.repeat(alpha[..., None], 3, -1), size)[..., 0]
        mask = np.maximum(mask, frame / 255)
    return mask if (mask >= 0.5).any() else None


def read_metadata(file: str) -> dict[str, str]:
    """Return the text of a PNG."""
    with _opened(file, ("PNG",), MAX_PIXELS, "The file", "a PNG that was made here") as image:
        try:
            return {str(name): str(value) for name, value in image.text.items()}
        except UNDECODABLE:
            raise ValueError("The PNG is damaged or cut off: its text can't be read.") from None


def read_frames(file: str, size: tuple[int, int]) -> UInt8[np.ndarray, "F H W 3"]:
    """Return the first frames of an animation or a film, up to `EDITED_FRAMES`."""
    path = pathlib.Path(file)
    if path.suffix.lower() in FILMS:
        _check_film(path)
    else:
        _check_animation(file)
    try:
        frames = read_clip(path, num_frames=0, size=size, most=EDITED_FRAMES)
    except ValueError as error:
        reason = str(error).partition(f"{path}: ")[2] or str(error)
        raise ValueError(f"The clip {reason}.") from None
    return frames


def _check_animation(file: str) -> None:
    kinds = "a GIF, an animated PNG or WebP, or a film (MP4, WebM, MOV, MKV)"
    with _opened(file, ANIMATIONS, MAX_FRAME_PIXELS, "The clip", kinds) as image:
        try:
            image.seek(MAX_CLIP_FRAMES)
        except EOFError:
            return  # it has fewer
        except UNDECODABLE:
            raise ValueError("The clip is damaged or cut off: it can't be decoded.") from None
        raise ValueError(
            f"The clip has more than {MAX_CLIP_FRAMES} frames; send its first seconds alone."
        )


def _check_film(path: pathlib.Path) -> None:
    import av  # FFmpeg; only for films

    if path.stat().st_size > MAX_UPLOAD:
        raise ValueError("The clip is larger than 10 MB.")
    try:
        # no other format: a playlist would name files and hosts that FFmpeg then opens
        options = {"format_whitelist": DEMUXERS, "protocol_whitelist": "file"}
        with av.open(str(path), metadata_errors="replace", options=options) as film:
            sizes = [(stream.width or 0) * (stream.height or 0) for stream in film.streams.video]
    except av.FFmpegError:
        sizes = []
    if not max(sizes, default=0):
        raise ValueError("The clip can't be read: a GIF, MP4, WebM, MOV or MKV is wanted.")
    if max(sizes) > MAX_FRAME_PIXELS:
        raise ValueError("The clip's frames are too large: at most 1920 x 1080 pixels are read.")
