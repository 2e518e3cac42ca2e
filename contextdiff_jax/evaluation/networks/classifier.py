"""A small convolutional classifier of a data set's own attributes: the feature network where no
pretrained one exists.

Attributes are read from the records: of a scene, its objects' shapes, colours and sizes; of a
folder's record, every metadata field with a few frequent values. Its penultimate features serve
FID, KID, precision and recall, its answers the attribute accuracy. Distances in such features
compare runs on one data set; they mean nothing beside published FIDs.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.numpy
from flax import nnx
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from contextdiff_jax.evaluation.networks.lpips import Distance, weighed_distance
from contextdiff_jax.models.pixels import to_unit
from contextdiff_jax.pretrained.folder_files import read_json, save_tensors
from contextdiff_jax.runtime.files import write_json
from contextdiff_jax.runtime.keys import make_key

# Of one record: an attribute's values; several where objects are.
Labels = dict[str, tuple[str, ...]]
WEIGHTS_FILE, REPORT_FILE = "classifier.safetensors", "classifier.json"
OTHER, NONE = "other", "none"
_OBJECT_FIELDS = ("shape", "colour", "size")
_MAX_VALUES = 64  # a field with more is no attribute, it is a name
_MIN_SHARE = 0.003  # of the records; rarer values are one, `other`
_MIN_COVERED = (
    0.9  # of the records have a frequent value; else the field tells records apart, not kinds
)
_MAX_NOISE = 0.05  # of training pictures in [-1, 1]: generated ones are not as clean as the data


@dataclasses.dataclass(frozen=True)
class Attribute:
    """A question with known answers; `multiple`: a picture may have several of them, or none."""

    name: str
    values: tuple[str, ...]
    multiple: bool


def read_labels(attributes: Mapping[str, Any]) -> Labels:
    """A record's attributes as labels."""
    if "objects" in attributes:
        found = {name: {o[name] for o in attributes["objects"]} for name in _OBJECT_FIELDS}
        return {name: tuple(sorted(values)) for name, values in found.items()}
    plain = {
        name: value for name, value in attributes.items() if value is None or isinstance(value, str)
    }
    return {name: (NONE if value is None else value,) for name, value in plain.items()}


def choose_attributes(labels: Sequence[Labels]) -> tuple[Attribute, ...]:
    """The attributes that can be learned from these records.

    Raises ValueError if there are none.
    """
    chosen = []
    for name in sorted(set().union(*labels)):
        answers = [row[name] for row in labels if name in row]
        counts = collections.Counter(value for values in answers for value in values)
        frequent = sorted(
            value for value, count in counts.items() if count >= _MIN_SHARE * len(labels)
        )
        covered = sum(counts[value] for value in frequent) / max(1, sum(counts.values()))
        if (
            not 2 <= len(frequent) <= _MAX_VALUES
            or covered < _MIN_COVERED
            or len(answers) < len(labels)
        ):
            continue
        multiple = any(len(values) != 1 for values in answers)
        rest = (OTHER,) if len(frequent) < len(counts) and not multiple else ()
        chosen.append(Attribute(name, (*frequent, *rest), multiple))
    if not chosen:
        raise ValueError(
            f"data.source: no attribute of its records has 2 to {_MAX_VALUES} frequent values to "
            "train a classifier on"
        )
    return tuple(chosen)


def encode(labels: Sequence[Labels], attributes: Sequence[Attribute]) -> Float[np.ndarray, "N V"]:
    """1 where a picture has a value, in the order of the logits."""
    columns = []
    for attribute in attributes:
        for value in attribute.values:
            columns.append([value in _known(row[attribute.name], attribute) for row in labels])
    return np.array(columns, np.float32).T


def _known(values: tuple[str, ...], attribute: Attribute) -> set[str]:
    return {value if value in attribute.values else OTHER for value in values}


class Classifier(nnx.Module):
    """Stages of two 3x3 convolutions, each but the first at half the size, down to about 4x4; mean
    and maximum over the places; a hidden layer of unit variance (the features); logits of all
    attributes' values side by side.
    """

    def __init__(
        self,
        attributes: Sequence[Attribute],
        image_size: int,
        width: int = 32,
        features: int = 64,
        *,
        rngs: nnx.Rngs,
    ):
        self.attributes, self.image_size = tuple(attributes), image_size
        widths = [
            min(width * 2**i, 4 * width)
            for i in range(max(1, round(math.log2(image_size / 4))) + 1)
        ]
        convs = []
        for i, (a, b) in enumerate(zip([3, *widths], widths, strict=False)):
            convs += [
                nnx.Conv(a, b, (3, 3), strides=1 if i == 0 else 2, rngs=rngs),
                nnx.Conv(b, b, (3, 3), rngs=rngs),
            ]
        self.convs = nnx.List(convs)
        self.norms = nnx.List(
            nnx.GroupNorm(conv.out_features, num_groups=8, rngs=rngs) for conv in convs
        )
        self.hidden = nnx.Linear(2 * widths[-1], features, rngs=rngs)
        # Without a scale of its own: a kernel distance (KID) of features depends on theirs.
        self.hidden_norm = nnx.LayerNorm(features, use_scale=False, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(features, sum(len(a.values) for a in attributes), rngs=rngs)

    def layers(self, x: Float[Array, "B H W 3"]) -> list[Float[Array, "B h w C"]]:
        """The output of each convolution."""
        found = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.relu(norm(conv(x)))
            found.append(x)
        return found

    def features(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """The penultimate layer, of pictures in [-1, 1]."""
        x = self.layers(x)[-1]
        pooled = jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], axis=-1)  # [B, 2 C]
        return self.hidden_norm(self.hidden(pooled))

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B V"]:
        return self.out(jax.nn.relu(self.features(x)))


def split_by_attribute(
    columns: Array | np.ndarray, attributes: Sequence[Attribute]
) -> list[Array] | list[np.ndarray]:
    """[B, V] as one [B, values] an attribute."""
    edges = np.cumsum([len(a.values) for a in attributes])[:-1]
    return (
        jnp.split(columns, edges, axis=-1)
        if isinstance(columns, jax.Array)
        else np.split(columns, edges, axis=-1)
    )


def loss_fn(
    model: Classifier, x: Float[Array, "B H W 3"], targets: Float[Array, "B V"]
) -> Float[Array, ""]:
    """Cross-entropy of each attribute: over its values, or of each value alone where there may be
    several.
    """
    total = 0.0
    logits = split_by_attribute(model(x), model.attributes)
    for attribute, z, y in zip(
        model.attributes, logits, split_by_attribute(targets, model.attributes), strict=True
    ):
        if attribute.multiple:
            total += optax.sigmoid_binary_cross_entropy(z, y).mean()
        else:
            total += optax.softmax_cross_entropy(z, y).mean()
    return total


def correct(
    logits: Float[np.ndarray, "N V"], labels: Sequence[Labels], attributes: Sequence[Attribute]
) -> dict[str, Float[np.ndarray, "N"]]:
    """1 where the answer to an attribute is right (all of its values, no other), 0 where not, nan
    where the truth is a value that the classifier was never told of.
    """
    targets = split_by_attribute(encode(labels, attributes), attributes)
    answers = {}
    for attribute, z, y in zip(
        attributes, split_by_attribute(np.asarray(logits), attributes), targets, strict=True
    ):
        said = z > 0 if attribute.multiple else np.eye(z.shape[1])[z.argmax(1)]
        unknown = ~y.any(1) & (not attribute.multiple)
        answers[attribute.name] = np.where(unknown, np.nan, (said == y).all(1))
    return answers


def train_classifier(
    images: UInt8[np.ndarray, "N H W 3"],
    labels: Sequence[Labels],
    *,
    steps: int = 1000,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> Classifier:
    """Trains on all the pictures, with noise of random strength on each; AdamW, a short warm-up,
    cosine decay.
    """
    attributes = choose_attributes(labels)
    model = Classifier(attributes, images.shape[1], rngs=nnx.Rngs(make_key(seed)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(50, steps // 4), steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param)
    targets = encode(labels, attributes)

    @nnx.jit
    def step(model, optimizer, images, targets, key):
        strength, noise = jax.random.split(key)
        x = to_unit(images)
        x += (
            _MAX_NOISE
            * jax.random.uniform(strength, (len(x), 1, 1, 1))
            * jax.random.normal(noise, x.shape)
        )
        optimizer.update(model, nnx.grad(loss_fn)(model, x, targets))

    rng, key = np.random.default_rng(seed), make_key(seed)
    for i in tqdm(range(steps), desc="classifier", leave=False, disable=None):
        rows = rng.integers(len(images), size=batch_size)
        step(model, optimizer, images[rows], targets[rows], jax.random.fold_in(key, i))
    return model


def save_classifier(
    model: Classifier, folder: str | pathlib.Path, report: Mapping[str, Any]
) -> None:
    """Writes FOLDER/classifier.safetensors and, last, classifier.json with the attributes and
    `report`.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = {
        ".".join(map(str, path)): np.asarray(p[...])
        for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    save_tensors(flat, folder / WEIGHTS_FILE)
    attributes = [dataclasses.asdict(a) for a in model.attributes]
    write_json(
        folder / REPORT_FILE, {"image_size": model.image_size, "attributes": attributes, **report}
    )


def feature_distance(model: Classifier) -> Distance:
    """LPIPS's construction in a classifier's features, of pictures and others: no channel counts
    more than another, and the layers' mean is taken, so that it lies in 0..2. Not LPIPS: that has
    AlexNet's features and weights learned from people's answers.
    """

    @nnx.jit
    def compared(model, pictures, others):
        layers = [model.layers(to_unit(x)) for x in (pictures, others)]
        weights = [jnp.full(x.shape[-1], 1 / len(layers[0])) for x in layers[0]]
        return weighed_distance(*layers, weights, pictures.shape[1:3])

    return lambda pictures, others: tuple(map(np.asarray, compared(model, pictures, others)))


def load_classifier(folder: str | pathlib.Path) -> Classifier:
    """The classifier that `save_classifier` wrote.

    ValueError for a folder without one, or whose weights don't fit its report.
    """
    folder = pathlib.Path(folder)
    for name in (WEIGHTS_FILE, REPORT_FILE):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder}: holds no classifier (no {name}); train one with "
                "contextdiff_jax.train_classifier"
            )
    report = read_json(folder / REPORT_FILE, "a classifier's report")
    try:
        attributes = [
            Attribute(a["name"], tuple(a["values"]), a["multiple"]) for a in report["attributes"]
        ]
        report["image_size"] = int(report["image_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / REPORT_FILE}: is not a classifier's report ({error!r})"
        ) from None
    model = nnx.eval_shape(lambda: Classifier(attributes, report["image_size"], rngs=nnx.Rngs(0)))
    try:
        saved = safetensors.numpy.load_file(folder / WEIGHTS_FILE)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{folder / WEIGHTS_FILE}: truncated or not a safetensors file ({error})"
        ) from None
    flat = {}
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = ".".join(map(str, path))
        if name not in saved or saved[name].shape != param.shape:
            found = saved[name].shape if name in saved else "missing"
            raise ValueError(
                f"{folder / WEIGHTS_FILE}: {name}: {found}, {REPORT_FILE} asks for {param.shape}"
            )
        flat[path] = param.replace(jnp.asarray(saved[name]))
    nnx.update(model, nnx.from_flat_state(flat))
    return model
