"""`Pipeline`: a trained run or a Stable Diffusion folder, opened to make pictures.

    from contextdiff_jax import Pipeline

    pipeline = Pipeline.open("runs/shapes")
    pictures = pipeline.text_to_image(["a large red circle"], num=4, seed=0)  # uint8 [4, H, W, 3]

Both kinds go the same way (`inference.sampling`): a Stable Diffusion folder is a model whose
context is `none`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int, PyTree, UInt8
from tqdm import tqdm

from contextdiff_jax.data.folder_tokenizer import warn_of_cut
from contextdiff_jax.diffusion.samplers import check_takes
from contextdiff_jax.diffusion.steps import Steps
from contextdiff_jax.inference import sharing
from contextdiff_jax.inference.jitted import Listener, jitted
from contextdiff_jax.inference.opened import Opened
from contextdiff_jax.inference.programs import kept
from contextdiff_jax.inference.request import Plan, Request
from contextdiff_jax.inference.sampling import Method, Picture, Text
from contextdiff_jax.runtime.terminal import clock
from contextdiff_jax.settings import SampleConfig

if TYPE_CHECKING:
    from contextdiff_jax.inference.cascade import Cascade

Pictures = UInt8[np.ndarray, "B H W 3"]


class NotFiniteError(ValueError):
    """Samples that would be black pictures: the networks, or the guidance, ran away."""


class Pipeline:
    """An opened model, its programs, and the devices they run on.

    The options that all three ways to sample take are `Request`'s, and by name any field of
    `settings.SampleConfig` (`sampler`, `steps`, `eta`, `guidance`, `guidance_rescale`, ...); where
    one is None or absent the model's own value is taken.
    """

    def __init__(
        self, opened: Opened, mesh: Mesh | None = None, programs: epath.PathLike | None = None
    ):
        """`mesh`: pictures are spread over it as a training batch is, and every process gets them
        all. `programs`: a folder where traced programs are kept.
        """
        self.opened, self._mesh, self._programs = opened, mesh, programs
        self._made: dict[Any, Callable] = {}
        self._listener, self._told = Listener(), set()

    @classmethod
    def open(cls, path: str | Path, weights: str = "ema", **options: Any) -> Pipeline:
        """The pipeline of a run's workdir, of a folder that `save` wrote, or of a Stable Diffusion
        folder (1.x, 2.x, XL, 3, 3.5), as diffusers wrote it or converted; or of a name: `emoji`,
        which ships with the package, or `ORG/NAME@REVISION` of the hub.

        Args:
          weights: of a run: `ema`, or `params`, the last step's own.
          options: `ema_length` of a run's average (docs/sampling.md); `dtype` and the like of a
            Stable Diffusion folder's networks (`pretrained.model.Options`).

        Raises ValueError, one line, for a folder that is neither, or a part that is missing,
        damaged or doesn't fit.
        """
        from contextdiff_jax.inference.opening import open_folder

        return open_folder(path, weights, **options)

    @classmethod
    def cascade(
        cls, parts: Sequence[str | Path | Pipeline], weights: str = "ema", **options: Any
    ) -> Cascade:
        """A base that draws small pictures, and upsamplers that enlarge them, each as `open` reads
        it or a pipeline that is open.

        Raises ValueError, one line, for a part that doesn't fit the one before.
        """
        from contextdiff_jax.inference.cascade import Cascade

        opened = [
            part if isinstance(part, Pipeline) else cls.open(part, weights, **options)
            for part in parts
        ]
        return Cascade(opened)

    def save(self, folder: str | Path, **options: Any) -> None:
        """Writes a new folder that `open` reads, on any machine: `inference.sharing.save`."""
        sharing.save(self.opened, folder, **options)

    def push_to_hub(self, name: str, **options: Any) -> str:
        """Uploads what `save` writes to `ORG/NAME` of the hub: `inference.sharing.push_to_hub`."""
        return sharing.push_to_hub(self.opened, name, **options)

    @property
    def source(self) -> str:
        """Where the model came from, for people."""
        return self.opened.source

    def with_params(self, params: PyTree) -> Pipeline:
        """The same model with other parameters of the same shapes; compiled programs are shared."""
        weights = (params, *self.opened.weights[1:])
        opened = dataclasses.replace(self.opened, weights=weights)
        other = Pipeline(opened, self._mesh, self._programs)
        other._made, other._listener = self._made, self._listener
        return other

    def guided_by(self, weaker: Pipeline) -> Pipeline:
        """The same model with autoguidance (Karras et al. 2024): guidance leads away from what a
        weaker model makes of the same prompt.

        Raises ValueError, one line, for one of another process or other shapes.
        """
        return Pipeline(self.opened.guided_by(weaker.opened), self._mesh, self._programs)

    def text_to_image(
        self, prompts: Sequence[str], *, size: tuple[int, int] | None = None, **options: Any
    ) -> Pictures:
        """Pictures of `size` (height, width), by default the model's own, from noise."""
        return self._sample(*self.plan(prompts, size=size, **options), True)

    def image_to_image(
        self,
        prompts: Sequence[str],
        images: Pictures,
        *,
        strength: float | None = None,
        **options: Any,
    ) -> Pictures:
        """Pictures from `images`, one a prompt, noised to where the last `strength` (0.8) of the
        steps begins.
        """
        request, chosen = self._read(prompts, options)
        shape = self._shape_of(images, request)
        steps = self._steps(chosen, shape, 0.8 if strength is None else strength)
        return self._sample(request, chosen, shape, steps, False, images)

    def inpaint(
        self,
        prompts: Sequence[str],
        images: Pictures,
        masks: Float[np.ndarray, "B H W"],
        *,
        strength: float | None = None,
        **options: Any,
    ) -> Pictures:
        """`images` painted anew where `masks` are at least 0.5. At `strength` 1, the default, the
        hole begins as noise.

        A network made for inpainting reads the mask and the rest of the picture; for another the
        rest is put back, noised, after each step.
        """
        request, chosen = self._read(prompts, options)
        if not self.opened.only_inpaints:
            check_takes(chosen.sampler, "project", "inpainting")
            if not self.opened.process.estimates_context:
                raise ValueError(
                    "inpainting: what is kept follows the estimate of r, and context.estimate="
                    "'velocity' has none; a run with 'posterior_mean'"
                )
        shape = self._shape_of(images, request)
        if tuple(masks.shape) != tuple(images.shape[:3]):
            raise ValueError(
                f"masks: shape {tuple(masks.shape)}; must be the images', {tuple(images.shape[:3])}"
            )
        strength = 1.0 if strength is None else strength
        steps = self._steps(chosen, shape, strength)
        holes = np.asarray(masks) >= 0.5
        return self._sample(request, chosen, shape, steps, strength == 1, images, holes)

    def upsample(self, prompts: Sequence[str], images: Pictures, **options: Any) -> Pictures:
        """`images`, one a prompt, as an upsampler enlarges them by its factor
        (`super_resolution.factor`). The option `augmentation` is the level of the noise that it is
        to see on them: the higher, the more it makes up itself.
        """
        images = np.asarray(images)
        plan = self.plan(prompts, small=images.shape[1:3], **options)
        plan.request.check_images(images)
        return self._sample(*plan, True, small=images)

    def plan(
        self,
        prompts: Sequence[str],
        *,
        size: tuple[int, int] | None = None,
        small: tuple[int, int] | None = None,
        **options: Any,
    ) -> Plan:
        """What `text_to_image` would draw, or `upsample` for pictures of height and width `small`;
        nothing is computed. Raises their errors.
        """
        request, chosen = self._read(prompts, options)
        config = self.opened.super_resolution
        self.opened.check_able(request, chosen, enlarges=small is not None)
        if small is not None:
            config.check_level(chosen.augmentation)
            self.opened.piece_of(request)
            size = config.factor * small[0], config.factor * small[1]
        shape = self.latent_shape(size)
        request.checked_noise(shape)
        return Plan(request, chosen, shape, self._steps(chosen, shape))

    def options(self, **given: Any) -> SampleConfig:
        """The options of sampling: the given ones; the model's own where one is None."""
        given = {name: value for name, value in given.items() if value is not None}
        return self.opened.options.changed(prompts=(), **given)

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """[H, W, C] of what is diffused for pictures of `size`, by default the model's own.

        Raises ValueError for a size that the model's factor doesn't divide.
        """
        factor, channels = self.opened.factor, self.opened.shape[-1]
        if size is None:
            return self.opened.shape
        step = factor * self.opened.multiple
        if any(side < step or side % step for side in size):
            raise ValueError(f"size={tuple(size)}: height and width must be multiples of {step}")
        return size[0] // factor, size[1] // factor, channels

    def _read(
        self, prompts: Sequence[str], options: dict[str, Any]
    ) -> tuple[Request, SampleConfig]:
        request, others = Request.split(prompts, options)
        return request, self.options(**others)

    def _shape_of(self, images: Pictures, request: Request) -> tuple[int, int, int]:
        request.check_images(images)
        return self.latent_shape(images.shape[1:3])

    def _steps(
        self, options: SampleConfig, shape: tuple[int, int, int], strength: float = 1.0
    ) -> Steps:
        """The last `strength` of the steps."""
        count = min(int(options.steps * strength), options.steps)
        if self.opened.rounds_strength_up:
            count = options.steps - int(max(options.steps - options.steps * strength, 0))
        if not 0 < strength <= 1 or count < 1:
            raise ValueError(
                f"strength={strength}: must lie in (0, 1] and leave at least one of "
                f"{options.steps} steps"
            )
        return self.opened.find_steps(options, shape).last(count)

    def _sample(
        self,
        request: Request,
        options: SampleConfig,
        shape: tuple[int, int, int],
        steps: Steps,
        from_noise: bool,
        images: Pictures | None = None,
        holes: Bool[np.ndarray, "B H W"] | None = None,
        small: Pictures | None = None,
    ) -> Pictures:
        """Batch after batch; the last is filled up: one shape, one compilation."""
        enlarges, fills = small is not None, holes is not None
        self.opened.check_able(request, options, enlarges=enlarges, fills=fills)
        scale = max(options.guidance, self.opened.least_guidance)
        options = dataclasses.replace(options, guidance=scale)
        tiles = {"tile": bool(request.tile), "piece": self.opened.piece_of(request)}
        more = {"from_noise": from_noise, "perpendicular": request.perpendicular}
        method = method_of(options, **tiles, **more)
        texts, noise, made = request.texts, request.checked_noise(shape), []
        noise_key, sampler_key = jax.random.split(request.key)
        width = min(request.batch_size, len(texts))
        starts = range(0, len(texts), width)
        several = None if len(starts) > 1 else True
        for start in tqdm(starts, desc="samples", leave=False, disable=several):
            rows = np.minimum(np.arange(start, start + width), len(texts) - 1)
            picture = None if images is None else Picture(images[rows], _rows(holes, rows))
            number = request.first + start
            # numpy, which every process has alike: arrays of one device can't enter a program of
            # many processes.
            arguments = (
                self.opened.weights,
                np.asarray(jax.random.key_data(noise_key)),
                np.arange(number, number + width),
                _rows(noise, rows),
                self.encode(request, rows),
                steps,
                np.float32(scale),
                np.asarray(jax.random.key_data(jax.random.fold_in(sampler_key, number))),
                picture,
                self.opened.guide_arrays([texts[i] for i in rows]) if method.guided else None,
                None if small is None else (small[rows], np.float32(options.augmentation)),
            )
            pictures, finite = self._run(request, method, shape, arguments)
            real = len(texts) - start
            _check_finite(finite[:real], texts[start:], scale)
            made.append(pictures[:real])
        return np.concatenate(made)

    def encode(self, request: Request, rows: np.ndarray) -> Text:
        """Ids of these pictures' captions, and of what guidance leads away from."""
        ids, negatives = self._encode([request.texts[i] for i in rows]), request.negatives
        if request.negative is not None:
            few = len(negatives) == 1
            negative = self._encode(negatives if few else [negatives[i] for i in rows])
            if not request.perpendicular:
                return Text(*ids, *negative)
        empty = (None, None) if self.opened.zeros_for_empty else self._encode([""])
        return Text(*ids, *empty, *(negative if request.perpendicular else ()))

    def _encode(
        self, texts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "B *E L"], Bool[np.ndarray, "B L"]]:
        """Ids and mask; what is cut off a text is told once, however often it is drawn."""
        ids, mask, lost = self.opened.encode_text(texts)
        new = {
            text: words for text, words in zip(texts, lost, strict=True) if text not in self._told
        }
        self._told.update(new)
        length = self.opened.text_length or ids.shape[-1]
        warn_of_cut(list(new), list(new.values()), length)
        return ids, mask

    def _run(
        self, request: Request, method: Method, shape: tuple[int, int, int], arguments: tuple
    ) -> tuple[Pictures, Bool[np.ndarray, "B"]]:
        if request.callback is None:
            with clock(f"drawing in {len(arguments[5].timesteps)} steps"):
                return tuple(map(np.asarray, self._program(method, shape, arguments)(*arguments)))
        times = np.asarray(arguments[5].timesteps)
        with self._listener.calling(
            lambda t, x0: request.callback(1 + int(np.abs(times - t).argmin()), np.asarray(x0))
        ):
            made = self.program(method, shape, watched=True)(*arguments)
            made = tuple(map(np.asarray, made))
            jax.effects_barrier()
        return made

    def _program(self, method: Method, shape: tuple[int, int, int], arguments: tuple) -> Callable:
        """`program`, from the folder of traced programs where there is one."""
        if self._programs is None:
            return self.program(method, shape)
        key = "kept", method, shape, jax.tree.structure(arguments), _shapes(arguments)
        if key not in self._made:
            about = (*self.opened.about, method, shape, self._mesh)
            make = functools.partial(self.program, method, shape)
            self._made[key] = kept(self._programs, "sample", about, make, *arguments)
        return self._made[key]

    def program(
        self, method: Method, shape: tuple[int, int, int], watched: bool = False
    ) -> Callable:
        """The program of such batches (`inference.jitted`)."""
        if (method, shape, watched) not in self._made:
            preview = self._listener if watched else None
            self._made[method, shape, watched] = jitted(
                self.opened, self._mesh, method, shape, preview
            )
        return self._made[method, shape, watched]


def method_of(options: SampleConfig, **more: Any) -> Method:
    """The part of the options that a compiled program depends on."""
    return Method(
        sampler=options.sampler,
        eta=options.eta,
        guided=options.guidance != 1,
        guidance_rescale=options.guidance_rescale,
        guidance_interval=tuple(options.guidance_interval),
        context_scale=options.context_scale,
        dynamic_threshold=options.dynamic_threshold,
        reuse=options.reuse,
        **more,
    )


def _check_finite(finite: Bool[np.ndarray, "B"], texts: Sequence[str], guidance: float) -> None:
    if not finite.all():
        raise NotFiniteError(
            f"{len(finite) - finite.sum()} of {len(finite)} pictures, the first for "
            f"{texts[finite.argmin()]!r}: their values are not finite; lower the guidance, "
            f"{guidance}, or train with a lower learning rate"
        )


def _rows(array: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if array is None else array[rows]


def _shapes(arguments: Any) -> tuple:
    return tuple((np.shape(leaf), str(leaf.dtype)) for leaf in jax.tree.leaves(arguments))
