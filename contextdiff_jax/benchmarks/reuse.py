"""What a run's pictures lose and gain by fewer evaluations of the network: by reuse of its coarser
levels, and by fewer steps.
"""

from __future__ import annotations

import functools
import statistics

import numpy as np

from contextdiff_jax.benchmarks import paired
from contextdiff_jax.benchmarks.data import Result
from contextdiff_jax.benchmarks.paired import Contestant
from contextdiff_jax.inference import Pipeline
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
    lines = [
        f"{len(prompts)} pictures of {pipeline.opened.source}",
        f"{'':22} {'seconds':>8} {'faster':>8} {'error':>8}",
    ]
    lines += [
        f"{row['name']:22} {row['seconds']:8.2f} {row['speedup']:7.2f}x {row['error']:8.4f}"
        for row in rows
    ]
    return Result("\n".join(lines), rows)
