"""Loading, from a source to batches, by Grain.

It shuffles, shards by process, prefetches with workers, and resumes exactly.

Which records batch number b of a run holds is a pure function of (seed, batch size, records, b):
see `orders`. Process p of P gives out the p-th of P equal blocks of it, or the `rows` that the mesh
gives to its devices. So the global batches, and their order, do not depend on the numbers of
processes and workers, also when these change on the way, and the state to save is one number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags
from jaxtyping import UInt8

from contextdiff_jax.data.buckets import check_buckets, nearest_bucket
from contextdiff_jax.data.folder_tokenizer import CutCaptions
from contextdiff_jax.data.orders import BucketOrder, Order, PlainOrder, ShuffledEpochs, Size
from contextdiff_jax.data.records import PictureSource
from contextdiff_jax.data.tokenizer import AnyTokenizer

Batch = dict[str, Any]
# (record number, reason) of the records that turned out to be broken: from workers to the loader
_BROKEN = "broken"
_PIECES = 1  # of the randomness of a record the part that places its piece
_CUT = "cut"  # the words that each caption loses, likewise
# What schedulers and terminals send to all processes of a command: the main one saves and stops.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@runtime_checkable
class RandomAccessSource(Protocol):
    """Records by number: dicts with `image` uint8 [H, W, 3] and `caption` str. Picklable."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A square of `size` pixels a side of each picture: the centre, or with `random` a place by
    (seed, epoch, record), every one with the same chance.
    """

    size: int
    random: bool
    seed: int = 0

    def __call__(
        self, image: UInt8[np.ndarray, "H W 3"], index: int, epoch: int
    ) -> UInt8[np.ndarray, "S S 3"]:
        free = [side - self.size + 1 for side in image.shape[:2]]
        if min(free) < 1:
            raise ValueError(
                f"data.crop_size={self.size}: a picture has {image.shape[0]} x {image.shape[1]}"
            )
        top, left = (count // 2 for count in free)
        if self.random:  # the fourth number: records draw with three (`PictureSource`)
            top, left = np.random.default_rng((self.seed, epoch, index, _PIECES)).integers(free)
        return image[top : top + self.size, left : left + self.size]


@dataclasses.dataclass(frozen=True)
class _LoadBatch:
    """Batch number -> this process's block of that batch. Travels to the workers, so it is
    picklable.
    """

    source: RandomAccessSource
    order: Order
    rows: Sequence[int]  # this process's part of each batch
    tokenizer: AnyTokenizer | None
    max_length: int
    pieces: Pieces | None = None

    def __call__(self, number: int) -> Batch:
        size, indices, epochs = self.order(int(number), self.rows)
        if isinstance(self.source, PictureSource):
            records = [
                self.source.record(index, epoch, size)
                for index, epoch in zip(indices, epochs, strict=True)
            ]
        else:
            records = [self.source[index] for index in indices]
        if self.pieces is not None:
            records = [
                record | {"image": self.pieces(record["image"], index, epoch)}
                for record, index, epoch in zip(records, indices, epochs, strict=True)
            ]
        captions = [record["caption"] for record in records]
        arrays = [name for name, value in records[0].items() if isinstance(value, np.ndarray)]
        batch: Batch = {name: np.stack([record[name] for record in records]) for name in arrays}
        batch["caption"] = captions
        if self.tokenizer is not None and "token_ids" not in batch:
            batch["token_ids"], batch["token_mask"], batch[_CUT] = self.tokenizer.encode_and_cut(
                captions, self.max_length
            )
        if isinstance(self.source, PictureSource):
            batch[_BROKEN] = self.source.broken.drain()
        return batch


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    old = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # when it starts it unblocks them
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _follow_parent(*_: int) -> None:
    """Lets a worker be ended only by the process it works for, also by that one's own sudden end.

    (Linux's PR_SET_PDEATHSIG follows a thread, and Grain's end earlier.)
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()


class Loader(Iterator[Batch]):
    """An endless iterator over batches whose place can be saved and restored. Made by
    `make_loader`.
    """

    def __init__(
        self,
        load: _LoadBatch,
        identity: dict[str, Any],
        num_workers: int,
        prefetch: int,
        num_threads: int,
    ):
        self._load = load
        self._identity = identity
        self._num_workers = num_workers
        self._prefetch = prefetch
        self._num_threads = num_threads
        self._next_batch = 0
        self._iterator: grain.DatasetIterator | None = None
        self._cut = CutCaptions(load.max_length)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        try:
            batch = next(self._iterator) if self._iterator is not None else self._first()
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise ChildProcessError(
                f"data.num_workers={self._num_workers}: a worker was killed, maybe for want of "
                f"memory: {error}"
            ) from error
        self._next_batch += 1
        # Each worker knows only of its own: count them together.
        for index, reason in batch.pop(_BROKEN, ()):
            self._load.source.broken.replaced(index, reason)
        self._cut.add(batch["caption"], batch.pop(_CUT, ()))
        if self._num_workers:  # workers hand over views of shared memory, which ends with them
            batch = {k: np.array(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}
        return batch

    def _first(self) -> Batch:
        # Workers are born deaf to the signals that tell a whole process group to stop; the mask is
        # inherited, while what a worker does itself would come seconds later.
        with _signals_blocked() if self._num_workers else contextlib.nullcontext():
            self._iterator = self._start()
            return next(self._iterator)

    def _start(self) -> grain.DatasetIterator:
        # Grain's own buffer default is 500 elements; here an element is a whole batch.
        options = grain.ReadOptions(
            num_threads=self._num_threads,
            prefetch_buffer_size=self._prefetch if self._num_threads else 0,
        )
        numbers = grain.MapDataset.range(self._next_batch, sys.maxsize)
        batches = numbers.map(self._load).to_iter_dataset(options)
        if self._num_workers:
            # Grain asks absl flags, which only an absl app has parsed.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self._num_workers, per_worker_buffer_size=self._prefetch
                ),
                worker_init_fn=_follow_parent,
            )
        return iter(batches)

    @property
    def num_cut(self) -> int:
        """Number of captions given out so far that were longer than `max_length` tokens."""
        return self._cut.count

    @property
    def num_broken(self) -> int:
        """Number of broken records known so far, of all workers of this process."""
        return getattr(self._load.source, "num_broken", 0)

    def get_state(self) -> dict[str, Any]:
        """The place in the data: JSON-able, and the same in every process, whatever the number of
        workers.
        """
        return {**self._identity, "next_batch": self._next_batch}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from where `get_state` was called.

        Raises:
            ValueError: if the state is of a loader with another seed, batch size, buckets or number
                of records.
        """
        for name in sorted(self._identity.keys() | state.keys() - {"next_batch"}):
            value = self._identity.get(name)
            if state.get(name) != value:
                raise ValueError(
                    f"data.{name}={value}: the saved data state has {name}={state.get(name)}"
                )
        self.close()
        self._next_batch, self._cut.count = int(state["next_batch"]), 0

    def close(self) -> None:
        """Stops workers and prefetching; the next `next` starts them again where it stopped."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def make_loader(
    source: RandomAccessSource,
    *,
    batch_size: int,
    seed: int = 0,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    rows: np.ndarray | None = None,
    tokenizer: AnyTokenizer | None = None,
    max_length: int = 32,
    prefetch: int = 2,
    num_threads: int = 2,  # pictures decode outside of the GIL, all else does not
    buckets: Sequence[Size] = (),
    pieces: Pieces | None = None,
) -> Loader:
    """Endless shuffled batches of this process's share.

    With B = batch_size // process_count, a batch has the records' arrays, stacked (`image` uint8
    [B, H, W, 3]; a cache's moments and tokens), `caption` (list of B str) and, with a tokenizer,
    `token_ids` int32 [B, max_length] and `token_mask` bool [B, max_length]. With buckets, H and W
    are one of them, the same in all processes, and change from batch to batch.

    Args:
        source: where the records are.
        batch_size: the *global* batch size, over all processes.
        seed: of the order of the records.
        num_workers: loader processes; 0 loads in threads of this process.
        process_index: which block of each global batch to give out (`jax.process_index()`).
        process_count: number of blocks (`jax.process_count()`).
        rows: the examples of each global batch to give out, instead of a block (`mesh.Feed.rows`).
        tokenizer: encodes the captions; None leaves them as text only.
        max_length: tokens a caption.
        prefetch: batches kept ready, by each worker.
        num_threads: of each process that loads; 0: a batch is loaded when it is asked for, none
            ahead.
        buckets: sizes (height, width): each picture is given out in that whose aspect ratio is
            nearest to its own.
        pieces: what is given out of each picture; None: all of it.

    Raises:
        ValueError: for a batch that the processes do not divide, an empty source, or numbers out of
            range.
    """
    local = _share_of(batch_size, process_index, process_count)
    if num_workers < 0:
        raise ValueError(f"data.num_workers={num_workers}: must not be negative")
    if prefetch < 1:
        raise ValueError(f"prefetch={prefetch}: must be at least 1")
    if not len(source):
        raise ValueError("data.source: holds no records")
    identity = {"seed": seed, "batch_size": batch_size, "num_records": len(source)}
    if buckets:
        identity["buckets"] = [list(size) for size in buckets]
    load = _LoadBatch(
        source=source,
        order=_make_order(source, batch_size, seed, buckets),
        rows=local if rows is None else rows.tolist(),
        tokenizer=tokenizer,
        max_length=max_length,
        pieces=pieces,
    )
    return Loader(load, identity, num_workers, prefetch, num_threads)


def _share_of(batch_size: int, process_index: int, process_count: int) -> range:
    """The process's examples of a global batch, a block; ValueError where there is no such one."""
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size}: must be a positive multiple of {process_count} processes"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index}: must lie in 0..{process_count - 1}")
    size = batch_size // process_count
    return range(process_index * size, (process_index + 1) * size)


def _make_order(
    source: RandomAccessSource, batch_size: int, seed: int, buckets: Sequence[Size]
) -> Order:
    if not buckets:
        return PlainOrder(ShuffledEpochs(len(source), seed), batch_size)
    if not isinstance(source, PictureSource):
        raise ValueError(
            f"data.buckets={tuple(buckets)}: this data.source has pictures of one size; must be ()"
        )
    sizes = check_buckets(buckets)
    bucket_of = nearest_bucket(source.picture_sizes(), sizes)
    if not (bucket_of >= 0).any():
        raise ValueError("data.source: holds no picture of a readable size")
    return BucketOrder(sizes, bucket_of, batch_size, seed)
