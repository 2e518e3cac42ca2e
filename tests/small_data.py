"""Small data that tests write and read: pictures, shards, folders and clips."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
from PIL import Image

from contextdiff_jax.benchmarks.source_layouts import make_pictures

PICTURES = make_pictures(30, 48, 64)


def write_tar(path, members) -> None:
    """A shard of (name, content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def encode_picture(pixels, kind="PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, kind)
    return file.getvalue()


def film(frames: int = 6, height: int = 32, width: int = 48) -> np.ndarray:
    """A smooth picture that moves two pixels a frame."""
    y, x = np.mgrid[:height, : width + 2 * frames]
    wide = np.stack(
        [127 + 100 * np.sin(x / 5), 127 + 100 * np.cos(y / 4), 127 + 80 * np.sin((x + y) / 7)],
        axis=-1,
    )
    return (
        np.stack([wide[:, 2 * i : 2 * i + width] for i in range(frames)]).round().astype(np.uint8)
    )


def write_folder(path, count=10, lines=()):
    """`count` good records, whose pictures are grey of level 10 * i, then `lines`."""
    (path / "images").mkdir(parents=True)
    records = []
    for i in range(count):
        Image.new("RGB", (12, 8), (10 * i,) * 3).save(path / "images" / f"{i}.png")
        records.append(
            json.dumps({"file_name": f"images/{i}.png", "text": f"grey {i}", "level": 10 * i})
        )
    (path / "metadata.jsonl").write_text("\n".join([*records, *lines]) + "\n")
