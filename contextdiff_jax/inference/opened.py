"""What a folder says of its model, whatever kind that is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int, PyTree

from contextdiff_jax.diffusion.process import Process
from contextdiff_jax.diffusion.steps import Steps
from contextdiff_jax.inference.request import Request
from contextdiff_jax.inference.sampling import Weaker
from contextdiff_jax.models.contextdiff import ContextDiffusion
from contextdiff_jax.settings import SampleConfig
from contextdiff_jax.settings.super_resolution import SuperResolutionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A model as its folder describes it, whatever kind that is.

    Attributes:
      build: weights -> the model; to be called inside of a jitted function.
      weights: arrays: the parameters, and the frozen networks that lie apart from them.
      process: what it was trained on.
      encode_text: texts -> (ids, mask, the words of each that are cut off).
      find_steps: options, shape of x0 (by default `shape`) -> the timesteps.
      shape: [H, W, C] of x0 by default. factor: pixels a side for each of H and W. multiple: of
        which H and W must be multiples.
      options: how it is sampled where the caller says nothing.
      identity: what tells its programs from another's, by its `repr`.
      rules: what its axes are split over on a mesh.
      least_guidance: a smaller scale is taken as this one.
      zeros_for_empty: without a negative text guidance leads away from zeros, as XL was trained.
      only_inpaints: the network reads a hole.
      piece: side of x0 in training, if that was of pieces of pictures; else 0.
      super_resolution: by how much it enlarges pictures, if it does.
      keeps_coarse: whether steps can share its network's coarser levels (`reuse`).
      rounds_strength_up: whether a part of a step that `strength` asks for counts as one.
      text_length: the tokens after which a text is cut; None: as many as there are ids.
      guide: a weaker model in the place of guidance's branch without the prompt (autoguidance).
      source: where it came from, for people.
      write: (weights, folder, **options) -> None: writes it as a folder that can be opened
        (`inference.sharing`).
    """

    build: Callable[[PyTree], ContextDiffusion]
    weights: tuple[PyTree, ...]
    process: Process
    encode_text: Callable[
        [Sequence[str]],
        tuple[Int[np.ndarray, "B *E L"], Bool[np.ndarray, "B L"], Sequence[str]],
    ]
    find_steps: Callable[..., Steps]
    shape: tuple[int, int, int]
    factor: int
    options: SampleConfig
    identity: Any
    rules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    least_guidance: float = -math.inf
    zeros_for_empty: bool = False
    only_inpaints: bool = False
    piece: int = 0
    super_resolution: SuperResolutionConfig = SuperResolutionConfig()
    multiple: int = 1
    keeps_coarse: bool = True
    rounds_strength_up: bool = False
    text_length: int | None = None
    guide: Opened | None = None
    source: str = ""
    write: Callable[..., None] | None = None

    def guided_by(self, guide: Opened) -> Opened:
        """This model with a weaker one as its guide: a smaller one, or one of fewer steps, of the
        same process, in the same pixels or latents.

        Raises ValueError, one line, for one that doesn't fit.
        """
        facts = {
            "context.shift": (self.process.shift, guide.process.shift),
            "shape of x0": (self.shape, guide.shape),
            "pixels a side of x0's": (self.factor, guide.factor),
            "estimate of r": (self.process.estimates_context, guide.process.estimates_context),
            "network for inpainting": (self.only_inpaints, guide.only_inpaints),
            "super_resolution.factor": (
                self.super_resolution.factor,
                guide.super_resolution.factor,
            ),
        }
        for what, (own, other) in facts.items():
            if own != other:
                raise ValueError(f"autoguidance: its {what} is {other}; must be the model's, {own}")
        leaves, kinds = zip(
            *(jax.tree.flatten(opened.process.schedule) for opened in (self, guide)), strict=True
        )
        if kinds[0] != kinds[1] or not all(map(np.array_equal, *leaves)):
            raise ValueError(
                "autoguidance: its schedule is another; must be the model's, of the same section "
                "diffusion"
            )
        return dataclasses.replace(self, guide=guide)

    def check_able(
        self, request: Request, options: SampleConfig, *, enlarges: bool, fills: bool = False
    ) -> None:
        """Raises ValueError for what the model isn't for."""
        if enlarges and not self.super_resolution.is_upsampler:
            raise ValueError("the model has super_resolution.factor=0: it doesn't enlarge pictures")
        if self.super_resolution.is_upsampler and not enlarges:
            raise ValueError("the model enlarges pictures: it is only for upsample")
        if self.only_inpaints and not fills:
            raise ValueError("the model reads a picture with a hole: it is only for inpainting")
        if self.guide is not None and request.negative is not None:
            raise ValueError("negative: isn't read with autoguidance, whose guide takes its place")
        if options.reuse > 1 and enlarges and self.piece_of(request):
            raise ValueError(f"reuse={options.reuse}: with tile only 1")
        if options.reuse > 1 and not self.keeps_coarse:
            raise ValueError(
                f"reuse={options.reuse}: the model has no coarser levels that could be kept; 1"
            )

    def piece_of(self, request: Request) -> int:
        """The side of x0's tiles of an upsampler, for a request's `tile`; 0: all of x0.

        Raises ValueError for a side that the network can't see.
        """
        if not (request.tile and self.super_resolution.is_upsampler):
            return 0
        if request.tile is True:
            return self.piece or self.shape[0]
        step = self.factor * self.multiple
        if request.tile < 16 * step or request.tile % step:
            raise ValueError(
                f"tile={request.tile}: must be a multiple of {step}, at least {16 * step}"
            )
        return request.tile // self.factor

    @property
    def about(self) -> tuple:
        """What tells its programs from others, by its `repr`."""
        guide = self.guide and (self.guide.identity, self.guide.process)
        return self.identity, self.process, guide

    def guide_arrays(self, texts: Sequence[str]) -> tuple[PyTree, ...] | None:
        """The weights of the guide, if there is one, and ids and mask of the texts as it reads
        them.
        """
        return self.guide and (self.guide.weights, *self.guide.encode_text(texts)[:2])

    def build_weaker(self, arrays: tuple[PyTree, ...] | None) -> Weaker | None:
        """The guide of `guide_arrays`; to be called inside of a jitted function."""
        if arrays is None:
            return None
        weights, ids, mask = arrays
        return Weaker(self.guide.build(weights), self.guide.process.prediction_type, ids, mask)
