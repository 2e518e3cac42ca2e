"""Contestants that do the same work in turns, in one process on the same cores, and what is said of
their times.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

# Of the square matrices whose product is the machine's peak.
_PEAK_SIDE, _ACCELERATORS_SIDE = 1024, 8192
# Numbers in the array whose copy is the machine's bandwidth: more than its caches hold.
_COPIED = 2**26
_CHAINED = 10
_WARM_UP = 3  # rounds that don't count: the process's heap grows in the first ones, page by page


class Contestant(NamedTuple):
    """`call` does the work once and waits for its end. `peak_bytes(call)`: the most memory that a
    call takes on an accelerator, None where it has none of its own. `times`: of one that was
    measured before, and isn't called any more.
    """

    name: str
    call: Callable[[], Any]
    compile_seconds: float = 0.0
    peak_bytes: Callable[[Callable[[], Any]], int | None] | None = None
    times: Times | None = None

    @classmethod
    def of(
        cls, name: str, program: Callable[..., Any], *arguments: Any, calls: int = 1
    ) -> Contestant:
        """A program of JAX's on the same arguments, `calls` of them at once: a device begins the
        next without waiting for this process.
        """

        def call() -> None:
            for _ in range(calls):
                result = program(*arguments)
            jax.block_until_ready(result)

        return cls(name, call)


class Times(NamedTuple):
    """Seconds of each round, on the wall and of this process's threads together."""

    wall: list[float]
    cpu: list[float]


class Ratio(NamedTuple):
    """A peer's seconds / ours: median over the rounds, and their quartiles. Above 1 is ahead."""

    value: float
    low: float
    high: float


def measure(contestants: Sequence[Contestant], rounds: int) -> dict[str, Times]:
    """Each contestant's `rounds`, in turns whose order is reversed every other round, after
    `_WARM_UP` more.
    """
    before = {one.name: one.times for one in contestants if one.times is not None}
    contestants = [one for one in contestants if one.times is None]
    times = {contestant.name: Times([], []) for contestant in contestants}
    for number in range(_WARM_UP + rounds):
        for contestant in contestants if number % 2 else contestants[::-1]:
            wall, cpu = time.perf_counter(), time.process_time()
            contestant.call()
            times[contestant.name].wall.append(time.perf_counter() - wall)
            times[contestant.name].cpu.append(time.process_time() - cpu)
    found = {name: Times(*(seconds[_WARM_UP:] for seconds in both)) for name, both in times.items()}
    return found | before


def ratio(peer: Sequence[float], ours: Sequence[float]) -> Ratio:
    """Compare round by round: one that was slow for both counts as any other."""
    low, value, high = np.percentile(np.divide(peer, ours), (25, 50, 75))
    return Ratio(float(value), float(low), float(high))


def matmul_peak(repeats: int = 10, dtype: DTypeLike = jnp.float32) -> float:
    """FLOP/s of the fastest of some matrix products of that type."""
    side = _PEAK_SIDE if jax.default_backend() == "cpu" else _ACCELERATORS_SIDE
    # Not of ones: a GPU's clock is higher where few bits change.
    a = jax.random.normal(jax.random.key(0), (side, side), dtype) / side**0.5
    return 2 * side**3 / _fastest(lambda x, a: a @ x, repeats, a, a)


def memory_bandwidth(repeats: int = 10) -> float:
    """Bytes a second, read and written, of the fastest of some copies."""
    x = jnp.ones(_COPIED, jnp.float32)
    return 2 * x.nbytes / _fastest(lambda x: 0.5 * x + 1, repeats, x)


def _fastest(function: Callable[..., Array], repeats: int, x: Array, *rest: Array) -> float:
    """Seconds of a call `function(x, *rest)`; on an accelerator in a program of `_CHAINED`, one on
    the other's result as x, for starting a GPU's program and hearing of its end takes 0.2 ms.
    """
    count = 1 if jax.default_backend() == "cpu" else _CHAINED

    @jax.jit
    def chained(x: Array, *rest: Array) -> Array:
        return jax.lax.fori_loop(0, count, lambda _, x: function(x, *rest), x)

    contestant = Contestant.of("function", chained, x, *rest)
    return min(measure([contestant], repeats)["function"].wall) / count


def extra_memory(call: Callable[[], Any]) -> int | None:
    """Bytes that this process grew by, at the most, during a call; None where the kernel doesn't
    tell (not Linux).
    """
    reset, status = pathlib.Path("/proc/self/clear_refs"), pathlib.Path("/proc/self/status")
    try:
        reset.write_text("5")  # the high-water mark falls to what is resident now
        before = _status(status, "VmRSS")
        call()
        return max(_status(status, "VmHWM") - before, 0)
    except OSError:
        return None


def _status(path: pathlib.Path, field: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
