"""Records shared out over the processes of a job, and their results brought together exactly.

Every process runs the same program on its share and then has everybody's rows, in the records'
order: means, distances and bootstraps are then those of one process. A job of one process is the
same code; its share is everything.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils


def share(size: int, index: int | None = None, count: int | None = None) -> range:
    """The records of process `index` of `count` (this one's by default): neighbours, so that the
    shares in the order of the processes are the records in theirs. Sizes differ by one at most.
    """
    index = jax.process_index() if index is None else index
    count = jax.process_count() if count is None else count
    return range(size * index // count, size * (index + 1) // count)


def gather(arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Every process's named arrays, in the order of the processes, on all of them. All processes
    must call it.

    They travel as bytes, so that names and shapes may differ and float64 stays what it is: JAX
    would make it float32.
    """
    if jax.process_count() == 1:
        return [dict(arrays)]
    file = io.BytesIO()
    np.savez(file, **arrays)
    data = np.frombuffer(file.getvalue(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.uint32(len(data))))
    padded = multihost_utils.process_allgather(np.pad(data, (0, sizes.max() - len(data))))
    return [
        dict(np.load(io.BytesIO(row[:size].tobytes())))
        for row, size in zip(padded, sizes, strict=True)
    ]


def join(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The parts' rows in one array a name; nan in the rows of a part that lacks the name, as of an
    attribute that none of its captions asks for.
    """
    names = sorted(set().union(*parts))
    sizes = [len(next(iter(part.values()))) for part in parts]
    return {
        name: np.concatenate(
            [part.get(name, np.full(size, np.nan)) for part, size in zip(parts, sizes, strict=True)]
        )
        for name in names
    }


def gather_rows(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows of all processes' shares, in the records' order."""
    return join(gather(rows))
