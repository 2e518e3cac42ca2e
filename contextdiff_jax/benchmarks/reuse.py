"""Time and error of a run's pictures with fewer evaluations of the network.

By reuse of its coarser levels, and by fewer steps.
"""

from __future__ import annotations

import functools
import statistics

import numpy as np

from contextdiff_jax.benchmarks import paired
from contextdiff_jax.benchmarks.loading import Result
from contextdiff_jax.benchmarks.paired import Contestant
from contextdiff_jax.inference import Pipeline
from contextdiff_jax.runtime.tables import aligned
from contextdiff_jax.training.reporter import default_prompts

# (steps, reuse); the first is the one that the others are compared with.
VARIANTS = ((60, 1), (60, 2), (60, 3), (60, 5), (40, 1), (30, 1), (20, 1))


def run(workdir: str, rounds: int) -> Result:
    """Time a run's DDIM samples for its prompts, in turns, and compare them with 60 whole steps.

    `error`: mean difference, from the same noise, in shares of the range. ValueError for a folder
    without a run.
    """
    pipeline = Pipeline.open(workdir)
    settings = pipeline.opened.identity
    prompts = list(settings.sample.prompts) or default_prompts(settings.data)
    contestants, images = [], {}
    sample = functools.partial(
        pipeline.text_to_image, prompts, seed=settings.seed, sampler="ddim", eta=0.0
    )
    for steps, reuse in VARIANTS:
        call = functools.partial(sample, steps=steps, reuse=reuse)
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
    entries = [
        [row["name"], f"{row['seconds']:.2f}", f"{row['speedup']:.2f}x", f"{row['error']:.4f}"]
        for row in rows
    ]
    title = f"{len(prompts)} pictures of {pipeline.opened.source}"
    return Result(f"{title}\n{aligned(['', 'seconds', 'faster', 'error'], entries)}", rows)
