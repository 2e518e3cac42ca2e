"""A folder filled with pictures, batch by batch: what is there stays, so a killed run goes on.

    FOLDER/made.json    what the pictures were made of, written first
    FOLDER/...png       each whole or not at all

A batch is made again if one of its pictures is missing. So each picture has the noise of its number
and of its batch (`ddpm`'s steps depend on that), whoever makes it and when.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from contextdiff_jax.inference import layouts
from contextdiff_jax.inference.cascade import Cascade
from contextdiff_jax.inference.opened import Opened
from contextdiff_jax.inference.pipeline import Pipeline
from contextdiff_jax.parallel.processes import is_first
from contextdiff_jax.runtime.files import replacing, write_json
from contextdiff_jax.runtime.host import num_cores
from contextdiff_jax.runtime.pictures import encode_png
from contextdiff_jax.runtime.texts import read_object
from contextdiff_jax.settings import SampleConfig

MADE_FILE = "made.json"
_VALUES = 64  # of each array, for a model's fingerprint
Share = Callable[[int], range]
Finish = Callable[[UInt8[np.ndarray, "H W 3"]], UInt8[np.ndarray, "H2 W2 3"]]


def fingerprint(opened: Opened) -> str:
    """Tells a model's weights from another's, wherever they lie: some values of every array."""
    digest = hashlib.blake2b(digest_size=8)
    guide = opened.guide and opened.guide.weights
    for path, leaf in jax.tree_util.tree_leaves_with_path((opened.weights, guide)):
        values = np.asarray(leaf).reshape(-1)
        digest.update(f"{jax.tree_util.keystr(path)} {np.shape(leaf)} {values.dtype}".encode())
        digest.update(values[:: -(-values.size // _VALUES) or 1].tobytes())
    return digest.hexdigest()


def made_of(pipeline: Pipeline | Cascade, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the pictures of `fill` with these options depend on, beside their prompts."""
    fields = {field.name for field in dataclasses.fields(SampleConfig)}
    of_sampling = {name: value for name, value in options.items() if name in fields}
    others = {name: value for name, value in options.items() if name not in fields}
    if isinstance(pipeline, Cascade):
        chosen = zip(pipeline.stages, pipeline.options(**of_sampling), strict=True)
        return {"stages": [_made_by(*each) for each in chosen], **others}
    return _made_by(pipeline, pipeline.options(**of_sampling)) | others


def _made_by(pipeline: Pipeline, options: SampleConfig) -> dict[str, Any]:
    made = {name: value for name, value in dataclasses.asdict(options).items() if name != "prompts"}
    return {"model": fingerprint(pipeline.opened), **made}


def text_digest(texts: Sequence[str]) -> str:
    """Tells a list of texts from another."""
    return hashlib.blake2b(json.dumps(list(texts)).encode(), digest_size=8).hexdigest()


def claim(folder: pathlib.Path, about: Mapping[str, Any]) -> None:
    """Writes made.json, or checks that what is there was made of the same.

    Raises ValueError with the first thing that differs.
    """
    about, file = json.loads(json.dumps(about)), folder / MADE_FILE
    if file.exists():
        old = read_object(file, "what the pictures beside it were made of")
        for name in {**about, **old}:
            if old.get(name) != about.get(name):
                raise ValueError(
                    f"{folder}: holds other pictures, {name} is {old.get(name)!r} there and "
                    f"{about.get(name)!r} here; name another folder, or remove it"
                )
    elif is_first():  # of a job's processes, which are told the same
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, about)


def fill_layout(
    pipeline: Pipeline | Cascade,
    name: str,
    entries: Sequence[layouts.Entry],
    num: int,
    folder: pathlib.Path,
    *,
    share: Share,
    **options: Any,
) -> tuple[int, int]:
    """Draws a benchmark's samples, those that aren't there; many processes share them. How many
    pictures there are, and how many batches were made.

    Raises ValueError for a folder of other samples.
    """
    layout, prompts = layouts.LAYOUTS[name], [entry.prompt for entry in entries]
    made = made_of(pipeline, options)
    claim(folder, {"layout": name, "prompts": text_digest(prompts), "num": num, **made})
    if is_first():
        layouts.write_metadata(layout, folder, entries)
    spots = layouts.spots(prompts, num)
    files = [folder / layout.picture(spot) for spot in spots]
    new = fill(pipeline, [spot.prompt for spot in spots], files, share=share, **options)
    return len(files), new


def fill(
    pipeline: Pipeline | Cascade,
    prompts: Sequence[str],
    files: Sequence[pathlib.Path],
    *,
    share: Share = range,
    batch_size: int = 64,
    finish: Finish = np.asarray,
    label: str = "samples",
    **options: Any,
) -> int:
    """Draws the pictures of prompts whose files aren't there, one a prompt; how many batches it
    made.

    Args:
      share: number of batches -> those of this process.
      finish: what is written of a picture.
      options: of `Pipeline.text_to_image`, `size` and `seed` too.

    Raises ValueError for what the pipeline refuses.
    """
    batch_size = min(batch_size, len(prompts))
    starts = [batch_size * number for number in share(-(-len(prompts) // batch_size))]
    missing = [
        start
        for start in starts
        if not all(file.exists() for file in files[start : start + batch_size])
    ]
    done = len(starts) - len(missing)
    bar = tqdm(missing, label, total=len(starts), initial=done, unit="batch", disable=None)
    with concurrent.futures.ThreadPoolExecutor(num_cores()) as pool:
        for start in bar:
            texts = list(prompts[start : start + batch_size])
            filled = texts + texts[-1:] * (batch_size - len(texts))  # one shape, one compilation
            images = pipeline.text_to_image(filled, first=start, batch_size=batch_size, **options)
            places = files[start : start + batch_size]
            told = [{"prompt": text, "index": start + i} for i, text in enumerate(texts)]
            list(pool.map(functools.partial(_write, finish), places, images[: len(texts)], told))
    return len(missing)


def _write(
    finish: Finish,
    file: pathlib.Path,
    image: UInt8[np.ndarray, "H W 3"],
    metadata: Mapping[str, Any],
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        partial.write_bytes(encode_png(finish(image), metadata))
