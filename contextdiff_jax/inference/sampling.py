"""One road from token ids to pictures, as a pure function to be jitted.

    ids -> captions -> [picture -> x0 -> x_t | noise] -> sampler(denoise) -> x0 -> picture

Every way to sample takes it: from noise, from a picture (image to image), into a hole of a picture
(inpainting). The context is exact in all three: a picture is noised by the forward process with its
r, and what an inpainted picture keeps follows the estimate of r that the sampler has. An upsampler
samples from noise, and its captions have the low-resolution picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Real, UInt8

from contextdiff_jax import diffusion
from contextdiff_jax.diffusion.process import Process
from contextdiff_jax.diffusion.samplers import DenoiseFn, KeepFn, ProjectFn, takes
from contextdiff_jax.diffusion.steps import Steps
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.models.contextdiff import ContextDiffusion
from contextdiff_jax.models.denoising import (
    ReadFn,
    Rows,
    branch_texts,
    empty_like,
    make_denoise,
    make_estimate,
    make_keep,
)
from contextdiff_jax.models.low_resolution import LowResolution, enlarged
from contextdiff_jax.models.pixels import to_unit

Preview = Callable[[Real[Array, ""], Float[Array, "B H W C"]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A way to make pictures: all that a compiled program depends on beside its arrays.

    Attributes:
      sampler: a name in `diffusion.samplers.SAMPLERS`. eta: its noise.
      guided: all branches of guidance are computed.
      guidance_rescale, guidance_interval, context_scale, dynamic_threshold, perpendicular: as
        `make_denoise`; the last counts where there is a negative text beside the empty one.
      reuse: the UNet's coarser levels are computed in every so many steps (DeepCache).
      tile: large pictures go through the autoencoder in tiles.
      piece: side of the tiles in which the network sees x, 0: all of it. r and all that follows the
        network (thresholds, guidance) are of the whole x.
      from_noise: sampling begins at noise, though there is a picture (whose hole it fills).
    """

    sampler: str = "ddim"
    eta: float = 0.0
    guided: bool = True
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = diffusion.ALWAYS
    context_scale: float = 1.0
    dynamic_threshold: float = 0.0
    perpendicular: float = 0.0
    reuse: int = 1
    tile: bool = False
    piece: int = 0
    from_noise: bool = True


class Text(NamedTuple):
    """Token ids and mask of the captions, and of what guidance leads away from: one row for all or
    one a caption. Without `null_ids` it leads away from zeros in the place of the text's states.
    `negative_ids` are of the text that it leads away from perpendicularly, if there is one.
    """

    ids: Int[Array, "B *E L"]
    mask: Bool[Array, "B L"]
    null_ids: Int[Array, "N *E L"] | None
    null_mask: Bool[Array, "N L"] | None
    negative_ids: Int[Array, "N *E L"] | None = None
    negative_mask: Bool[Array, "N L"] | None = None


class Weaker(NamedTuple):
    """Another model that guides this one (autoguidance), of the same schedule and shift, and the
    captions as it reads them.
    """

    model: ContextDiffusion
    prediction_type: str
    ids: Int[Array, "B *E L"]
    mask: Bool[Array, "B L"]


class Picture(NamedTuple):
    """A picture to start from; with a mask, to be painted anew where it is True."""

    pixels: UInt8[Array, "B H W 3"]
    mask: Bool[Array, "B H W"] | None = None


class Small(NamedTuple):
    """The low-resolution pictures that an upsampler enlarges, the level of the noise on them, and
    the keys of each picture's noise.
    """

    pixels: UInt8[Array, "B H W 3"]
    level: Float[Array, ""]
    keys: PRNGKeyArray

    def enlarged(self, model: ContextDiffusion, height: int, tile: bool) -> LowResolution:
        """What networks read of them beside an x0 of that height."""
        small = model.from_pixels(to_unit(self.pixels), tile)
        noise = jax.vmap(lambda key: jax.random.normal(key, small.shape[1:]))(self.keys)
        level = jnp.broadcast_to(self.level, small.shape[:1])
        return enlarged(small, height // small.shape[1], level, noise)


def make_sample(process: Process, method: Method, preview: Preview | None = None) -> Callable:
    """`sample(model, noise, text, steps, guidance, key, picture, weaker, small) -> pictures
    [B, H, W, 3]`, about [-1, 1].

    The text is encoded once, the loop is one scan. `noise` is [B, H, W, C] in the model's space;
    `key` is read by samplers with noise only, `guidance` and `weaker` only where `method.guided`.
    `preview(t, x0)` is called on the host with the estimate of x0 at each step.
    """
    run, shift = diffusion.get_sampler(method.sampler), process.shift

    def sample(
        model: ContextDiffusion,
        noise: Float[Array, "B H W C"],
        text: Text,
        steps: Steps,
        guidance: Float[Array, ""],
        key: PRNGKeyArray,
        picture: Picture | None = None,
        weaker: Weaker | None = None,
        small: Small | None = None,
    ) -> Float[Array, "B H2 W2 3"]:
        low = None if small is None else small.enlarged(model, noise.shape[1], method.tile)
        captions, null, negative = encode(model, text, low)
        schedule = steps.schedule(process.schedule)
        read = steps.reader(schedule)
        start = Start.of(model, schedule, shift, method, captions, noise, steps, picture)
        scale = guidance if method.guided else 1.0
        weaker = weaker if method.guided else None
        guide = Guide.of(weaker, schedule, shift, start.beside, read, low, method.piece)
        texts = captions, null, negative
        denoise = guided(model, process, method, texts, scale, schedule, read, start.beside, guide)
        options = {}  # a sampler needs to know those alone that are used
        if steps.ends is not None and takes(method.sampler, "next_timesteps"):
            options["next_timesteps"] = steps.ends
        elif steps.ends is not None and takes(method.sampler, "end"):
            options["end"] = steps.ends[-1]
        if method.reuse > 1:
            texts = branch_texts(*texts, scale, guide.estimate is not None)
            keep = guide.beside(make_keep(model, schedule, texts, start.beside, read))
            options["reuse"] = diffusion.Reuse(method.reuse, keep)
        if start.known is not None:
            options["project"] = keep_known(start.known, schedule, shift)
        if preview is not None:
            denoise = watched(denoise, preview)
        x0 = run(denoise, start.x, schedule, steps.timesteps, method.eta, key, shift, **options)
        return model.to_pixels(x0, method.tile)

    return sample


class Guide(NamedTuple):
    """The weaker model's part of a step, if there is one: its estimate, and what it keeps."""

    estimate: DenoiseFn | None = None
    keep: KeepFn | None = None

    @classmethod
    def of(
        cls,
        weaker: Weaker | None,
        schedule: diffusion.Schedule,
        shift: str,
        beside: Float[Array, "B H W E"] | None,
        read: ReadFn,
        low: LowResolution | None = None,
        piece: int = 0,
    ) -> Guide:
        """Both, of the captions alone."""
        if weaker is None:
            return cls()
        model = weaker.model
        texts = (model.encode(weaker.ids, weaker.mask)._replace(low=low),)
        rows, kind = Rows.of(texts, beside), weaker.prediction_type
        estimate = make_estimate(model, schedule, rows, kind, shift, read, piece)
        return cls(estimate, make_keep(model, schedule, texts, beside, read))

    def beside(self, keep: KeepFn) -> KeepFn:
        """`keep` of the stronger model, in a pair with its own (`diffusion.autoguided`)."""
        return keep if self.keep is None else lambda x, t: (keep(x, t), self.keep(x, t))


def guided(
    model: ContextDiffusion,
    process: Process,
    method: Method,
    texts: tuple[Captions, Captions, Captions | None],
    scale: float | Float[Array, ""],
    schedule: diffusion.Schedule,
    read: ReadFn,
    beside: Float[Array, "B H W E"] | None = None,
    guide: Guide | None = None,
) -> DenoiseFn:
    """The denoise function of the method for texts (`encode`), on the steps' own schedule."""
    captions, null, negative = texts
    guide = guide or Guide()
    return make_denoise(
        model,
        schedule,
        captions,
        null,
        prediction_type=process.prediction_type,
        shift=process.shift,
        guidance=scale,
        guidance_rescale=method.guidance_rescale,
        guidance_interval=method.guidance_interval,
        negative=negative,
        perpendicular=method.perpendicular,
        weaker=guide.estimate,
        context_scale=method.context_scale,
        dynamic_threshold=method.dynamic_threshold,
        beside=beside,
        read=read,
        caption=process.caption,
        piece=method.piece,
    )


def encode(
    model: ContextDiffusion, text: Text, low: LowResolution | None = None
) -> tuple[Captions, Captions, Captions | None]:
    """The captions, what guidance leads away from, and what it does perpendicularly; as many. All
    have the low-resolution pictures.
    """
    captions, negative = model.encode(text.ids, text.mask), None
    if text.null_ids is None:
        null = captions.hidden()
    else:
        null = empty_like(captions, model.encode(text.null_ids, text.null_mask))
    if text.negative_ids is not None:
        negative = empty_like(captions, model.encode(text.negative_ids, text.negative_mask))
        negative = negative._replace(low=low)
    return captions._replace(low=low), null._replace(low=low), negative


class Known(NamedTuple):
    """The part that an inpainted picture keeps: x0, the noise for it, and where (1: new)."""

    x0: Float[Array, "B H W C"]
    noise: Float[Array, "B H W C"]
    hole: Float[Array, "B H W 1"]


class Start(NamedTuple):
    """The start of sampling, and what of a picture is known on the way."""

    x: Float[Array, "B H W C"]
    known: Known | None = None
    beside: Float[Array, "B H W E"] | None = None

    @classmethod
    def of(
        cls,
        model: ContextDiffusion,
        schedule: diffusion.Schedule,
        shift: str,
        method: Method,
        captions: Captions,
        noise: Float[Array, "B H W C"],
        steps: Steps,
        picture: Picture | None,
    ) -> Start:
        """Noise (about k_T r where r is known before x0 is), or the picture noised to the first of
        the steps' times by the forward process of its caption.
        """
        ts = jnp.full(noise.shape[:1], steps.timesteps[0])
        time = steps.reader(schedule)(ts)

        def from_noise():
            scale = schedule.noise_scale if steps.levels is None else steps.levels.start
            x = scale * noise
            if model.context.config.network.reads_x0:
                return x
            # r(c) is known before x0 is: x_T ~ N(k_T r, I) can be exact (0 for the kind `none`)
            r = model.relate(noise, captions, time, noise=noise)
            return x + diffusion.marginal_mean(schedule, jnp.zeros_like(x), r, ts, shift)

        if picture is None:
            return cls(from_noise())
        pixels = to_unit(picture.pixels)
        x0 = model.from_pixels(pixels, method.tile)
        if method.from_noise:
            x = from_noise()
        else:
            r = model.relate(x0, captions, time, pixels, noise)
            x = diffusion.q_sample(schedule, x0, r, ts, noise, shift)
        if picture.mask is None:
            return cls(x)
        factor = pixels.shape[1] // x0.shape[1]
        hole = picture.mask[:, ::factor, ::factor, None].astype(jnp.float32)
        if model.backbone.config.in_channels == noise.shape[-1]:
            return cls(x, Known(x0, noise, hole))
        # A network made for inpainting reads the hole and the rest of the picture, its hole grey.
        rest = model.from_pixels(jnp.where(picture.mask[..., None], 0.0, pixels), method.tile)
        return cls(x, None, jnp.concatenate([hole, rest], axis=-1))


def keep_known(known: Known, schedule: diffusion.Schedule, shift: str) -> ProjectFn:
    """Puts the known part back after a step, at the level of noise where the next one begins: its
    own noise, shifted by the sampler's estimate of r.
    """

    def project(x, t, context):
        noised = diffusion.q_sample(schedule, known.x0, context, t, known.noise, shift)
        return known.hole * x + (1 - known.hole) * noised

    return project


def watched(denoise: DenoiseFn, preview: Preview) -> DenoiseFn:
    """`denoise`, which shows its estimate of x0 to `preview`."""

    def watching(x, t, s, *kept):
        out = denoise(x, t, s, *kept)
        jax.debug.callback(preview, t[0], out.x0)
        return out

    return watching
