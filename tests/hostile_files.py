"""Files that a stranger may send to the page."""

from __future__ import annotations

import io
import pathlib
import struct
import zlib

import numpy as np
from PIL import Image

SVG = b"<svg xmlns='http://www.w3.org/2000/svg' width='32' height='32'><circle r='9'/></svg>"
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/secret.ts\n"


def huge_png(side: int = 30_000) -> bytes:
    """A whole PNG of side x side pixels, one bit each: 100 MB and more when it is decoded."""
    rows = zlib.compressobj(1)
    body = [rows.compress(bytes((side + 7) // 8 + 1)) for _ in range(side)]
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0),
        b"IDAT": b"".join([*body, rows.flush()]),
        b"IEND": b"",
    }
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def picture(kind: str = "PNG", side: int = 64) -> bytes:
    """A picture of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def long_gif(frames: int = 10_000) -> bytes:
    """A GIF of that many frames of 1 x 1."""
    start = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\x00\x00\x00\xff\xff\xff"
    frame = b"\x21\xf9\x04\x00\x05\x00\x00\x00" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0)
    return start + frames * (frame + b"\x02\x02\x44\x01\x00") + b";"


def write_all(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Writes them, by name."""
    files = {
        "huge.png": huge_png(),
        "drawing.svg": SVG,
        "cut.jpg": picture("JPEG")[:1500],
        "long.gif": long_gif(),
        "list.mp4": PLAYLIST,
        "words.png": b"no picture at all",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in files}
