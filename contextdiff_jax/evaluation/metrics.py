"""The evaluate command's metrics by name: functions of an `Evaluation`, which makes once what several of them share."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, PyTree, UInt8

from contextdiff_jax.data import DataConfig, RandomAccessSource, Tokenizer, make_source
from contextdiff_jax.data.shapes import heldout_triples
from contextdiff_jax.evaluation import bound as bounds
from contextdiff_jax.evaluation import distances
from contextdiff_jax.evaluation.classifier import Classifier, correct, load_classifier, read_labels
from contextdiff_jax.evaluation.composition import is_main, judge
from contextdiff_jax.evaluation.features import batches, extract
from contextdiff_jax.evaluation.inception import Inception, load_inception, resize
from contextdiff_jax.evaluation.intervals import Estimate, mean_interval
from contextdiff_jax.settings import Settings

Scores = dict[str, dict[str, Estimate]]  # {row: {name: estimate}}
FLOOR = "real pictures instead"
_BOUND_BATCH = 32
_NEIGHBOURS = 3  # of precision and recall, the paper's
_MAX_FOR_MANY_RESAMPLES = 256  # features: a Frechet distance of 2048 takes a second or more


@dataclasses.dataclass(frozen=True)
class Result:
    """A metric's scores; `unit` is % (the values are shares), bits/dim, or none."""

    scores: Scores
    unit: str = ""
    note: str = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


def splits(data: DataConfig) -> dict[str, RandomAccessSource]:
    """The records to evaluate on, by the name of their row; held-out ones where the source has any."""
    if data.source == "shapes":  # other scenes than those trained on, of the same combinations
        data = dataclasses.replace(data, scene_seed=data.scene_seed + 1)
        names = {"train": "seen combinations", "heldout": "held-out combinations"}
        has_heldout = bool(heldout_triples(data.heldout_fraction))
    else:
        names = {"train": "training records", "heldout": "held-out records"}
        has_heldout = data.source != "folder" or bool(data.heldout_metadata)
    return {row: make_source(data, split) for split, row in names.items() if split == "train" or has_heldout}


def classifier_source(data: DataConfig) -> RandomAccessSource:
    """What a classifier learns from: of scenes, all combinations (a judge must know those held out from the model),
    none of them evaluated on; else the training records."""
    if data.source == "shapes":
        return make_source(dataclasses.replace(data, scene_seed=data.scene_seed + 2), "all")
    return make_source(data, "train")


def feature_fns(network: Inception | Classifier) -> dict[str, Callable]:
    """Jitted functions of uint8 pictures: `features`, and a classifier's `logits`."""
    graph, params = nnx.split(network)
    if isinstance(network, Inception):
        methods = {"features": lambda net, images: net(resize(images))}
    else:
        methods = {
            "features": lambda net, images: net.features(images.astype(jnp.float32) / 127.5 - 1),
            "logits": lambda net, images: net(images.astype(jnp.float32) / 127.5 - 1),
        }

    def bind(method):
        compiled = jax.jit(lambda params, images: method(nnx.merge(graph, params), images))
        return lambda images: compiled(params, images)

    return {name: bind(method) for name, method in methods.items()}


class _Pictures:
    """Up to `count` pictures of a source from `start` on, read when sliced: all at once may not fit the memory."""

    def __init__(self, source: RandomAccessSource, start: int, count: int):
        self._source, self._numbers = source, range(start, min(start + count, len(source)))

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, part: slice) -> UInt8[np.ndarray, "N H W 3"]:
        return np.stack([self._source[i]["image"] for i in self._numbers[part]])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A trained model, what to ask of it, and (cached) its samples and their features.

    `graph`, `params`: the model, split. `generate`: captions to pictures. `features`: a classifier's folder or
    Inception's weights. `num`: samples a split. `reference`: real pictures a split. `bound_timesteps`: strata of the
    bound's sum, 0: every timestep.
    """

    settings: Settings
    tokenizer: Tokenizer
    graph: nnx.GraphDef
    params: PyTree
    generate: Callable[[Sequence[str]], UInt8[np.ndarray, "N H W 3"]]
    features: str
    num: int = 256
    seed: int = 0
    reference: int = 2048
    bound_timesteps: int = 50

    @functools.cached_property
    def sources(self) -> dict[str, RandomAccessSource]:
        return splits(self.settings.data)

    @functools.cached_property
    def network(self) -> Inception | Classifier:
        path = pathlib.Path(self.features)
        if not path.exists():
            raise ValueError(
                f"--features={path}: no such folder or file; name one that contextdiff_jax.train_classifier wrote, or "
                "Inception's weights as safetensors"
            )
        if path.is_file():
            return load_inception(path)
        network, size = load_classifier(path), self.settings.data.image_size
        if network.image_size != size:
            raise ValueError(
                f"--features={path}: reads pictures of {network.image_size} pixels, the run's have {size}"
            )
        return network

    @functools.cached_property
    def _cache(self) -> dict:
        return {}

    def _once(self, key: tuple, make: Callable[[], Any]) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    @functools.cached_property
    def _feature_fns(self) -> dict[str, Callable]:
        return feature_fns(self.network)

    def records(self, row: str) -> list[dict[str, Any]]:
        """The first `num` records of a split, or as many as there are."""
        source = self.sources[row]
        return self._once(("records", row), lambda: [source[i] for i in range(min(self.num, len(source)))])

    def captions(self, row: str) -> list[str]:
        """Those that the samples are made for."""
        return [record["caption"] for record in self.records(row)]

    def samples(self, row: str) -> UInt8[np.ndarray, "N H W 3"]:
        """One picture a caption."""
        return self._once(("samples", row), lambda: self.generate(self.captions(row)))

    @property
    def sampled(self) -> dict[str, UInt8[np.ndarray, "N H W 3"]]:
        """The samples made so far, by split."""
        return {row: self.samples(row) for row in self.sources if ("samples", row) in self._cache}

    def sample_features(self, row: str, kind: str = "features") -> Float[np.ndarray, "N D"]:
        """Of the samples."""
        return self._once((kind, row), lambda: extract(self._feature_fns[kind], self.samples(row)))

    def real_features(self, row: str, start: int, count: int) -> Float[np.ndarray, "N D"]:
        """Of the split's pictures from `start` on."""
        images = _Pictures(self.sources[row], start, count)
        return self._once(("real", row, start, count), lambda: extract(self._feature_fns["features"], images))


def check(names: Sequence[str], evaluation: Evaluation) -> None:
    """Raises ValueError for a metric that this run can't have, before anything is sampled."""
    settings = evaluation.settings
    for name in names:
        if name == "composition" and settings.data.source != "shapes":
            raise ValueError(
                f"--metrics=composition: judges scenes of data.source='shapes'; the run's is {settings.data.source!r}"
            )
        if name == "bound":
            if settings.latent.vae:
                raise ValueError("--metrics=bound: is a likelihood of pixels; this run's x0 are latents (latent.vae)")
            bounds.make_strata(settings.diffusion.num_timesteps, evaluation.bound_timesteps or None)
        if name == "precision_recall" and min(evaluation.num, evaluation.reference) <= _NEIGHBOURS:
            raise ValueError(
                f"--num={evaluation.num}, --reference={evaluation.reference}: {_NEIGHBOURS} neighbours need more"
            )
        if name in ("fid", "kid", "precision_recall", "attributes"):
            network = evaluation.network
            if name == "attributes" and not isinstance(network, Classifier):
                raise ValueError(f"--features={evaluation.features}: --metrics=attributes needs a classifier's folder")


def composition(evaluation: Evaluation) -> Result:
    """What the scenes' pixels show against what their captions say."""
    judged = {row: judge(evaluation.samples(row), evaluation.captions(row)) for row in evaluation.sources}
    estimates = {row: {name: mean_interval(v) for name, v in values.items()} for row, values in judged.items()}
    scores = {row: {n: e for n, e in names.items() if is_main(n)} for row, names in estimates.items()}
    parts = {row: {n: e for n, e in names.items() if not is_main(n)} for row, names in estimates.items()}
    marks = {row: [bool(v) for v in values["exact"]] for row, values in judged.items()}
    note = "share of captions; exact: every object, its shape, colour, size and place, and nothing else"
    return Result(scores, "%", note, {"parts": parts, "exact_by_sample": marks})


def bound(evaluation: Evaluation) -> Result:
    """The bound on -log2 p(picture | caption) of `num` real pictures a split."""
    settings, tokenizer = evaluation.settings, evaluation.tokenizer
    schedule, length = settings.diffusion.make_schedule(), settings.data.max_length
    terms = bounds.make_model_bound(
        evaluation.graph, schedule, settings.diffusion.prediction_type, settings.context.shift
    )
    edges = bounds.make_strata(schedule.num_timesteps, evaluation.bound_timesteps or None)
    null = tokenizer.encode([""], length)
    key = jax.random.key(evaluation.seed)
    scores, details = {}, {"edges": edges.tolist(), "kl_by_t": {}, "standard_error": {}}
    for row in evaluation.sources:
        records = evaluation.records(row)
        ids, mask = tokenizer.encode([record["caption"] for record in records], length)
        images = np.stack([record["image"] for record in records])
        parts = []
        for number, (batch, real) in enumerate(batches((images, ids, mask), _BOUND_BATCH, "bound")):
            values = terms(evaluation.params, *batch, *null, jax.random.fold_in(key, number), edges)
            parts.append({name: np.asarray(value)[..., :real] for name, value in values.items()})
        result = bounds.collect(parts, edges)
        named = {"total": result.total, "prior": result.prior, "kl": result.kl, "decoder": result.decoder}
        scores[row] = {name: mean_interval(values) for name, values in named.items()}
        details["kl_by_t"][row], details["standard_error"][row] = result.kl_by_t.tolist(), result.standard_error
    count = len(edges) - 1
    note = f"upper bound, the lower the better; {count} of {schedule.num_timesteps - 1} KL terms a picture, guidance 1"
    return Result(scores, "bits/dim", note, details)


def _against_real(evaluation: Evaluation, distance: Callable[[np.ndarray, np.ndarray], dict[str, Estimate]]) -> Scores:
    """The distance of each split's samples to its real pictures; and of as many other real pictures, what perfect
    samples would get at this number."""
    scores = {}
    for row in evaluation.sources:
        real = evaluation.real_features(row, 0, evaluation.reference)
        scores[row] = distance(evaluation.sample_features(row), real)
        if len(evaluation.sources[row]) >= evaluation.reference + evaluation.num:
            other = evaluation.real_features(row, evaluation.reference, evaluation.num)
            scores[f"{row}, {FLOOR}"] = distance(other, real)
    return scores


def _note(evaluation: Evaluation) -> str:
    kind = "Inception-v3" if isinstance(evaluation.network, Inception) else "attribute classifier"
    return f"{kind} features, {evaluation.num} samples, up to {evaluation.reference} real pictures"


def fid(evaluation: Evaluation) -> Result:
    """Frechet distance of the features."""

    def distance(x, y):
        resamples = 100 if x.shape[1] <= _MAX_FOR_MANY_RESAMPLES else 10
        return {"fid": distances.fid(x, y, resamples, evaluation.seed)}

    return Result(_against_real(evaluation, distance), "", _note(evaluation))


def kid(evaluation: Evaluation) -> Result:
    """Unbiased polynomial MMD^2 of the features, from all pairs."""

    def distance(x, y):
        return {"kid": distances.mmd2(x, y, distances.polynomial_kernel, True, 200, evaluation.seed)}

    return Result(_against_real(evaluation, distance), "", _note(evaluation))


def precision_recall(evaluation: Evaluation) -> Result:
    """Share of samples near real pictures, and of real pictures near samples."""

    def distance(x, y):
        inside = distances.precision_recall(x, y, _NEIGHBOURS)
        return {name: mean_interval(v) for name, v in zip(("precision", "recall"), inside, strict=True)}

    return Result(_against_real(evaluation, distance), "%", _note(evaluation) + f", k = {_NEIGHBOURS}")


def attributes(evaluation: Evaluation) -> Result:
    """Share of samples in which the classifier sees the attributes of the record whose caption was given."""
    scores = {}
    for row in evaluation.sources:
        labels = [read_labels(record["attributes"]) for record in evaluation.records(row)]
        answers = correct(evaluation.sample_features(row, "logits"), labels, evaluation.network.attributes)
        known = {name: values for name, values in answers.items() if not np.isnan(values).all()}
        scores[row] = {name: mean_interval(values) for name, values in known.items()}
    return Result(scores, "%", "share of samples in which the classifier sees what the caption's record has")


METRICS: dict[str, Callable[[Evaluation], Result]] = {
    "composition": composition,
    "bound": bound,
    "fid": fid,
    "kid": kid,
    "precision_recall": precision_recall,
    "attributes": attributes,
}
