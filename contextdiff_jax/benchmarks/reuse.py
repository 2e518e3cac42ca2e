"""What a run's pictures lose and gain by fewer evaluations of the network: by reuse of its coarser
levels, and by fewer steps.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics

import numpy as np

from contextdiff_jax.benchmarks import paired
from contextdiff_jax.benchmarks.data import Result
from contextdiff_jax.benchmarks.paired import Contestant
from contextdiff_jax.generation import Generator
from contextdiff_jax.parallel.mesh import local_mesh
from contextdiff_jax.run import load_run
from contextdiff_jax.training.loop import default_prompts

VARIANTS = (
    (60, 1),
    (60, 2),
    (60, 3),
    (60, 5),
    (40, 1),
    (30, 1),
    (20, 1),
)  # steps, reuse; the first is what the others miss


def run(workdir: str, rounds: int) -> Result:
    """Of a run's DDIM samples for its prompts: seconds, in turns, and the mean difference to 60
    whole steps from the same noise, in shares of the range. Raises ValueError for a folder without
    a run.
    """
    trained = load_run(workdir)
    settings = trained.settings
    prompts = list(settings.sample.prompts) or default_prompts(settings.data)
    contestants, images = [], {}
    for steps, reuse in VARIANTS:
        options = dataclasses.replace(
            settings.sample, sampler="ddim", eta=0.0, steps=steps, reuse=reuse
        )
        generator = Generator(settings, trained.tokenizer, options, mesh=local_mesh())
        call = functools.partial(generator, trained.params, prompts, settings.seed)
        name = f"{steps} steps, reuse {reuse}"
        contestants.append(Contestant(name, call))
        images[name] = call().astype(np.int32)
    times, whole = paired.measure(contestants, rounds), contestants[0].name
    rows = [
        {
            "name": name,
            "seconds": statistics.median(times[name].wall),
            "speedup": paired.ratio(times[whole].wall, times[name].wall).value,
            "error": float(np.abs(images[name] - images[whole]).mean() / 255),
            "pictures": len(prompts),
        }
        for name in images
    ]
    lines = [
        f"{len(prompts)} pictures of step {trained.step} of {workdir}",
        f"{'':22} {'seconds':>8} {'faster':>8} {'error':>8}",
    ]
    lines += [
        f"{row['name']:22} {row['seconds']:8.2f} {row['speedup']:7.2f}x {row['error']:8.4f}"
        for row in rows
    ]
    return Result("\n".join(lines), rows)
