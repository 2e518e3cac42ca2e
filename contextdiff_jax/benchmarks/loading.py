"""Measurement of the loader's speed, per source.

It is compared with what the devices take and with the sources' own packages.

Everything is measured in CPU seconds of this process, so a rate is that of one core, whatever else
the machine does, and about what each further loader process (`data.num_workers`) adds. Pipelines
run in turns; all load a batch when it is asked for and none ahead, so that nobody works in
another's time. The first batches are not counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from contextdiff_jax.benchmarks.source_layouts import LAYOUTS, make_pictures
from contextdiff_jax.data import (
    DataConfig,
    PictureSource,
    RandomAccessSource,
    make_loader,
    make_source,
)
from contextdiff_jax.data.decoding import FILTERS
from contextdiff_jax.data.records import find_files
from contextdiff_jax.runtime.fields import check_choice
from contextdiff_jax.runtime.files import read_lines

_BATCH = 16
Batches = Iterator[np.ndarray]  # uint8 [_BATCH, H, W, 3]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataBenchmark:
    """Options of the measurement.

    Attributes:
        compare: reference to run in turns with ours: a name in `PEERS`, or empty.
        repeats: measurements of each pipeline.
        need: pictures a second that the devices take; 0: that of `workdir`, if there is one.
        workdir: a run whose metrics.jsonl tells the need.
        pictures: pictures a measurement.
        shape: (height, width) of the pictures made where the config names no data.
    """

    compare: str = ""
    repeats: int = 5
    need: float = 0.0
    workdir: str = ""
    pictures: int = 256
    shape: tuple[int, int] = (384, 512)


class Result(NamedTuple):
    """A table for the terminal, and its rows for a file."""

    text: str
    rows: list[dict[str, Any]]


class Pipeline(NamedTuple):
    """Something that gives batches; `peer`: the name of the pipeline that it is compared with."""

    name: str
    batches: Batches
    bytes_read: float  # a picture, encoded; 0 where none is read
    peer: str = ""


def _ours(source: RandomAccessSource) -> Batches:
    loader = make_loader(source, batch_size=_BATCH, num_threads=0)
    return (batch["image"] for batch in loader)


def _resized(image: Image.Image, config: DataConfig) -> np.ndarray:
    """The usual recipe: the shorter side to the size with the same filter, then the centre."""
    size = config.image_size
    scale = size / min(image.size)
    width, height = (max(round(side * scale), size) for side in image.size)
    image = image.resize((width, height), FILTERS[config.resample])
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _batched(images: Iterator[np.ndarray]) -> Batches:
    while True:
        yield np.stack([next(images) for _ in range(_BATCH)])


def _webdataset_peer(config: DataConfig) -> Iterator[np.ndarray]:
    import webdataset

    shards = [str(p) for p in find_files(config.path, config.metadata or "*.tar", "tar shard")]
    samples = webdataset.WebDataset(shards, shardshuffle=False).decode("pilrgb").repeat()
    for sample in samples:
        image = next(sample[name] for name in ("jpg", "jpeg", "png", "webp") if name in sample)
        yield _resized(image, config)


def _tfds_peer(config: DataConfig) -> Iterator[np.ndarray]:
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(config.path).as_data_source(
        split=config.metadata or "train"
    )
    while True:
        for record in source:
            yield _resized(Image.fromarray(record["image"]), config)


def _start_peer(name: str, config: DataConfig) -> Batches:
    if importlib.util.find_spec(PACKAGES[name]) is None:
        raise ValueError(
            f"--compare={name!r}: the package {PACKAGES[name]} is not installed; see "
            "requirements-test.txt"
        )
    return _batched(PEERS[name](config))


PACKAGES = {"webdataset": "webdataset", "tfds": "tensorflow_datasets"}
PEERS = {"webdataset": _webdataset_peer, "tfds": _tfds_peer}


def _pipelines(config: DataConfig, compare: str) -> list[Pipeline]:
    """Ours for a config, and the peer's if this is the source to compare."""
    source = make_source(config)
    encoded = 0.0
    if isinstance(source, PictureSource):
        encoded = float(
            np.mean([len(source.read(index).image) for index in range(min(len(source), 64))])
        )
    if config.source != compare:
        return [Pipeline(config.source, _ours(source), encoded)]
    peer = Pipeline(f"{compare} itself", _start_peer(compare, config), encoded)
    return [Pipeline(config.source, _ours(source), encoded, peer.name), peer]


def _measure(pipelines: list[Pipeline], repeats: int, batches: int) -> dict[str, list[float]]:
    """CPU seconds of each pipeline's repeats, taken in turns."""
    for pipeline in pipelines:  # start-up and imports are not counted
        next(pipeline.batches)
        next(pipeline.batches)
    seconds: dict[str, list[float]] = {pipeline.name: [] for pipeline in pipelines}
    for repeat in range(repeats):
        for pipeline in pipelines if repeat % 2 else pipelines[::-1]:
            start = time.process_time()
            for _ in range(batches):
                next(pipeline.batches)
            seconds[pipeline.name].append(time.process_time() - start)
    return seconds


def _need(options: DataBenchmark) -> float:
    """Pictures a second that the devices take; 0 if nobody says."""
    if options.need or not options.workdir:
        return options.need
    path = pathlib.Path(options.workdir) / "metrics.jsonl"
    try:
        return statistics.median(line["images_per_second"] for line in read_lines(path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"--workdir={options.workdir}: its metrics.jsonl holds no images_per_second ({error})"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences warnings: the index and tfds say what they do, between the lines of the table."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def run(config: DataConfig, options: DataBenchmark) -> Result:
    """Measures `config`'s source, or, where it names no `path`, each source on pictures made for
    it.

    Raises:
        ValueError: for a comparison that is unknown or is not of the config's source, or no need in
            `workdir`.
    """
    if options.compare:
        check_choice("--compare", options.compare, PEERS, "--mode=data")
    if options.compare and config.path and config.source != options.compare:
        raise ValueError(
            f"--compare={options.compare!r}: data.path holds data.source={config.source!r}; must "
            "be the same"
        )
    need = _need(options)
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        configs = [config]
        if not config.path:
            made = make_pictures(min(options.pictures, 256), *options.shape)
            configs = [dataclasses.replace(config, source="shapes", metadata="")] + [
                dataclasses.replace(
                    config,
                    source=name,
                    path=str(write(pathlib.Path(folder, name), made)),
                    metadata="",
                )
                for name, write in LAYOUTS.items()
            ]
        pipelines = [pipeline for one in configs for pipeline in _pipelines(one, options.compare)]
        batches = max(options.pictures // _BATCH, 1)
        seconds = _measure(pipelines, options.repeats, batches)
        for pipeline in pipelines:
            pipeline.batches.close()
    rows = [
        _row(pipeline, seconds, batches * _BATCH, config.image_size, need) for pipeline in pipelines
    ]
    return Result(_table(rows, config.image_size, need), rows)


def _row(
    pipeline: Pipeline, seconds: dict[str, list[float]], count: int, size: int, need: float
) -> dict[str, Any]:
    median = statistics.median(seconds[pipeline.name])
    rate = count / median
    row = {
        "name": pipeline.name,
        "seconds": median,
        "all_seconds": seconds[pipeline.name],
        "pictures": count,
        "pictures_per_second": rate,
        "megabytes_read_per_second": rate * pipeline.bytes_read / 1e6,
        "megabytes_given_per_second": rate * size * size * 3 / 1e6,
    }
    if need:
        row |= {"need": need, "cores_needed": need / rate}
    if pipeline.peer:
        pairs = zip(seconds[pipeline.peer], seconds[pipeline.name], strict=True)
        row |= {
            "peer": pipeline.peer,
            "ratio": statistics.median(peer / ours for peer, ours in pairs),
        }
    return row


def _table(rows: list[dict[str, Any]], size: int, need: float) -> str:
    head = f"{size} px, per core"
    lines = [
        f"{head:<30}{'pictures/s':>12}{'MB/s read':>12}{'MB/s given':>12}{'cores':>9}{'ahead':>12}"
    ]
    for row in rows:
        cores = f"{row['cores_needed']:.1f}" if need else "-"
        ratio = f"{row['ratio']:.2f} times" if "ratio" in row else ""
        lines.append(
            f"{row['name']:<30}{row['pictures_per_second']:>12.0f}{row['megabytes_read_per_second']:>12.1f}"
            f"{row['megabytes_given_per_second']:>12.1f}{cores:>9}{ratio:>12}"
        )
    told = (
        f"cores: to give the {need:.0f} pictures/s that the devices take"
        if need
        else "cores: --need=PICTURES_PER_SECOND"
    )
    return "\n".join([*lines, told])
