"""Protocols of published figures: drawn captions, a picture of each, FID and CLIP score, and both
as a curve over the guidance scale.

    DIR/protocols/NAME/captions.jsonl            which caption each number has
    DIR/protocols/NAME/guidance_2/000000.png     the pictures (inference.filling), as they come
    DIR/protocols/NAME/guidance_2/scores.json    their scores
    DIR/protocols/NAME/curve.json, curve.png     all scales

A killed run goes on with the pictures and scores that are missing; more captions go on with those
of fewer.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from contextdiff_jax.evaluation import distances, folders
from contextdiff_jax.evaluation.captions import Caption
from contextdiff_jax.evaluation.folders import Looking, Statistics, read_picture, square
from contextdiff_jax.evaluation.intervals import Estimate, mean_interval
from contextdiff_jax.evaluation.networks.clip import Clip
from contextdiff_jax.evaluation.shares import gather, gather_rows, share
from contextdiff_jax.inference import filling
from contextdiff_jax.inference.layouts import LAYOUTS, spots
from contextdiff_jax.inference.pipeline import Pipeline
from contextdiff_jax.parallel.processes import is_first
from contextdiff_jax.runtime.files import write_json
from contextdiff_jax.runtime.texts import read_object

SCORES_FILE = "scores.json"
Scores = dict[str, Estimate]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """What a figure is of.

    Attributes:
      count: captions, each of another picture.
      size: pixels a side of samples and real pictures, whatever they were.
      guidance: scales of the curve.
      seed: of the captions' draw.
    """

    count: int
    size: int
    guidance: tuple[float, ...]
    seed: int = 0


PROTOCOLS: dict[str, Protocol] = {
    # Zero-shot FID-30K of DALL-E, GLIDE and Imagen, and Imagen's curves over guidance.
    "coco30k": Protocol(count=30_000, size=256, guidance=(1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)),
}


class _Files:
    """Pictures of files, squared, read when they are sliced."""

    def __init__(self, files: Sequence[pathlib.Path], size: int):
        self._files, self._size = files, size

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, part: slice) -> UInt8[np.ndarray, "N H W 3"]:
        return np.stack([square(read_picture(file), self._size) for file in self._files[part]])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """What pictures are judged by. `clip`: None for FID alone; `clip_name`: of its weights."""

    protocol: Protocol
    looking: Looking
    reference: Statistics
    clip: Clip | None = None
    clip_name: str = ""

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """What tells its scores from another judge's."""
        moments = self.reference.moments
        digest = hashlib.blake2b(moments.mean.tobytes(), digest_size=8).hexdigest()
        reference = f"{moments.count} pictures {digest}"
        return {"features": self.looking.name, "reference": reference, "clip": self.clip_name}

    def scores(self, files: Sequence[pathlib.Path], captions: Sequence[str]) -> Scores:
        """FID of the pictures, and the mean CLIP score with their captions; each process of a job
        looks at its share.
        """
        statistics = folders.look_at(files, self.looking, label="FID")
        value = distances.frechet_distance(statistics.moments, self.reference.moments)
        scores = {"fid": Estimate(value, value, value)}
        if self.clip is not None:
            scores["clip_score"] = mean_interval(self._clip_scores(files, captions))
        return scores

    def _clip_scores(
        self, files: Sequence[pathlib.Path], captions: Sequence[str]
    ) -> Float[np.ndarray, "N"]:
        mine = share(len(files))
        part = slice(mine.start, mine.stop)
        images = self.clip.embed_images(_Files(files[part], self.protocol.size))
        rows = distances.clip_score(images, self.clip.embed_captions(captions[part]))
        return gather_rows({"clip_score": rows})["clip_score"]

    def kept_scores(
        self, files: Sequence[pathlib.Path], captions: Sequence[str], file: pathlib.Path
    ) -> Scores:
        """`scores`, or those in the file if they are of as many pictures and the same judge."""
        about = self.about | {"num": len(files)}
        if file.exists():
            kept = read_object(file, "scores")
            if kept.get("about") == about:
                return {name: Estimate(*values) for name, values in kept["scores"].items()}
        found = self.scores(files, captions)
        if is_first():
            write_json(file, {"about": about, "scores": found})
        return found


def open_reference(
    path: str, looking: Looking, seed: int, folder: pathlib.Path | None = None
) -> Statistics:
    """The statistics of real pictures, of a folder or a file of them. `folder`: where those of a
    folder of pictures are kept for the next time, as long as its files stay.
    """
    if path.endswith(".safetensors") or folder is None:
        return folders.open_statistics(path, looking, seed)
    files = folders.find_pictures(pathlib.Path(path))
    facts = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    told = json.dumps([looking.name, facts]).encode()
    kept = folder / f"reference-{hashlib.blake2b(told, digest_size=8).hexdigest()}.safetensors"
    if kept.exists():
        return Statistics.load(kept)
    found = folders.look_at(files, looking, seed, pathlib.Path(path).name)
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        found.save(kept)
    return found


def numbered_pictures(folder: pathlib.Path, count: int) -> list[pathlib.Path]:
    """A folder's pictures, one a caption, by the numbers at the end of their names, 0 to count - 1.

    Raises ValueError for a folder that has others.
    """
    found: dict[int, pathlib.Path] = {}
    for file in folders.find_pictures(folder):
        number = re.search(r"\d+$", file.stem)
        if number is None or int(number[0]) in found:
            raise ValueError(f"{file}: its name must end in the number of its caption, from 0 on")
        found[int(number[0])] = file
    lacking = next((number for number in range(count) if number not in found), None)
    if lacking is not None or len(found) != count:
        what = f"none has number {lacking}" if lacking is not None else "some are more"
        raise ValueError(f"{folder}: {len(found)} pictures for {count} captions; {what}")
    return [found[number] for number in range(count)]


def sample_curve(
    pipeline: Pipeline,
    judge: Judge,
    captions: Sequence[Caption],
    num: int,
    scales: Sequence[float],
    folder: pathlib.Path,
    tell: Callable[[float, Scores], None] = lambda scale, scores: None,
    **options: Any,
) -> dict[float, Scores]:
    """The scores at each guidance scale of pictures of the first `num` captions: those drawn by the
    protocol, up to its count. `tell` is called with each; `options`: `Pipeline.text_to_image`'s.

    Raises ValueError for a folder with other pictures.
    """
    size, layout = judge.protocol.size, LAYOUTS["numbered"]
    texts, found = [caption.text for caption in captions], {}
    about = {"captions": filling.text_digest(texts), "pixels": size}
    made = filling.made_of(pipeline, options)
    for scale in scales:
        at = folder / f"guidance_{scale:g}"
        filling.claim(at, about | made | {"guidance": scale})
        files = [at / layout.picture(spot) for spot in spots(texts[:num])]
        filling.fill(
            pipeline,
            texts[:num],
            files,
            share=share,
            finish=functools.partial(square, size=size),
            label=f"guidance {scale:g}",
            guidance=scale,
            **options,
        )
        gather({"filled": np.zeros(1)})  # all processes' pictures are there
        found[scale] = judge.kept_scores(files, texts[:num], at / SCORES_FILE)
        tell(scale, found[scale])
    return found


def write_curve(
    folder: pathlib.Path, points: Mapping[float | None, Scores], facts: Mapping[str, Any]
) -> None:
    """curve.json: `facts` and the scores by scale, intervals as [value, low, high]."""
    rows = [{"guidance": scale, **scores} for scale, scores in points.items()]
    write_json(folder / "curve.json", {**facts, "points": rows})
