"""A time grid optimised for an opened model: what `sample --optimise_spacing` prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from contextdiff_jax.diffusion.optimised import local_errors, optimised_grid
from contextdiff_jax.inference.pipeline import Pipeline, method_of
from contextdiff_jax.inference.request import Request
from contextdiff_jax.inference.sampling import Start, encode, guided
from contextdiff_jax.runtime.keys import make_key


def optimised_spacing(
    pipeline: Pipeline,
    prompts: Sequence[str],
    num_steps: int,
    *,
    seed: int = 0,
    negative: str | None = None,
    size: tuple[int, int] | None = None,
    **options: Any,
) -> tuple[float, ...]:
    """The times of the `num_steps` of this model's steps (`steps`, `spacing` in `options`) whose
    local errors for these captions, under the options' guidance, sum to the least: a list that
    `spacing` takes. `seed`, `negative`, `size`: as `text_to_image` has them.

    Raises ValueError for more steps than there are to choose from.
    """
    chosen, opened = pipeline.options(**options), pipeline.opened
    # DDIM's times: of a folder they are indices, where a solver's may lie between two
    steps = opened.find_steps(dataclasses.replace(chosen, sampler="ddim"))
    if not 1 <= num_steps <= len(steps.timesteps):
        raise ValueError(
            f"optimise_spacing={num_steps}: must lie in 1..{len(steps.timesteps)}, the steps to "
            "choose from"
        )
    request = Request(prompts=prompts, negative=negative, seed=seed)
    process, shape, method = opened.process, pipeline.latent_shape(size), method_of(chosen)
    scale = max(chosen.guidance, opened.least_guidance)

    @jax.jit
    def measure(weights, key, text, steps):
        model = opened.build(weights)
        texts = encode(model, text)
        schedule = steps.schedule(process.schedule)
        noise = jax.random.normal(jax.random.wrap_key_data(key), (len(prompts), *shape))
        start = Start.of(model, schedule, process.shift, method, texts[0], noise, steps, None)
        read = steps.reader(schedule)
        denoise = guided(model, process, method, texts, scale, schedule, read)
        return local_errors(denoise, start.x, schedule, steps.timesteps, process.shift)

    text = pipeline.encode(request, np.arange(len(prompts)))
    key = np.asarray(jax.random.key_data(make_key(seed)))
    best = optimised_grid(measure(opened.weights, key, text, steps), num_steps)
    return tuple(np.asarray(steps.timesteps)[list(best)].tolist())
