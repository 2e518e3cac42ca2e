"""Pictures from a Stable Diffusion 3 or 3.5 folder against diffusers'."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from same_pictures import PROMPTS, assert_same_pictures, saved
from torch_models import nchw, normal
from torch_sd3 import MEDIUM, PARTS, stable_diffusion_3

from contextdiff_jax import Pipeline

T5_LENGTH = 12
KINDS = {
    "3": {},
    "3.5 medium": dict(transformer=MEDIUM),
    "3.5 large": dict(transformer=dict(qk_norm="rms_norm")),
    "without T5": dict(absent=PARTS[2:], transformer=dict(num_layers=3)),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """kind -> (diffusers' pipeline, its folder)."""
    made = {}

    def pair(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("sd3")
            made[kind] = saved(lambda words: stable_diffusion_3(words, **KINDS[kind]), folder)
        return made[kind]

    return pair


def check(pair, size=(8, 8), negative=None, **options):
    """The pictures of both pipelines from the same noise are the same."""
    pipe, folder = pair
    latents = normal(len(PROMPTS), *size, 16)
    with torch.no_grad():
        expected = pipe(
            PROMPTS,
            latents=nchw(latents),
            height=2 * size[0],
            width=2 * size[1],
            output_type="np",
            negative_prompt=None if negative is None else [negative] * len(PROMPTS),
            max_sequence_length=T5_LENGTH,
            num_inference_steps=options.get("steps", 28),
            guidance_scale=options.get("guidance", 7.0),
        ).images
    pipeline = Pipeline.open(folder, max_sequence_length=T5_LENGTH)
    size = (2 * size[0], 2 * size[1])
    images = pipeline.text_to_image(PROMPTS, noise=latents, size=size, negative=negative, **options)
    assert_same_pictures(images, expected)
    return expected


@pytest.mark.parametrize("kind", ["3.5 medium", "without T5"])
def test_pictures_of_20_steps_are_diffusers(pairs, kind):
    check(pairs(kind), steps=20, guidance=4.5, negative="blue", size=(8, 12))


@pytest.mark.slow  # pytest -m slow tests/test_pipeline_sd3.py -k 28
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_28_steps_are_diffusers(pairs, kind):
    guided = check(pairs(kind))
    again = check(pairs(kind), guidance=4.5, steps=20)
    assert np.abs(guided - again).max() > 0.02
    check(pairs(kind), guidance=1.0, steps=20)
