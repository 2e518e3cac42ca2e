"""Pictures of a model for wishes, with what they look like on the way."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from contextdiff_jax.demo_page.wishes import Wish
from contextdiff_jax.demo_page.worker import Worker
from contextdiff_jax.inference.gain import largest_gain, with_gain
from contextdiff_jax.inference.pipeline import Pipeline
from contextdiff_jax.models.pixels import to_uint8
from contextdiff_jax.runtime.pictures import encode_png

Picture = UInt8[np.ndarray, "H W 3"]
BETWEEN = 0.15  # seconds between two pictures on the way, as a person can follow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """One of the pictures that a click makes, as it is now.

    Attributes:
      wish: what it is made for.
      step, steps: how many are done, of how many; None: it waits for the device.
      png: what there is of it, encoded; with `done` the picture itself, which carries its wish.
      new_program: its program wasn't compiled before.
    """

    wish: Wish
    step: int | None = None
    steps: int = 1
    png: bytes | None = None
    done: bool = False
    new_program: bool = False


class Studio:
    """A pipeline for visitors: one picture at a time, of the model's own size."""

    def __init__(self, pipeline: Pipeline, worker: Worker, source: str):
        self.pipeline, self.worker, self.source = pipeline, worker, source
        self.options, self.largest_gain = pipeline.opened.options, largest_gain(pipeline)
        height, width, _ = pipeline.opened.shape
        factor = pipeline.opened.factor
        self.size = height * factor, width * factor
        self._compiled: set[tuple] = set()
        self._with_gain = functools.lru_cache(maxsize=2)(lambda f: with_gain(pipeline, f))

    @property
    def default(self) -> Wish:
        """The model's own settings, with its first prompt if it has any."""
        options = self.options
        return Wish(
            prompt=next(iter(options.prompts), ""),
            sampler=options.sampler,
            steps=options.steps,
            guidance=options.guidance,
            gain=min(self.largest_gain, 1.0),
        )

    @property
    def has_context(self) -> bool:
        """Whether the model has a context, without which it would make other pictures."""
        return self.largest_gain > 0

    def make(
        self,
        wish: Wish,
        start: Picture | None = None,
        mask: Float[np.ndarray, "H W"] | None = None,
        beside: bool = False,
    ) -> Iterator[list[Shown]]:
        """Yields the pictures as they come: the wish's, and with `beside` plain diffusion's of the
        same seed.

        Raises ValueError, one line, for what the model doesn't allow.
        """
        wishes = [wish]
        if beside and self.has_context and wish.gain:
            wishes.append(dataclasses.replace(wish, gain=0.0))
        shown = [Shown(wish=each) for each in wishes]
        yield shown
        for i, each in enumerate(wishes):
            for now in self._one(each, start, mask):
                shown = [*shown[:i], now, *shown[i + 1 :]]
                yield shown

    def warm(self) -> None:
        """Compiles the program of the model's own settings, and makes a picture by it."""
        wish = dataclasses.replace(self.default, prompt="a picture")
        for _ in self.make(wish):
            pass

    def _one(
        self, wish: Wish, start: Picture | None, mask: Float[np.ndarray, "H W"] | None
    ) -> Iterator[Shown]:
        options = wish.options
        way: Callable[..., Any] = self._with_gain(
            wish.gain if self.has_context else 1
        ).text_to_image
        pipeline, name = way.__self__, "text to image"
        if start is not None and mask is not None:
            options |= {"images": start[None], "masks": mask[None], "strength": wish.strength}
            way, name = pipeline.inpaint, "inpainting"
        elif start is not None:
            options |= {"images": start[None], "strength": wish.strength}
            way, name = pipeline.image_to_image, "image to image"
        program = name, wish.sampler, wish.steps, wish.guidance != 1, wish.strength
        steps = wish.steps if start is None else max(int(wish.steps * wish.strength), 1)
        now = Shown(wish=wish, steps=steps, new_program=program not in self._compiled)
        job = functools.partial(_call, way, [wish.prompt], options)
        running, shown_at, seen = self.worker.run(job), 0.0, None
        while True:
            try:
                report = next(running)
            except StopIteration as end:
                self._compiled.add(program)
                made = end.value[0]
                break
            if report == () and now.step is None:  # the device is free
                now = dataclasses.replace(now, step=0)
            elif report and report is not seen and time.monotonic() - shown_at > BETWEEN:
                seen, (step, x0) = report, report
                now = dataclasses.replace(now, step=step, png=encode_png(self._decode(x0)[0], {}))
                shown_at = time.monotonic()
            yield now
        about = {"source": self.source, "way": name, "index": 0}
        metadata = wish.metadata
        if start is None:
            del metadata["strength"]
        png = encode_png(made, metadata | about)
        yield dataclasses.replace(now, step=steps, png=png, done=True)

    def _decode(self, x0: Float[np.ndarray, "B H W C"]) -> UInt8[np.ndarray, "B H2 W2 3"]:
        """The pictures of estimates of x0."""
        if self.pipeline.opened.factor == 1 and x0.shape[-1] == 3:
            return np.asarray(to_uint8(x0))
        return np.asarray(self._decoder(self.pipeline.opened.weights, x0))

    @functools.cached_property
    def _decoder(self) -> Callable:
        build = self.pipeline.opened.build
        return jax.jit(lambda weights, x0: to_uint8(build(weights).to_pixels(x0)))


def _call(way: Callable, prompts: list[str], options: dict[str, Any], report: Callable) -> Any:
    return way(prompts, **options, callback=report)


def enlarged(picture: Picture, least: int = 512) -> Picture:
    """Return the picture, enlarged by whole pixels to at least that many a side."""
    factor = -(-least // min(picture.shape[:2]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)
