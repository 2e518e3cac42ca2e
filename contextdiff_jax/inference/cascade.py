"""A cascade: a base draws small pictures, and upsamplers enlarge them, one after another (Ho et
al., 2021; Saharia et al., 2022).

    from contextdiff_jax import Pipeline

    cascade = Pipeline.cascade(["runs/base", "runs/sr"])
    pictures = cascade.text_to_image(["a dog"], steps=[50, 16], augmentation=0.1)

A stage's pictures are all drawn before the next stage begins: each has batches of its own size. The
noise of a picture depends on the seed, its number and the stage; the base's is the one that it has
without a cascade.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from contextdiff_jax.inference.pipeline import Pictures, Pipeline
from contextdiff_jax.inference.request import Plan
from contextdiff_jax.runtime import pictures
from contextdiff_jax.settings import SampleConfig

LOGGER = logging.getLogger(__name__)
Size = tuple[int, int]
OPTIONS = tuple(field.name for field in dataclasses.fields(SampleConfig))
# What each stage may have a value of its own for.
OF_STAGES = {*OPTIONS, "batch_size", "tile", "callback"}
PAIRS = ("spacing", "guidance_interval")  # a tuple is one stage's value


def split_options(options: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The options of each of `count` stages. A list has one value a stage, of which None is the
    stage's own; so has a tuple, unless the option itself is one. Anything else is for all.
    `augmentation` is for upsamplers alone: a list may leave out the base.

    Raises ValueError for a list of another length, and for an augmentation of the base.
    """
    stages: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, value in options.items():
        several = isinstance(value, list) or isinstance(value, tuple) and name not in PAIRS
        if name not in OF_STAGES or not several:
            values = [value] * count
            if name == "augmentation":
                values[0] = None
        elif name == "augmentation" and len(value) == count - 1:
            values = [None, *value]
        elif len(value) != count:
            raise ValueError(
                f"{name}={value}: {len(value)} values; must be one, or one for each of {count} "
                "stages"
            )
        else:
            values = value
        if name == "augmentation" and values[0] is not None:
            raise ValueError(f"augmentation={value}: the base enlarges no picture, it has none")
        for stage, own in zip(stages, values, strict=True):
            if own is not None:
                stage[name] = own
    return stages


class Cascade:
    """Stages of pictures, from a base to the largest; see the module docstring."""

    def __init__(self, stages: Sequence[Pipeline]):
        """Raises ValueError, one line, for a stage that doesn't fit the one before."""
        self.stages = tuple(stages)
        if len(self.stages) < 2:
            raise ValueError("cascade: one part; must be a base and one upsampler or more")
        size = None
        for i, stage in enumerate(self.stages):
            with _naming(i, self.stages):
                size = _fits(stage, size)

    def text_to_image(
        self, prompts: Sequence[str], *, size: Size | None = None, **options: Any
    ) -> Pictures:
        """The largest pictures; arguments as `each_stage`'s."""
        for made in self.each_stage(prompts, size=size, **options):
            last = made
        return last

    def each_stage(
        self,
        prompts: Sequence[str],
        *,
        size: Size | None = None,
        noise: Float[np.ndarray, "B H W C"] | None = None,
        **options: Any,
    ) -> Iterator[Pictures]:
        """Pictures of each stage, the base's first, as they are made.

        Args:
          size: height and width of the base's; the others follow.
          noise: the base's, instead of drawn.
          options: as `Pipeline.text_to_image`; `split_options` says which stage has which.

        Raises ValueError for any stage's before anything is drawn.
        """
        plans = self.plan(prompts, size=size, noise=noise, **options)
        return self._draw(prompts, plans, size, self._split(options, noise))

    def plan(
        self, prompts: Sequence[str], *, size: Size | None = None, **options: Any
    ) -> list[Plan]:
        """What each stage would do; nothing is computed. ValueError as `each_stage`."""
        noise, plans = options.pop("noise", None), []
        split = self._split(options, noise)
        for i, (stage, own) in enumerate(zip(self.stages, split, strict=True)):
            with _naming(i, self.stages):
                sizes = {"size": size} if i == 0 else {"small": size}
                plans.append(stage.plan(prompts, **sizes, **own))
                size = tuple(stage.opened.factor * side for side in plans[-1].shape[:2])
        return plans

    @property
    def source(self) -> str:
        """Where the stages came from, for people."""
        return " -> ".join(stage.source for stage in self.stages)

    def options(self, **given: Any) -> list[SampleConfig]:
        """The options of each stage's sampling: the given ones, else its own."""
        split = split_options(given, len(self.stages))
        return [stage.options(**own) for stage, own in zip(self.stages, split, strict=True)]

    def _split(
        self, options: Mapping[str, Any], noise: Float[np.ndarray, "B H W C"] | None
    ) -> list[dict[str, Any]]:
        split = split_options(options, len(self.stages))
        return [own | {"stage": i, "noise": None if i else noise} for i, own in enumerate(split)]

    def _draw(
        self,
        prompts: Sequence[str],
        plans: Sequence[Plan],
        size: Size | None,
        options: Sequence[dict[str, Any]],
    ) -> Iterator[Pictures]:
        made = None
        for i, (stage, plan, own) in enumerate(zip(self.stages, plans, options, strict=True)):
            sides = tuple(stage.opened.factor * side for side in plan.shape[:2])
            LOGGER.info(
                "stage %d of %d, %s: %d pictures of %s in %d steps",
                *(i + 1, len(plans), stage.source, len(plan.request.texts)),
                *(_text(sides), plan.options.steps),
            )
            with _naming(i, self.stages):
                if made is None:
                    made = stage.text_to_image(prompts, size=size, **own)
                else:
                    made = stage.upsample(prompts, made, **own)
            yield made


def draw_into(
    cascade: Cascade,
    prompts: Sequence[str],
    *,
    folder: pathlib.Path | None,
    every_stage: bool = False,
    made: Mapping[str, Any] | None = None,
    **options: Any,
) -> Pictures:
    """The largest pictures, each written to `folder`, too, and with `every_stage` the others to
    `folder`/HEIGHTxWIDTH as they come. Their PNGs' texts say `made` and, as JSON in `stages`, what
    each stage did up to theirs.
    """
    captions = [prompt for prompt in prompts for _ in range(options.get("num", 1))]
    chosen = cascade.options(**{name: options[name] for name in OPTIONS if name in options})
    stages, each = [], cascade.each_stage(prompts, **options)
    for stage, own, images in zip(cascade.stages, chosen, each, strict=True):
        shown = {k: v for k, v in dataclasses.asdict(own).items() if k != "prompts"}
        stages.append({"source": stage.source, **shown})
        last = len(stages) == len(cascade.stages)
        if folder is not None and (every_stage or last):
            texts = {**(made or {}), "source": cascade.source, "stages": json.dumps(stages)}
            place = folder if last else folder / _text(images.shape[1:3])
            pictures.save_each(images, captions, place, texts)
    return images


def _fits(stage: Pipeline, before: Size | None) -> Size:
    """Height and width in pixels of the pictures that a stage was trained to make, once they fit
    those of the stage `before` (None: it is the base). Raises ValueError where they don't.
    """
    (height, width, _), factor = stage.opened.shape, stage.opened.factor
    size, config = (factor * height, factor * width), stage.opened.super_resolution
    if before is None:
        if config.is_upsampler:
            raise ValueError("enlarges pictures; the first part must draw them")
        return size
    if not config.is_upsampler:
        raise ValueError("doesn't enlarge pictures, its super_resolution.factor is 0")
    small = size[0] // config.factor, size[1] // config.factor
    if small != before:
        raise ValueError(
            f"enlarges pictures of {_text(small)} to {_text(size)}; the part before makes "
            f"{_text(before)}"
        )
    return size


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


@contextlib.contextmanager
def _naming(i: int, stages: Sequence[Pipeline]) -> Iterator[None]:
    """Puts the stage's number and source before a ValueError's text."""
    try:
        yield
    except ValueError as error:
        source = stages[i].source
        error.args = (f"stage {i + 1} of {len(stages)}, {source}: {error}",)
        raise
