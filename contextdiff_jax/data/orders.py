"""Orders of records: what a global batch holds.

They are pure functions of (seed, batch size, record numbers, batch number).

Records are counted through in shuffled epochs, one after the other without a gap, each in another
order, so that every record is seen exactly once before any is seen again. `BucketOrder` does so
within each bucket of aspect ratios and then shuffles whole batches: a bucket's records that fill no
batch in one epoch begin its next one, none is dropped. No state: any batch of any epoch is found at
once, also among millions of records.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Int, Int64

Size = tuple[int, int]  # height, width


class Share(NamedTuple):
    """Some rows of a global batch: the pictures' size (None: the source's), record numbers, their
    epochs.
    """

    size: Size | None
    records: list[int]
    epochs: list[int]


@runtime_checkable
class Order(Protocol):
    """Says which records `rows` of global batch `number` are."""

    def __call__(self, number: int, rows: Sequence[int]) -> Share: ...


class ShuffledEpochs:
    """Records 0 .. count - 1 in shuffled epochs, without end."""

    def __init__(self, count: int, seed: int):
        self.count = count
        # `repeat` reseeds the shuffle in each epoch.
        self._order = grain.MapDataset.range(count).seed(seed).shuffle().repeat()

    def __call__(self, position: int) -> tuple[int, int]:
        """(record, epoch) at `position`."""
        return int(self._order[position]), position // self.count


@dataclasses.dataclass(frozen=True)
class PlainOrder:
    """All records, of one size."""

    epochs: ShuffledEpochs
    batch_size: int

    def __call__(self, number: int, rows: Sequence[int]) -> Share:
        records, epochs = zip(
            *(self.epochs(number * self.batch_size + row) for row in rows), strict=True
        )
        return Share(None, list(records), list(epochs))


@functools.lru_cache(4)  # both loader threads, and the epochs they meet in
def _permutation(count: int, seed: int, epoch: int) -> Int64[np.ndarray, " N"]:
    return np.random.default_rng((seed, epoch)).permutation(count)


class BucketOrder:
    """Batches of one bucket each. Epoch e of the run is the batches that complete epoch e of every
    bucket.
    """

    def __init__(
        self, sizes: Sequence[Size], bucket_of: Int[np.ndarray, " N"], batch_size: int, seed: int
    ):
        """Record n is of bucket `bucket_of[n]`, of size `sizes[bucket_of[n]]`; below 0: of none."""
        self._batch_size, self._seed = batch_size, seed
        members = [np.flatnonzero(bucket_of == k).astype(np.int32) for k in range(len(sizes))]
        self._buckets = [
            (size, records, ShuffledEpochs(len(records), seed))
            for size, records in zip(sizes, members, strict=True)
            if len(records)
        ]
        self._counts = np.array([len(records) for _, records, _ in self._buckets], np.int64)

    def first_batches(self, epoch: int) -> Int64[np.ndarray, " K"]:
        """Number of batches that each bucket has given before `epoch`."""
        return epoch * self._counts // self._batch_size

    def epoch_of(self, number: int) -> int:
        """The epoch of global batch `number`."""
        epoch = number * self._batch_size // int(self._counts.sum())  # at most what is looked for
        while self.first_batches(epoch + 1).sum() <= number:
            epoch += 1
        return epoch

    def __call__(self, number: int, rows: Sequence[int]) -> Share:
        epoch = self.epoch_of(number)
        before, after = self.first_batches(epoch), self.first_batches(epoch + 1)
        place = number - int(before.sum())
        slot = int(_permutation(int((after - before).sum()), self._seed, epoch)[place])
        ends = np.cumsum(after - before)
        bucket = int(np.searchsorted(ends, slot, side="right"))
        local = int(before[bucket]) + slot - int(ends[bucket] - (after - before)[bucket])
        size, members, epochs = self._buckets[bucket]
        places = [epochs(local * self._batch_size + row) for row in rows]
        return Share(
            size, [int(members[place]) for place, _ in places], [epoch for _, epoch in places]
        )
