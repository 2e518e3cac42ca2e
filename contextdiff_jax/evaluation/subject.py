"""The subject of the metrics, a run: records, samples, and their features, each made once."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float, PyTree, UInt8

from contextdiff_jax.data import AnyTokenizer, DataConfig, RandomAccessSource, make_source
from contextdiff_jax.data.identity import identity
from contextdiff_jax.evaluation.features import FeatureFn, Rows, extract, make_feature_fn
from contextdiff_jax.evaluation.networks.classifier import (
    Classifier,
    feature_distance,
    load_classifier,
)
from contextdiff_jax.evaluation.networks.clip import Clip, load_clip
from contextdiff_jax.evaluation.networks.inception import Inception, load_inception, resize
from contextdiff_jax.evaluation.networks.lpips import Distance
from contextdiff_jax.evaluation.shares import share
from contextdiff_jax.models.low_resolution import shrink
from contextdiff_jax.models.pixels import to_unit
from contextdiff_jax.parallel.processes import agree
from contextdiff_jax.settings import Settings

Pictures = UInt8[np.ndarray, "N H W 3"]
Small = UInt8[np.ndarray, "N h w 3"]
# An upsampler: (captions, small pictures, number of the first, level of their noise) to pictures.
Enlarge = Callable[[Sequence[str], Small, int, float], Pictures]


def splits(data: DataConfig) -> dict[str, RandomAccessSource]:
    """The records to evaluate on, by the name of their row; held-out ones where the source has any.

    Drawn records are others than those trained on, of the same kind; a cache's are the pictures
    that it was made of.
    """
    data = data.kind.pictures(data)
    data = data.kind.others(data, 1)
    return {data.kind.rows[split]: make_source(data, split) for split in data.kind.splits(data)}


def classifier_source(data: DataConfig) -> RandomAccessSource:
    """The records that a classifier learns from.

    Of drawn records these are both splits' (a judge must know what is held out from the model),
    none of them evaluated on; else the training records.
    """
    data = data.kind.pictures(data)
    if data.kind.is_drawn:
        return make_source(data.kind.others(data, 2), "all")
    return make_source(data, "train")


def feature_fns(network: Inception | Classifier) -> dict[str, FeatureFn]:
    """Compiled functions of uint8 pictures: `features`, and a classifier's `logits`."""
    if isinstance(network, Inception):
        methods = {"features": lambda net, images: net(resize(images))}
    else:
        methods = {
            "features": lambda net, images: net.features(to_unit(images)),
            "logits": lambda net, images: net(to_unit(images)),
        }
    return {name: make_feature_fn(network, method) for name, method in methods.items()}


class _Pictures:
    """The pictures of some of a source's records, read when sliced: all at once may not fit the
    memory.
    """

    def __init__(self, source: RandomAccessSource, numbers: range):
        self._source, self._numbers = source, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, part: slice) -> UInt8[np.ndarray, "N H W 3"]:
        return np.stack([self._source[i]["image"] for i in self._numbers[part]])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A trained model, what to ask of it, and (cached) this process's share of its samples and
    their features.

    `graph`, `params`: the model, split, on this process's devices. `generate`: (captions, number of
    the first one among all processes') to pictures. `features`: a classifier's folder or
    Inception's weights. `clip`: a CLIPModel's folder.
    `num`: samples a split. `reference`: real pictures a split. `bound_timesteps`: strata of the
        bound's sum, 0: every
    timestep.
    An upsampler's: `enlarge`, instead of `generate`; `augmentation`: the level that it samples at;
    `augmentations`: those of the curve, ascending; `baseline`: another upsampler, and its name.
    """

    settings: Settings
    tokenizer: AnyTokenizer
    graph: nnx.GraphDef
    params: PyTree
    generate: Callable[[Sequence[str], int], Pictures]
    features: str
    clip: str = ""
    num: int = 256
    seed: int = 0
    reference: int = 2048
    bound_timesteps: int = 50
    enlarge: Enlarge | None = None
    augmentation: float = 0.0
    augmentations: tuple[float, ...] = ()
    baseline: Enlarge | None = None
    baseline_name: str = ""

    @functools.cached_property
    def sources(self) -> dict[str, RandomAccessSource]:
        def facts(sources: dict[str, RandomAccessSource]) -> dict[str, Any]:
            rows = ((row, identity(source)) for row, source in sources.items())
            return {f"{row}: {name}": value for row, found in rows for name, value in found.items()}

        return agree("data", lambda: splits(self.settings.data), facts)

    @functools.cached_property
    def network(self) -> Inception | Classifier:
        path = pathlib.Path(self.features)
        if not path.exists():
            raise ValueError(
                f"--features={path}: no such folder or file; name one that "
                "contextdiff_jax.train_classifier wrote, or Inception's weights as safetensors"
            )
        if path.is_file():
            return load_inception(path)
        network, size = load_classifier(path), self.settings.data.image_size
        if network.image_size != size:
            raise ValueError(
                f"--features={path}: reads pictures of {network.image_size} pixels, the run's "
                f"have {size}"
            )
        return network

    @functools.cached_property
    def clip_network(self) -> Clip:
        if not self.clip:
            raise ValueError(
                "--clip: missing; cmmd and clip_score need a folder that transformers' CLIPModel "
                "was saved in"
            )
        return load_clip(self.clip)

    @functools.cached_property
    def _cache(self) -> dict:
        return {}

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """What `make` made when it was first asked for under this key."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    @functools.cached_property
    def feature_fns(self) -> dict[str, Callable]:
        return feature_fns(self.network)

    @functools.cached_property
    def layer_distance(self) -> Distance | None:
        """Of pictures from others in all layers of a classifier; Inception's are no such layers."""
        return feature_distance(self.network) if isinstance(self.network, Classifier) else None

    def numbers(self, row: str) -> range:
        """This process's share of the split's first `num` records, or of as many as there are."""
        return share(min(self.num, len(self.sources[row])))

    def records(self, row: str) -> list[dict[str, Any]]:
        """The records of `numbers`."""
        return self.once(
            ("records", row), lambda: [self.sources[row][i] for i in self.numbers(row)]
        )

    def captions(self, row: str) -> list[str]:
        """The captions that the samples are made for."""
        return [record["caption"] for record in self.records(row)]

    def pictures(self, row: str) -> Pictures:
        """The pictures of `records`."""
        return np.stack([record["image"] for record in self.records(row)])

    def small(self, row: str) -> Small:
        """The pictures of `records`, as an upsampler is given them."""
        return shrink(self.pictures(row), self.settings.super_resolution.factor)

    def enlarged(
        self,
        row: str,
        small: Small | None = None,
        level: float | None = None,
        by: Enlarge | None = None,
    ) -> Pictures:
        """`small`, by default the split's own, as `by`, by default the run, enlarges them at the
        level, by default the run's. The noise is the same for all of them.
        """
        return (self.enlarge if by is None else by)(
            self.captions(row),
            self.small(row) if small is None else small,
            self.numbers(row).start,
            self.augmentation if level is None else level,
        )

    def samples(self, row: str) -> Pictures:
        """One picture a caption; an upsampler's are of the records' own pictures, shrunk."""

        def make() -> Pictures:
            if self.settings.super_resolution.is_upsampler:
                return self.enlarged(row)
            return self.generate(self.captions(row), self.numbers(row).start)

        return self.once(("samples", row), make)

    @property
    def sampled(self) -> dict[str, Pictures]:
        """The samples made so far, by split."""
        return {row: self.samples(row) for row in self.sources if ("samples", row) in self._cache}

    def _extract(self, kind: str, images: Rows) -> Float[np.ndarray, "N D"]:
        return (
            self.clip_network.embed_images(images)
            if kind == "clip"
            else extract(self.feature_fns[kind], images)
        )

    def sample_features(self, row: str, kind: str = "features") -> Float[np.ndarray, "N D"]:
        """The samples' features; `kind`: features, logits or clip."""
        return self.once((kind, row), lambda: self._extract(kind, self.samples(row)))

    def real_features(
        self, row: str, start: int, count: int, kind: str = "features"
    ) -> Float[np.ndarray, "N D"]:
        """Features of this process's share of `count` real pictures (or all) from `start` on."""
        part = share(min(count, len(self.sources[row]) - start))
        images = _Pictures(self.sources[row], range(start + part.start, start + part.stop))
        return self.once(("real", kind, row, start, count), lambda: self._extract(kind, images))
