"""Sampling from a Stable Diffusion folder as the `sample` command asks for it: files in, pictures
out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from contextdiff_jax.data.decoding import UNDECODABLE, open_picture, shown
from contextdiff_jax.keys import check_seed
from contextdiff_jax.pretrained.pipeline import load_pipeline


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderRequest:
    """The command's flags. ValueError, one line with flag and what is allowed, for those that don't
    fit together.
    """

    sampler: str = "ddim"
    steps: int = 50
    eta: float = 0.0
    guidance: float = 7.5
    seed: int = 0
    negative: str | None = None
    size: Sequence[str] | None = None  # height, width
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    reuse: int = 1

    def __post_init__(self):
        if self.sampler != "ddim" or self.eta:
            raise ValueError(
                f"--sampler={self.sampler}, --eta={self.eta}: with --model only ddim at eta 0"
            )
        if self.steps < 1:
            raise ValueError(f"--steps={self.steps}: must be at least 1")
        if self.guidance < 0:
            raise ValueError(f"--guidance={self.guidance}: must not be negative")
        check_seed(self.seed, "--seed")
        if self.reuse < 1:
            raise ValueError(f"--reuse={self.reuse}: must be positive")
        for name in ("mask", "strength"):
            if getattr(self, name) is not None and self.image is None:
                raise ValueError(f"--{name}={getattr(self, name)}: needs --image")
        if self.size is not None and (
            len(self.size) != 2 or not all(side.isdigit() for side in self.size)
        ):
            raise ValueError(
                f"--size={','.join(self.size)}: must be HEIGHT,WIDTH in pixels, as in 512,768"
            )

    @property
    def shape(self) -> tuple[int, int] | None:
        """(height, width), if asked for."""
        return None if self.size is None else (int(self.size[0]), int(self.size[1]))


def _read(path: str, mode: str, shape: tuple[int, int] | None, flag: str) -> Image.Image:
    try:
        with open_picture(path) as image:
            image = shown(image).convert(mode)
    except UNDECODABLE as error:
        raise ValueError(f"--{flag}={path}: can't be read as a picture ({error})") from None
    return image if shape is None else image.resize(shape[::-1], Image.Resampling.LANCZOS)


def sample_folder(
    folder: str, prompts: Sequence[str], request: FolderRequest
) -> UInt8[np.ndarray, "B H W 3"]:
    """One picture a prompt, in one batch over all devices. ValueError, one line, for a folder or a
    picture that doesn't fit.
    """
    options = {
        name: getattr(request, name) for name in ("negative", "steps", "guidance", "seed", "reuse")
    }
    if request.image is None:
        return load_pipeline(folder).text_to_image(prompts, size=request.shape, **options)
    image = np.asarray(_read(request.image, "RGB", request.shape, "image"))
    images = np.tile(image, (len(prompts), 1, 1, 1))
    if request.strength is not None:
        options["strength"] = request.strength
    if request.mask is None:
        return load_pipeline(folder).image_to_image(prompts, images, **options)
    mask = np.asarray(_read(request.mask, "L", image.shape[:2], "mask"), np.float32) / 255
    return load_pipeline(folder).inpaint(
        prompts, images, np.tile(mask, (len(prompts), 1, 1)), **options
    )
