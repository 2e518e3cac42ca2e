"""What the devices send each other in a second, by the collectives of a sharded step."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from contextdiff_jax.benchmarks import paired
from contextdiff_jax.benchmarks.loading import Result

_AXIS = "devices"


class Collective(NamedTuple):
    """`run(x)` of a device's part; `sent`: bytes that a device sends, of its part's and N."""

    run: Callable[[jax.Array], jax.Array]
    sent: Callable[[int, int], float]


def _shift(x: jax.Array) -> jax.Array:
    N = jax.lax.axis_size(_AXIS)
    return jax.lax.ppermute(x, _AXIS, [(i, (i + 1) % N) for i in range(N)])


# In a ring of N devices, the best that each can do (jax-ml.github.io/scaling-book, chapter 3).
COLLECTIVES = {
    "all-gather": Collective(
        lambda x: jax.lax.all_gather(x, _AXIS, tiled=True), lambda part, N: part * (N - 1)
    ),
    "reduce-scatter": Collective(
        lambda x: jax.lax.psum_scatter(x, _AXIS, tiled=True), lambda part, N: part * (N - 1) / N
    ),
    "all-reduce": Collective(
        lambda x: jax.lax.psum(x, _AXIS), lambda part, N: 2 * part * (N - 1) / N
    ),
    "permute": Collective(_shift, lambda part, N: part),
}


def run(mebibytes: int = 64, rounds: int = 5) -> Result:
    """A row a collective, of `mebibytes` a device in float32: seconds, and bytes that a device
    sends in a second. Processes of a mesh run it together.

    Raises ValueError for one device.
    """
    devices = np.array(jax.devices())
    N = len(devices)
    if N == 1:
        raise ValueError("--mode=collectives: there is one device, and nothing to send")
    mesh = Mesh(devices, (_AXIS,))
    count = mebibytes * 2**18 // N * N  # a multiple of N, for the scattered sum
    placed = NamedSharding(mesh, PartitionSpec(_AXIS))
    x = jax.jit(lambda: jnp.ones((N * count,)), out_shardings=placed)()
    rows = []
    for name, collective in COLLECTIVES.items():
        program = jax.jit(
            jax.shard_map(
                collective.run,
                mesh=mesh,
                in_specs=PartitionSpec(_AXIS),
                out_specs=PartitionSpec(_AXIS),
                check_vma=False,
            )
        )
        contestant = paired.Contestant.of(name, program, x)
        seconds = statistics.median(paired.measure([contestant], rounds)[name].wall)
        sent = collective.sent(4 * count, N)
        rows.append(
            {
                "collective": name,
                "devices": N,
                "mebibytes": mebibytes,
                "seconds": seconds,
                "bytes_per_second": sent / seconds,
            }
        )
    lines = [
        f"{'collective':<18}{'ms':>10}{'GB/s a device':>16}   {N} devices, {mebibytes} MiB each"
    ]
    for row in rows:
        ms, rate = 1e3 * row["seconds"], row["bytes_per_second"] / 1e9
        lines.append(f"{row['collective']:<18}{ms:>10.3f}{rate:>16.2f}")
    return Result("\n".join(lines), rows)
