"""Captioned pictures written in each source's layout, for benchmarks and tests to read."""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import tarfile
from collections.abc import Sequence

import numpy as np
from PIL import Image

Captioned = tuple[bytes, str]  # an encoded picture and its caption


def make_pictures(
    count: int, height: int, width: int, seed: int = 0, quality: int = 90
) -> list[Captioned]:
    """JPEGs with a photograph's spectrum: random phases, amplitudes that fall as 1 / frequency,
    correlated colours.

    Their files are of about the size of photographs' (0.2 bytes a pixel at quality 90, as COCO's).
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))  # [H, W // 2 + 1]
    amplitude = np.maximum(frequency, 1 / max(height, width)) ** -2.0
    pictures = []
    for number in range(count):
        phases = np.exp(2j * np.pi * rng.random((3, *amplitude.shape)))
        planes = np.fft.irfft2(amplitude * phases, s=(height, width))  # [3, H, W]
        planes = (
            planes[:1]
            + 0.4 * planes[1:].mean(0)
            + np.stack([planes[1], planes[2], -planes[1]]) * 0.3
        )
        pixels = (
            np.clip(128 + 50 * planes / planes.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0)
        )
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        pictures.append((file.getvalue(), f"picture number {number}"))
    return pictures


def write_folder(path: pathlib.Path, pictures: Sequence[Captioned]) -> pathlib.Path:
    """`folder`: images/N.jpg and metadata.jsonl."""
    (path / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (image, caption) in enumerate(pictures):
        (path / "images" / f"{number}.jpg").write_bytes(image)
        lines.append(
            json.dumps({"file_name": f"images/{number}.jpg", "text": caption, "number": number})
        )
    (path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return path


def write_webdataset(
    path: pathlib.Path, pictures: Sequence[Captioned], per_shard: int = 100
) -> pathlib.Path:
    """`webdataset`: NNNNN.tar with .jpg, .txt and .json, as img2dataset writes LAION's."""
    path.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(pictures), per_shard):
        with tarfile.open(path / f"{first // per_shard:05}.tar", "w") as tar:
            for number, (image, caption) in enumerate(
                pictures[first : first + per_shard], start=first
            ):
                fields = json.dumps({"caption": caption, "number": number}).encode()
                for extension, content in (
                    ("jpg", image),
                    ("txt", caption.encode()),
                    ("json", fields),
                ):
                    member = tarfile.TarInfo(f"{number:09}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return path


def write_tfds(path: pathlib.Path, pictures: Sequence[Captioned]) -> pathlib.Path:
    """`tfds`: the features `image`, `caption`, `number` in ArrayRecord, written by tfds itself."""
    import tensorflow_datasets as tfds

    class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # no checksums of downloads beside this file: nothing is downloaded

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "caption": tfds.features.Text(),
                "number": np.int64,
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, (image, caption) in enumerate(pictures):
                yield number, {"image": io.BytesIO(image), "caption": caption, "number": number}

    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # tfds prints what it does
        builder = Pictures(data_dir=path, file_format="array_record")
        builder.download_and_prepare()
    return pathlib.Path(builder.data_path)


def write_parquet(
    path: pathlib.Path, pictures: Sequence[Captioned], split: str = "train", per_file: int = 1000
) -> pathlib.Path:
    """`huggingface`: SPLIT-N.parquet with the columns image (bytes and path), caption, number."""
    import pyarrow
    import pyarrow.parquet

    path.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(pictures), per_file):
        part = pictures[first : first + per_file]
        rows = {
            "image": [{"bytes": image, "path": None} for image, _ in part],
            "caption": [caption for _, caption in part],
            "number": list(range(first, first + len(part))),
        }
        kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
        table = pyarrow.table(rows | {"image": pyarrow.array(rows["image"], kind)})
        pyarrow.parquet.write_table(table, path / f"{split}-{first // per_file:05}.parquet")
    return path


LAYOUTS = {
    "folder": write_folder,
    "webdataset": write_webdataset,
    "tfds": write_tfds,
    "huggingface": write_parquet,
}
