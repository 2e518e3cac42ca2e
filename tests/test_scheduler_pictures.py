"""A Stable Diffusion folder with each of diffusers' schedulers: the pictures of its own pipeline.

python -m pytest -q tests/test_scheduler_pictures.py -m slow      all solvers, on every grid
"""

from __future__ import annotations

import logging

import diffusers
import jax
import numpy as np
import pytest
import torch
from same_pictures import (
    PROMPTS,
    assert_same_pictures,
    pictures,
    saved,
    share_noise,
    theirs_from,
)
from torch_models import SMALLEST, nchw, normal, stable_diffusion

from contextdiff_jax.pretrained.pipeline import load_pipeline
from contextdiff_jax.runtime.keys import make_key

MULTI, UNIPC = diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler
SINGLE, EULER = diffusers.DPMSolverSinglestepScheduler, diffusers.EulerDiscreteScheduler
HEUN, ANCESTRAL = diffusers.HeunDiscreteScheduler, diffusers.EulerAncestralDiscreteScheduler
KARRAS, EXPONENTIAL = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}
GRIDS = [
    {},
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "trailing"},
    KARRAS,
    EXPONENTIAL,
]
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """diffusers' pipeline and its folder, whose UNet is the smallest there is."""

    def make(folder):
        return stable_diffusion(folder, unet_changes=SMALLEST)

    return saved(make, tmp_path_factory.mktemp("schedulers"))


def check(pair, cls, options, steps=5, guidance=3.0, **flags):
    """Pictures of both: with the scheduler in the folder, and, where there are `flags`, with
    these of `sample` over the folder's first scheduler instead.
    """
    pipe, folder = pair
    first = diffusers.DDIMScheduler.load_config(folder.parent / "first")
    pipe.scheduler = cls.from_config(first, **options)
    saved_one = diffusers.DDIMScheduler.from_config(first) if flags else pipe.scheduler
    saved_one.save_pretrained(folder / "scheduler")
    latents = normal(len(PROMPTS), 8, 8, 4)
    with torch.no_grad():
        expected = pipe(
            PROMPTS,
            latents=nchw(latents),
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=16,
            width=16,
            output_type="np",
        ).images
    images = load_pipeline(folder).text_to_image(
        PROMPTS, noise=latents, size=(16, 16), steps=steps, guidance=guidance, **flags
    )
    assert_same_pictures(images, expected)
    return images


@pytest.fixture(scope="module", autouse=True)
def first(pair):
    """The folder's scheduler as Stable Diffusion 1.5 has it, which others are made of."""
    pair[0].scheduler.save_pretrained(pair[1].parent / "first")


@pytest.mark.slow
def test_the_sampler_of_the_folder_and_the_one_of_the_flags_are_diffusers(pair):
    in_folder = check(pair, MULTI, KARRAS)
    by_flags = check(pair, MULTI, KARRAS, sampler="dpmpp_2m", spacing="karras")
    np.testing.assert_array_equal(in_folder, by_flags)


def test_eulers_start_and_its_fractional_times_are_diffusers(pair):
    check(pair, EULER, {"timestep_spacing": "linspace"})


@pytest.mark.slow
def test_a_folder_of_flow_matching_gives_diffusers_pictures(pair):
    check(pair, UNIPC, FLOW)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cls, options",
    [(cls, grid) for cls in (EULER, HEUN, MULTI, UNIPC) for grid in GRIDS]
    + [(SINGLE, grid) for grid in ({}, KARRAS, EXPONENTIAL)]
    + [(MULTI, {"solver_order": 3, **grid}) for grid in GRIDS]
    + [(MULTI, {"use_lu_lambdas": True}), (MULTI, FLOW), (SINGLE, FLOW)],
)
@pytest.mark.parametrize("steps", [5, 20])
def test_every_solver_on_every_grid_of_its_scheduler(pair, cls, options, steps):
    check(pair, cls, options, steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cls, sampler, options",
    [
        (diffusers.DDPMScheduler, "ddpm", {}),
        (ANCESTRAL, "ddpm", {}),
        (MULTI, "dpmpp_2m_sde", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_sampling_with_noise_gives_diffusers_pictures_of_the_same_noise(
    pair, cls, sampler, options, monkeypatch
):
    _, key = jax.random.split(make_key(0))
    keys = iter(jax.random.split(jax.random.fold_in(key, 0), 5))
    module = __import__(cls.__module__, fromlist=["randn_tensor"])

    def draw(shape, **_):
        return nchw(np.asarray(jax.random.normal(next(keys), (len(PROMPTS), 8, 8, 4))))

    monkeypatch.setattr(module, "randn_tensor", draw)
    check(pair, cls, options)


@pytest.mark.slow
@pytest.mark.parametrize("cls, options", [(EULER, {}), (MULTI, KARRAS), (UNIPC, {}), (HEUN, {})])
def test_image_to_image_is_diffusers_too(pair, cls, options, monkeypatch):
    pipe, folder = pair
    noise = share_noise(monkeypatch)
    config = diffusers.DDIMScheduler.load_config(folder.parent / "first")
    pipe.scheduler = cls.from_config(config, **options)
    pipe.scheduler.save_pretrained(folder / "scheduler")
    expected = theirs_from(
        pipe, diffusers.StableDiffusionImg2ImgPipeline, strength=0.65, guidance_scale=3.0
    )
    images = load_pipeline(folder).image_to_image(
        PROMPTS, pictures(), strength=0.65, steps=10, guidance=3.0, noise=noise
    )
    assert_same_pictures(images, expected)


def test_a_scheduler_that_we_lack_is_named_when_the_folder_is_opened(pair, caplog):
    folder = pair[1]
    diffusers.PNDMScheduler(skip_prk_steps=True).save_pretrained(folder / "scheduler")
    with caplog.at_level(logging.WARNING):
        pipeline = load_pipeline(folder)
    assert f"{folder}: PNDMScheduler: not supported; sampled by ddim" in caplog.text
    assert pipeline.options().sampler == "ddim"
