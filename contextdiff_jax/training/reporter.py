"""What a run shows of itself while it trains: captioned samples and the curves."""

from __future__ import annotations

import logging
import pathlib
import tempfile

import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8
from PIL.Image import Image

from contextdiff_jax.data import AnyTokenizer, DataConfig, make_source
from contextdiff_jax.inference.opening import of_run
from contextdiff_jax.inference.pipeline import NotFiniteError
from contextdiff_jax.models.contextdiff import Frozen
from contextdiff_jax.models.low_resolution import shrink
from contextdiff_jax.parallel.processes import is_first
from contextdiff_jax.runs import checkpoints
from contextdiff_jax.runtime import pictures
from contextdiff_jax.runtime.files import replacing
from contextdiff_jax.settings import Settings
from contextdiff_jax.training.cached_text import SHOWN
from contextdiff_jax.training.state import TrainState

LOGGER = logging.getLogger(__name__)


class Reporter:
    """Every `sample_every` steps, and at the end: a grid of captioned samples of the EMA weights,
    unless `sample_every` is 0, and the curves.
    """

    def __init__(
        self,
        settings: Settings,
        workdir: pathlib.Path,
        tokenizer: AnyTokenizer,
        mesh: Mesh,
        frozen: Frozen,
    ):
        self._settings, self._workdir = settings, workdir
        self._pipeline = None
        if settings.train.sample_every:
            self._pipeline = of_run(settings, tokenizer, None, frozen=frozen, mesh=mesh)
            self._small = None
            if settings.super_resolution.is_upsampler:
                self._prompts, self._small = small_pictures(settings)
            else:
                self._prompts = list(settings.sample.prompts) or default_prompts(settings.data)

    def __call__(self, state: TrainState, step: int) -> Image | None:
        """The grid of this step, in the first process, if there is one."""
        images = grid = None
        if self._pipeline is not None:
            pipeline = self._pipeline.with_params(state.ema)
            try:
                seed = self._settings.seed
                images = (
                    pipeline.text_to_image(self._prompts, seed=seed)
                    if self._small is None
                    else pipeline.upsample(self._prompts, self._small, seed=seed)
                )
            except NotFiniteError as error:  # no reason to end the training
                LOGGER.warning("no samples of step %d: %s", step, error)
        if not is_first():
            return None
        if images is not None:
            grid = pictures.caption_grid(images, self._prompts, columns=4, scale=None)
            with checkpoints.writing(self._workdir, f"samples/{step:08d}.png"):
                (self._workdir / "samples").mkdir(exist_ok=True)
                with replacing(self._workdir / "samples" / f"{step:08d}.png") as path:
                    with path.open("wb") as file:
                        grid.save(file, format="PNG")
        # Drawn from and to local files, wherever the workdir is.
        with (
            checkpoints.writing(self._workdir, "curves.png"),
            tempfile.TemporaryDirectory() as scratch,
        ):
            local = pathlib.Path(scratch)
            (local / "metrics.jsonl").write_text((self._workdir / "metrics.jsonl").read_text())
            pictures.plot_curves(local / "metrics.jsonl", local / "curves.png")
            for drawn in local.glob("curves.png"):
                with replacing(self._workdir / "curves.png") as file:
                    file.write_bytes(drawn.read_bytes())
        return grid


def small_pictures(
    settings: Settings, count: int = 8
) -> tuple[list[str], UInt8[np.ndarray, "B H W 3"]]:
    """Captions and low-resolution pictures of the first held-out records, or where there are none
    of the first training records, for an upsampler's samples.
    """
    source = make_source(settings.data, settings.data.kind.splits(settings.data)[-1])
    records = [source[i] for i in range(min(count, len(source)))]
    images = np.stack([record["image"] for record in records])
    return [record["caption"] for record in records], shrink(
        images, settings.super_resolution.factor
    )


def default_prompts(data: DataConfig, count: int = SHOWN) -> list[str]:
    """Captions of the first training records, in the loader's own kind of words."""
    source = make_source(data, "train")
    return [source[i]["caption"] for i in range(min(count, len(source)))]
