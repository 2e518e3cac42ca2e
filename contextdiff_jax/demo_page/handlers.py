"""Answers to the page's clicks: what visitors see of pictures, clips and mistakes."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
import numpy as np

from contextdiff_jax.demo_page import look
from contextdiff_jax.demo_page.album import Album
from contextdiff_jax.demo_page.clips import ClipStudio, ClipWish, EditedClip, encoded
from contextdiff_jax.demo_page.limits import GALLERY
from contextdiff_jax.demo_page.studio import Shown, Studio, enlarged
from contextdiff_jax.demo_page.uploads import (
    read_frames,
    read_metadata,
    read_picture,
    read_strokes,
)
from contextdiff_jax.demo_page.wishes import Wish
from contextdiff_jax.runtime.errors import RunError, one_line

LOGGER = logging.getLogger(__name__)
SKIP = gr.skip()
# The controls that a picture's settings are read from, in the order of `draw`'s arguments.
CONTROLS = ("prompt", "negative", "seed", "sampler", "steps", "guidance", "gain", "strength")
NOISE, PICTURE = "noise", "a picture"


def sentence(error: Exception) -> str:
    """Return what a visitor reads of an error. What isn't theirs to mend is in the log alone."""
    if isinstance(error, ValueError | RunError):
        text = one_line(error)
        return text[:1].upper() + text[1:400]
    if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
        return "The device has too little memory for this: make it smaller."
    LOGGER.error("a visitor's request failed", exc_info=error)
    return "Something went wrong on the server; its log says what. Other settings may work."


def failed(error: Exception, outputs: int) -> tuple:
    """Return the updates that say what is wrong and change nothing else; the status comes last."""
    return (*[SKIP] * (outputs - 1), look.status(sentence(error), error=True))


def guarded(outputs: int) -> Callable[[Callable], Callable]:
    """Make a handler of so many outputs say its errors in the last, the status line."""

    def decorate(handler: Callable) -> Callable:
        def answer(*values: Any) -> tuple:
            try:
                return handler(*values)
            except Exception as error:
                return failed(error, outputs)

        return answer

    return decorate


class PictureHandlers:
    """Clicks of the tab of pictures. A visitor's gallery is a list of (path, caption)."""

    def __init__(self, studio: Studio, album: Album):
        self.studio, self.album = studio, album

    def draw(self, *values: Any) -> Iterator[tuple]:
        """Yields (stage, gallery's pictures, gallery, status) while pictures are made.

        `values`: `CONTROLS`, then whether plain diffusion is beside it, what it starts from, the
        picture, its strokes, and the gallery so far.
        """
        *controls, beside, begin, picture, strokes, gallery = values
        try:
            wish = Wish.read(dict(zip(CONTROLS, controls, strict=True)))
            start, mask = self._start(begin, picture, strokes)
            began, shown, before = time.monotonic(), [], None
            for shown in self.studio.make(wish, start, mask, bool(beside)):
                stage = SKIP if shown == before else self._stage(shown)
                said = progress(shown, time.monotonic() - began)
                yield stage, SKIP, SKIP, look.status(said)
                before = shown
            gallery = self._with(gallery, shown)
            took = time.monotonic() - began
            way = " by inpainting" if mask is not None else ""
            if start is not None and mask is None:
                way = " from your picture"
            said = f"Done{way} in {took:.1f} seconds. Each PNG carries its settings."
            yield self._stage(shown), gallery, gallery, look.status(said)
        except Exception as error:
            yield failed(error, 4)

    def _stage(self, shown: list[Shown]) -> str:
        return look.show(shown, self.studio.has_context, self.studio.size)

    def _start(
        self, begin: Any, picture: np.ndarray | None, strokes: list[bytes]
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        if begin != PICTURE:
            return None, None
        if picture is None:
            raise ValueError(
                "There is no picture to start from yet: upload one, or draw one first."
            )
        return picture, read_strokes(strokes, picture.shape[:2])

    def _with(self, gallery: list, shown: list[Shown]) -> list:
        new = []
        for each in shown:
            title = look.title_of(each, self.studio.has_context)
            caption = f"{each.wish.prompt[:60]} · {title} · seed {each.wish.seed}"
            new.append((self.album.keep(each.png), caption))
        return [*new, *(gallery or [])][:GALLERY]

    def upload(self, path: str | None) -> tuple:
        """Return (picture to start from, editor, what it starts from, status) of an upload."""
        if path is None:
            return None, None, SKIP, look.status()
        return self._begin_with(read_picture(path, self.studio.size))

    def use_last(self, gallery: list) -> tuple:
        """Return the same of the gallery's first picture."""
        if not gallery:
            raise ValueError("There is no picture yet: draw one first.")
        return self._begin_with(read_picture(gallery[0][0], self.studio.size))

    def _begin_with(self, picture: np.ndarray) -> tuple:
        background = enlarged(picture)
        said = "Draw over what shall be painted anew, or nothing to change all of the picture."
        canvas = {"background": background, "layers": [], "composite": None}
        return picture, canvas, PICTURE, look.status(said)

    def select(self, gallery: list, event: gr.SelectData) -> tuple:
        """Return (`CONTROLS`, status) of the picture that is clicked in the gallery."""
        index = event.index
        if not isinstance(index, int) or not 0 <= index < len(gallery or []):
            raise ValueError("That picture isn't in the gallery any more.")
        return self.restore(gallery[index][0])

    def restore(self, path: str | None) -> tuple:
        """Return (`CONTROLS`, status) of a PNG's text."""
        if path is None:
            return (*[SKIP] * len(CONTROLS), look.status())
        texts = read_metadata(path)
        wish = Wish.of_metadata(texts, self.studio.default)
        said = f"Restored the settings of “{wish.prompt[:60]}”, seed {wish.seed}."
        if texts.get("way", "text to image") != "text to image":
            said += " It was made from a picture, which the file doesn't hold."
        values = [getattr(wish, name) for name in CONTROLS]
        values[CONTROLS.index("seed")] = str(wish.seed)
        return (*values, look.status(said))

    def new_seed(self) -> str:
        """Return a seed that wasn't there before."""
        return str(random.SystemRandom().randrange(2**32))


def progress(shown: list[Shown], seconds: float) -> str:
    """Return what is being done, in words; `seconds`: since the click."""
    number = next((i for i, each in enumerate(shown) if not each.done), len(shown) - 1)
    now, which = shown[number], f"Picture {number + 1} of {len(shown)}" if shown[1:] else "Picture"
    if now.step is None:
        return f"{which}: waiting for the device."
    if not now.step and now.new_program:
        return f"{which}: compiling for these settings, once. {seconds:.0f} seconds so far."
    return f"{which}: step {now.step} of {now.steps}."


class ClipHandlers:
    """Clicks of the tab of clips."""

    def __init__(self, studio: ClipStudio):
        self.studio = studio

    def upload(self, path: str | None) -> tuple:
        """Return (the clip, its stage, status) of an upload."""
        if path is None:
            return None, SKIP, look.status()
        side = self.studio.side
        clip = read_frames(path, (side, side))
        said = (
            f"{len(clip)} frames of {side} x {side} pixels: from the start, cut about the middle."
        )
        return clip, self._stage({"the clip": clip}, files=False), look.status(said)

    def example(self) -> tuple:
        """Return (the clip, what it shows, what it shall show, its stage, status)."""
        clip, prompt, edit = self.studio.example(random.SystemRandom().randrange(10_000))
        said = "A moving shape, drawn now. Change the words if you like, then click Edit."
        stage = self._stage({"the clip": clip}, files=False)
        return clip, prompt, edit, stage, look.status(said)

    def edit(self, clip: np.ndarray | None, *controls: Any) -> Iterator[tuple]:
        """Yields (stage, status) while the clip is edited."""
        try:
            if clip is None:
                raise ValueError("There is no clip yet: upload one first.")
            wish, began = ClipWish.read(*controls), time.monotonic()
            for update in self.studio.edit(clip, wish):
                took = time.monotonic() - began
                if isinstance(update, EditedClip):
                    said = (
                        f"Done in {took:.0f} seconds. The inversion gives the clip back at "
                        f"{update.fidelity:.0f} dB."
                    )
                    yield self._stage(update.clips), look.status(said)
                else:
                    yield SKIP, look.status(f"{update} {took:.0f} seconds so far.")
        except Exception as error:
            yield failed(error, 2)

    def _stage(self, clips: dict[str, np.ndarray], files: bool = True) -> str:
        figures = []
        for title, clip in clips.items():
            made, links = encoded(clip), []
            url = look.embedded(made["gif"], "image/gif")
            if files:
                film = look.embedded(made["mp4"], "video/mp4")
                links = [("GIF", "contextdiff.gif", url), ("MP4", "contextdiff.mp4", film)]
            figures.append(look.figure(title, look.image(url, title, self.studio.side), links))
        return look.stage(figures)
