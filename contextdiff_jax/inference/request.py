"""A request to a `Pipeline`, checked: prompts, how many pictures, which noise."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray, UInt8

from contextdiff_jax.diffusion.steps import Steps
from contextdiff_jax.runtime.keys import check_seed, make_key
from contextdiff_jax.settings import SampleConfig

Callback = Callable[[int, Float[np.ndarray, "B H W C"]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The options that every way to sample reads; ValueError, one line, for what isn't allowed.

    Attributes:
      prompts: captions, `num` pictures each.
      negative: what guidance leads away from, one text for all or one a prompt; None: the empty
        text, or what the model has in its place (`Opened.zeros_for_empty`).
      perpendicular: weight of the negative text's part that is perpendicular to the prompt's, from
        which alone guidance then leads away, beside the empty text (Perp-Neg); 0: of all of it, in
        the empty text's place.
      seed: 0..2^64 - 1; picture i's noise depends on (seed, i) alone.
      stage: of a cascade; each has noise of its own.
      first: the number of the first picture, of a share of a longer list.
      noise: given instead of drawn, [B, H, W, C] in the model's space.
      callback: called as callback(step, x0) with the estimate of x0 after each step.
      batch_size: pictures at once; one shape, one compilation.
      tile: large pictures go through the autoencoder in tiles, and an upsampler's network sees
        tiles of so many pixels a side (True: of those that it was trained on).
    """

    prompts: Sequence[str]
    negative: str | Sequence[str] | None = None
    perpendicular: float = 0.0
    num: int = 1
    seed: int = 0
    stage: int = 0
    first: int = 0
    noise: Float[np.ndarray, "B H W C"] | None = None
    callback: Callback | None = None
    batch_size: int = 64
    tile: bool | int = False

    def __post_init__(self):
        if isinstance(self.prompts, str) or not len(self.prompts):
            raise ValueError(
                f"prompts={self.prompts!r}: the list is empty or no list; "
                "give at least one text, as in ['a large red circle']"
            )
        check_seed(self.seed)
        listed = not isinstance(self.negative, str | None)
        if listed and len(self.negative) != len(self.prompts):
            count = len(self.prompts)
            raise ValueError(
                f"negative: {len(self.negative)} texts; must be one, or as many as prompts, {count}"
            )
        if not 0 <= self.perpendicular < math.inf:
            raise ValueError(f"perpendicular={self.perpendicular}: must be finite and not negative")
        if self.perpendicular and self.negative is None:
            raise ValueError(f"perpendicular={self.perpendicular}: needs a negative text")
        if self.num < 1 or self.batch_size < 1:
            raise ValueError(f"num={self.num}, batch_size={self.batch_size}: must be at least 1")

    @classmethod
    def split(
        cls, prompts: Sequence[str], options: Mapping[str, Any]
    ) -> tuple[Request, dict[str, Any]]:
        """The request of those options that are its own, and the others; None is none."""
        given = {name: value for name, value in options.items() if value is not None}
        names = {field.name for field in dataclasses.fields(cls)} & given.keys()
        return cls(prompts=prompts, **{name: given.pop(name) for name in names}), given

    @property
    def key(self) -> PRNGKeyArray:
        """The key of the seed and the stage."""
        key = make_key(self.seed)
        return jax.random.fold_in(key, self.stage) if self.stage else key

    @functools.cached_property
    def texts(self) -> list[str]:
        """The caption of each picture."""
        return [prompt for prompt in self.prompts for _ in range(self.num)]

    def check_images(self, images: UInt8[np.ndarray, "B H W 3"]) -> None:
        """Raises ValueError unless there is one for each picture."""
        if len(images) != len(self.texts):
            raise ValueError(
                f"images: {len(images)}; one for each of the {len(self.texts)} pictures"
            )

    def checked_noise(self, shape: tuple[int, int, int]) -> Float[np.ndarray, "B H W C"] | None:
        """The given noise; ValueError unless it is of this shape, one a picture."""
        if self.noise is None:
            return None
        wanted = (len(self.texts), *shape)
        if tuple(self.noise.shape) != wanted:
            raise ValueError(f"noise: shape {tuple(self.noise.shape)}; must be {wanted}")
        return np.asarray(self.noise, np.float32)

    @functools.cached_property
    def negatives(self) -> list[str]:
        """The negative text of each picture, or the one for all."""
        if isinstance(self.negative, str | None):
            return [self.negative or ""]
        return [text for text in self.negative for _ in range(self.num)]


class Plan(NamedTuple):
    """What a request comes to, checked: [H, W, C] of what is diffused, and its steps."""

    request: Request
    options: SampleConfig
    shape: tuple[int, int, int]
    steps: Steps
