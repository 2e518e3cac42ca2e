"""Where a program's time goes on its device, kernel by kernel, of JAX's own profile."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

CALLS = 3  # that are recorded
_SHOWN = 15  # kinds of kernels


class Kernels(NamedTuple):
    """Of a call: seconds from the first kernel's start to the last one's end, those in which none
    ran, and a row for each kernel: name, what it computes, seconds, times.
    """

    seconds: float
    idle: float
    rows: list[dict[str, Any]]


def record(call: Callable[[], Any], folder: str | pathlib.Path) -> pathlib.Path:
    """Profile `CALLS` calls into `folder`; the file that has the events."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder, profiler_options=options):
        for _ in range(CALLS):
            call()
    return max(pathlib.Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)


def summed(recorded: bytes) -> Kernels:
    """Sum the events of a recorded profile. ValueError where no device has any: a CPU's profile
    knows threads alone.
    """
    profile = jax.profiler.ProfileData.from_serialized_xspace(recorded)
    planes = [plane for plane in profile.planes if plane.name.startswith("/device:")]
    spans, sums = [], collections.defaultdict(lambda: [0.0, 0])
    for plane in planes:
        for line in plane.lines:
            if not line.name.startswith(("Stream", "XLA Ops")):
                continue
            for event in line.events:
                stats = dict(event.stats)
                spans.append((event.start_ns, event.end_ns))
                found = sums[event.name, str(stats.get("hlo_op", "")), str(stats.get("tf_op", ""))]
                found[0] += event.duration_ns / 1e9 / CALLS
                found[1] += 1
    if not spans:
        raise ValueError("no device has kernels in this profile: an accelerator's does")
    rows = [
        {"kernel": kernel, "operation": hlo, "of": of, "seconds": seconds, "times": times / CALLS}
        for (kernel, hlo, of), (seconds, times) in sums.items()
    ]
    rows.sort(key=lambda row: -row["seconds"])
    return Kernels(*_covered(spans), rows)


def _covered(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """Seconds a call from begin to end, and those of them in which nothing ran."""
    end, busy = 0.0, 0.0
    for start, stop in sorted(spans):
        busy += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    whole = end - min(start for start, _ in spans)
    return whole / 1e9 / CALLS, (whole - busy) / 1e9 / CALLS


def table(kernels: Kernels) -> str:
    """The kinds of kernels that take most, one name for all sizes of a kind."""
    kinds = collections.Counter()
    for row in kernels.rows:
        kinds[row["kernel"].split("(")[0][:70]] += row["seconds"]
    total = sum(kinds.values())
    lines = [
        f"a call: {1e3 * kernels.seconds:.1f} ms, {kernels.idle / kernels.seconds:.0%} of them idle"
    ]
    lines += [
        f"{seconds / total:>6.1%} {1e3 * seconds:>9.2f} ms  {name}"
        for name, seconds in kinds.most_common(_SHOWN)
    ]
    return "\n".join(lines)
