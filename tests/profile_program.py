"""Four steps with a `Profiler`: python profile_program.py WORKDIR [FIRST LAST]. Prints, as JSON,
where the trace was there after a step, and its events' names.
"""

from __future__ import annotations

import json
import pathlib
import sys

import jax
import jax.numpy as jnp

from contextdiff_jax.training.profiling import Profiler


def main(workdir: pathlib.Path, steps: tuple[int, ...]) -> None:
    profiler, step = Profiler(workdir, steps), jax.jit(lambda x: jnp.sin(x) + 1)
    seen, x = {}, jnp.zeros(4)
    for number in range(1, 5):
        with profiler.step(number):
            with jax.profiler.TraceAnnotation(f"step number {number}"):
                x = step(x)
        profiler.done(number, x)
        seen[number] = (workdir / "profile").exists()
    profiler.close()
    names = set()
    for file in workdir.glob("profile/process_0/plugins/profile/*/*.xplane.pb"):
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        names |= {event.name for p in planes for line in p.lines for event in line.events}
    print(json.dumps({"seen": seen, "names": sorted(names)}))


main(pathlib.Path(sys.argv[1]), tuple(map(int, sys.argv[2:])))
