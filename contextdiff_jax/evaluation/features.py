"""Features of pictures in batches over the devices, and their Gaussian statistics as a stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

FeatureFn = Callable[[UInt8[Array, "B H W 3"]], Float[Array, "B D"]]


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and scatter (sum of outer products of deviations from the mean) of feature vectors, in float64.

    Deviations, not raw products: sum x x^T - n mean mean^T loses its digits where the mean is large. `merge` (Chan,
    Golub & LeVeque 1979) takes the statistics of any partition of the vectors, over batches or processes, to those
    of the whole.
    """

    count: int
    mean: Float[np.ndarray, "D"]
    scatter: Float[np.ndarray, "D D"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "N D"]) -> Moments:
        """Those of one batch."""
        features = np.asarray(features, np.float64)
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merge(self, other: Moments) -> Moments:
        """Those of both sets together."""
        count = self.count + other.count
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, self.mean + delta * (other.count / count), scatter)

    @property
    def covariance(self) -> Float[np.ndarray, "D D"]:
        """The unbiased one. ValueError for fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f"count={self.count}: a covariance needs at least 2 pictures")
        return self.scatter / (self.count - 1)


def batches(arrays: Sequence[np.ndarray], batch_size: int, label: str) -> Iterator[tuple[list[jax.Array], int]]:
    """Batches of the arrays' rows, split over the devices, each with how many of its rows are real: the last is filled
    up with copies of its first row, so that there is one shape and one compilation."""
    devices = jax.devices()
    batch_size = -(-min(batch_size, len(arrays[0])) // len(devices)) * len(devices)
    sharding = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data"))
    starts = range(0, len(arrays[0]), batch_size)
    for start in tqdm(starts, desc=label, leave=False, disable=None if len(starts) > 1 else True):
        parts = [array[start : start + batch_size] for array in arrays]
        real = len(parts[0])
        parts = [np.concatenate([part, np.repeat(part[:1], batch_size - real, axis=0)]) for part in parts]
        yield [jax.device_put(part, sharding) for part in parts], real


def extract(
    feature_fn: FeatureFn, images: Sequence[UInt8[np.ndarray, "H W 3"]] | UInt8[np.ndarray, "N H W 3"],
    batch_size: int = 64, label: str = "features",
) -> Float[np.ndarray, "N D"]:
    """float32 features of all pictures, in batches over the devices. ValueError if there are none."""
    if not len(images):
        raise ValueError("images: the list is empty")
    parts = []
    for (batch,), real in batches((images,), batch_size, label):
        parts.append(np.asarray(feature_fn(batch), np.float32)[:real])
    return np.concatenate(parts)
