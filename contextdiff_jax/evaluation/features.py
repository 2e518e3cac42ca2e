"""Features of pictures in batches over the devices, and their Gaussian statistics as a stream."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped
from tqdm import tqdm

from contextdiff_jax.parallel.mesh import local_mesh, replicate

FeatureFn = Callable[[Shaped[Array, "B ..."]], Float[Array, "B D"]]
_BLOCK = 4096  # rows in float64 at once


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and scatter (sum of outer products of deviations from the mean) of feature
    vectors, in float64.

    Deviations, not raw products: sum x x^T - n mean mean^T loses its digits where the mean is
    large. `merge` (Chan, Golub & LeVeque 1979) takes the statistics of any partition of the
    vectors, over batches or processes, to those of the whole.
    """

    count: int
    mean: Float[np.ndarray, "D"]
    scatter: Float[np.ndarray, "D D"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "N D"]) -> Moments:
        """The moments of all rows, made block by block.

        Of 50,000 rows of 2048, copies in float64 would take 1.6 GB. ValueError if there are none.
        """
        if not len(features):
            raise ValueError("features: there are none")
        check_finite(features=features)
        starts = range(0, len(features), _BLOCK)
        return functools.reduce(
            cls.merge, (cls._of_block(features[start : start + _BLOCK]) for start in starts)
        )

    @classmethod
    def _of_block(cls, features: Float[np.ndarray, "N D"]) -> Moments:
        features = np.asarray(features, np.float64)
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets together."""
        count = self.count + other.count
        delta = other.mean - self.mean
        scatter = (
            self.scatter
            + other.scatter
            + np.outer(delta, delta) * (self.count * other.count / count)
        )
        return Moments(count, self.mean + delta * (other.count / count), scatter)

    @property
    def covariance(self) -> Float[np.ndarray, "D D"]:
        """The unbiased one. ValueError for fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f"count={self.count}: a covariance needs at least 2 pictures")
        return self.scatter / (self.count - 1)


@runtime_checkable
class Rows(Protocol):
    """Arrays of one shape, by slices: an array, or what makes it when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> Shaped[np.ndarray, "N ..."]: ...


def check_finite(**sets: Float[np.ndarray, "..."]) -> None:
    """Raises ValueError for the first set, by its name, with a row that is not finite: distances
    and means would be numbers that say nothing.
    """
    for name, rows in sets.items():
        rows = np.asarray(rows)
        finite = np.isfinite(rows).reshape(len(rows), -1).all(1)
        if not finite.all():
            raise ValueError(
                f"{name}: {np.count_nonzero(~finite)} of {len(rows)} rows hold values that are "
                f"not finite, the first is row {finite.argmin()}; look at its picture and at the "
                "network's weights"
            )


def batch_sharding() -> NamedSharding:
    """A batch's rows over the devices of this process; another process has a batch of its own."""
    return NamedSharding(local_mesh(), PartitionSpec("data"))


def make_feature_fn(network: nnx.Module, method: Callable[[Any, Array], Array]) -> FeatureFn:
    """`method(network, batch)`, compiled, with the parameters on every device of this process."""
    graph, params = nnx.split(network)
    params = replicate(params)
    compiled = jax.jit(lambda params, batch: method(nnx.merge(graph, params), batch))
    return lambda batch: compiled(params, batch)


def batches(
    arrays: Sequence[Rows], batch_size: int, label: str
) -> Iterator[tuple[list[jax.Array], int]]:
    """Batches of the arrays' rows, split over this process's devices, each with how many of its
    rows are real: the last is filled up with copies of its first row, so that there is one shape
    and one compilation.
    """
    sharding = batch_sharding()
    ways = sharding.num_devices
    batch_size = -(-min(batch_size, len(arrays[0])) // ways) * ways
    starts = range(0, len(arrays[0]), batch_size)
    for start in tqdm(starts, desc=label, leave=False, disable=None if len(starts) > 1 else True):
        parts = [array[start : start + batch_size] for array in arrays]
        real = len(parts[0])
        parts = [
            np.concatenate([part, np.repeat(part[:1], batch_size - real, axis=0)]) for part in parts
        ]
        yield [jax.device_put(part, sharding) for part in parts], real


def extract(
    feature_fn: FeatureFn,
    rows: Rows,
    batch_size: int = 64,
    label: str = "features",
) -> Float[np.ndarray, "N D"]:
    """float32 features of all rows (pictures, or what else is read when sliced), in batches over
    the devices. ValueError if there are none, or one is not finite.
    """
    if not len(rows):
        raise ValueError("images: the list is empty")
    parts = []
    for (batch,), real in batches((rows,), batch_size, label):
        parts.append(np.asarray(feature_fn(batch), np.float32)[:real])
    features = np.concatenate(parts)
    check_finite(**{label: features})
    return features
