"""Pictures of diffusers' pipelines and of ours from the same folder and noise, compared."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch_models import nchw, nhwc, normal

from contextdiff_jax.pretrained.pipeline import load_pipeline

PROMPTS = ["a red circle", "the blue square is left of a rather long description"]


def saved(make, folder):
    """The diffusers pipeline that `make` builds, and its folder."""
    pipe = make(folder / "words")
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "sd")
    return pipe, folder / "sd"


def check(pipe, folder, *, scheduler=None, size=(8, 8), **options):
    """The pictures of both pipelines from the same noise are the same."""
    if scheduler is not None:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **scheduler)
        pipe.scheduler.save_pretrained(folder / "scheduler")
    return compare(pipe, load_pipeline(folder), 4, size, steps=50, guidance=7.5, options=options)


def compare(pipe, pipeline, channels, size, *, steps, guidance, options, **theirs) -> np.ndarray:
    """As `check`, of a pipeline that is open: what `options` don't say is the number of `steps` and
    the `guidance` of diffusers, whose `theirs` are besides.
    """
    latents, negative = normal(len(PROMPTS), *size, channels), options.get("negative")
    with torch.no_grad():
        expected = pipe(
            PROMPTS,
            latents=nchw(latents),
            height=2 * size[0],
            width=2 * size[1],
            output_type="np",
            negative_prompt=None if negative is None else [negative] * len(PROMPTS),
            num_inference_steps=options.get("steps", steps),
            guidance_scale=options.get("guidance", guidance),
            **theirs,
        ).images
    size = (2 * size[0], 2 * size[1])
    images = pipeline.text_to_image(PROMPTS, noise=latents, size=size, **options)
    assert_same_pictures(images, expected)
    return expected


def assert_same_pictures(images, expected) -> None:
    """Within 1/255 for 99.9% of the values; and they must not be all black, white or alike."""
    inside = (expected > 0.02) & (expected < 0.98)
    assert inside.mean() > 0.3 and np.abs(expected[0] - expected[1]).mean() > 0.02
    assert images.shape == expected.shape and images.dtype == np.uint8
    difference = np.abs(images.astype(int) - np.round(255 * expected).astype(int))
    assert (difference <= 1).mean() >= 0.999, difference.max()


def share_noise(monkeypatch):
    """diffusers draws the latents around their mean, which we take; its noise is given to us."""
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean
    )
    return nhwc(torch.randn((2, 4, 8, 12), generator=torch.Generator().manual_seed(3)))


def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3)).astype(np.uint8)


def theirs_from(pipe, torch_class, **options) -> np.ndarray:
    """diffusers' pictures from `pictures()`."""
    pipe = torch_class.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipe(
            PROMPTS,
            image=[Image.fromarray(image) for image in pictures()],
            num_inference_steps=10,
            output_type="np",
            generator=torch.Generator().manual_seed(3),
            **options,
        ).images


def holes():
    """Masks of both pictures, and as diffusers reads them."""
    masks = np.zeros((2, 16, 24), np.float32)
    masks[0, 3:11, 5:20] = 1
    masks[1, :, 12:] = 1
    return masks, [Image.fromarray((255 * mask).astype(np.uint8)) for mask in masks]
