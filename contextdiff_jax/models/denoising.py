"""Denoise functions of a model: its estimates of x0 and of r, guidance, and bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from contextdiff_jax import diffusion
from contextdiff_jax.diffusion.guidance import PredictFn
from contextdiff_jax.diffusion.process import MOTIONS
from contextdiff_jax.diffusion.samplers import ContextFn, DenoiseFn, KeepFn
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.models.context import ContextConfig
from contextdiff_jax.models.contextdiff import ContextDiffusion

ReadFn = Callable[[Array], Array]  # from a time to what networks read of it


def related(caption: str, true: Captions, hide: Callable[[Captions], Captions]) -> Captions:
    """The captions that r reads: the true ones, or with `dropped` (`diffusion.Process.caption`)
    those that the denoiser reads, `hide(true)`.
    """
    return hide(true) if caption == "dropped" else true


def empty_like(captions: Captions, null: Captions) -> Captions:
    """`null`, of one caption, once for each row of `captions`."""
    return jax.tree.map(lambda one, all: jnp.broadcast_to(one, all.shape), null, captions)


class Rows(NamedTuple):
    """The inputs of a batch's rows.

    They are the denoiser's captions, the relational network's, and the channels beside x. With
    guidance a batch holds all branches, side by side (`diffusion.interleave`).
    """

    text: Captions
    related: Captions
    beside: Float[ArrayLike, "B H W E"] | None

    @classmethod
    def of(
        cls,
        texts: Sequence[Captions],
        beside: Float[ArrayLike, "B H W E"] | None = None,
        caption: str = "true",
    ) -> Rows:
        """The rows of a branch for each of `texts`, the first of which is the true captions;
        `caption`: what r reads (`related`).
        """
        true, count = texts[0], len(texts)
        if count == 1:
            return cls(true, true, beside)
        text = jax.tree.map(diffusion.interleave, *texts)
        true, beside = jax.tree.map(lambda a: diffusion.interleave(*[a] * count), (true, beside))
        return cls(text, related(caption, true, lambda true: text), beside)

    def widen(self, x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B H W C2"]:
        """The denoiser's input."""
        return x if self.beside is None else jnp.concatenate([x, self.beside], axis=-1)


def is_guided(guidance: float | Float[Array, ""]) -> bool:
    """Whether guidance needs other branches: a scale of 1 doesn't; a traced one may be any."""
    return isinstance(guidance, jax.Array) or guidance != 1.0


def branch_texts(
    captions: Captions,
    null: Captions | None,
    negative: Captions | None,
    guidance: float | Float[ArrayLike, ""],
    by_weaker: bool,
) -> tuple[Captions, ...]:
    """The text of each branch that runs in one batch; `by_weaker`: a weaker model has the other."""
    if by_weaker or not is_guided(guidance):
        return (captions,)
    return (captions, null) if negative is None else (captions, null, negative)


def estimates_context(context: ContextConfig, head: bool, prediction_type: str) -> bool:
    """Whether the denoise function of such a model has an estimate of r: by a context `head`, from
    x0, or because the text is all that r reads.
    """
    return head or context.is_known or prediction_type not in MOTIONS


def estimate_of(
    predict: PredictFn,
    relate: ContextFn,
    schedule: diffusion.Schedule,
    prediction_type: str,
    context: ContextConfig,
    *,
    head: bool,
    shift: str,
    clip: float | None,
    clip_head: float | None = None,
) -> DenoiseFn:
    """The denoise function of a network and of its context, by the estimate of r that there is: the
    context `head`'s, r of the estimated x0, r itself where the text is all that it reads, or none.
    `clip` bounds the |x0| that r reads, `clip_head` that which comes with a head.
    """
    process = schedule, prediction_type
    if head:
        return diffusion.posterior_mean_denoise(predict, *process, clip_head, shift)
    if prediction_type not in MOTIONS:
        return diffusion.plugin_denoise(predict, relate, *process, clip)
    if context.is_known and not context.network.is_zero:
        # The text alone is read: x is only where r goes.
        return lambda x, t, s: diffusion.known_context_denoise(
            predict, lambda t: relate(x, t), *process, shift
        )(x, t, s)
    return diffusion.velocity_denoise(predict, *process)  # M, which without a context is x0


def make_estimate(
    model: ContextDiffusion,
    schedule: diffusion.Schedule,
    rows: Rows,
    prediction_type: str,
    shift: str = "quadratic",
    read: ReadFn | None = None,
    piece: int = 0,
) -> DenoiseFn:
    """The denoise function of rows, without guidance or bounds; `model` carries its estimate of r
    (a context head or not). It takes as a fourth argument what `make_keep`'s gave earlier. `read`
    is in the place of `schedule.network_time`; `piece` as in `ContextDiffusion.predict`.
    """
    read = read or schedule.network_time

    def estimate(x, t, s, deep=None):
        def predict(x, t):
            x, _ = schedule.network_input(x, t)
            return model.predict(rows.widen(x), read(t), rows.text, deep, piece)

        def relate(x0, t):
            return model.relate(x0, rows.related, read(t))

        way = estimate_of(
            predict,
            relate,
            schedule,
            prediction_type,
            model.context.config,
            head=model.backbone.context_head is not None,
            shift=shift,
            clip=1.0 if model.vae is None else None,
        )
        return way(x, t, s)

    return estimate


def make_denoise(
    model: ContextDiffusion,
    schedule: diffusion.Schedule,
    captions: Captions,
    null: Captions | None = None,
    *,
    prediction_type: str,
    shift: str = "quadratic",
    guidance: float | Float[ArrayLike, ""] = 1.0,
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[float, float] = diffusion.ALWAYS,
    negative: Captions | None = None,
    perpendicular: float = 1.0,
    weaker: DenoiseFn | None = None,
    context_scale: float = 1.0,
    dynamic_threshold: float = 0.0,
    beside: Float[ArrayLike, "B H W E"] | None = None,
    read: ReadFn | None = None,
    caption: str = "true",
    piece: int = 0,
) -> DenoiseFn:
    """The reverse process's denoise function for captions, with guidance (`diffusion.guidance`).

    Guidance leads away from `null`; with `negative` also, perpendicularly, from that; or from the
    estimate of a `weaker` model instead. Texts have a row for each caption, and their branches run
    as one batch. r reads the true caption in all, as in the forward process, or with `caption`
    `dropped` what the denoiser reads. x0 is bounded to the pictures' range; latents (a model with a
    `vae`) and M of a motion have none. `beside`: channels that a network made for inpainting reads
    after x's. `read`, `piece`: as in `make_estimate`.
    The function takes as a fourth argument what `make_keep`'s gave in an earlier step.
    """
    by_weaker = weaker is not None
    texts = branch_texts(captions, null, negative, guidance, by_weaker)

    def estimate(*texts):
        rows = Rows.of(texts, beside, caption)
        return make_estimate(model, schedule, rows, prediction_type, shift, read, piece)

    def alone(x, t, s, *kept):  # the branch of the captions, with its own part of what was kept
        own = [k[0] if by_weaker else diffusion.separate(k, len(texts))[0] for k in kept]
        return estimate(captions)(x, t, s, *own)

    denoise, scale = estimate(*texts), (guidance, guidance_rescale)
    if is_guided(guidance):
        if by_weaker:
            denoise = diffusion.autoguided(denoise, weaker, *scale)
        elif negative is not None:
            denoise = diffusion.perpendicular_negative(denoise, *scale, weight=perpendicular)
        else:
            denoise = diffusion.classifier_free(denoise, *scale)
        denoise = diffusion.within(denoise, alone, schedule, guidance_interval)
    if context_scale != 1:
        denoise = diffusion.scale_context(denoise, context_scale)
    head = model.backbone.context_head is not None
    estimated = estimates_context(model.context.config, head, prediction_type)
    bound = model.vae is None and estimated
    return diffusion.bounded(denoise, dynamic_threshold) if bound else denoise


def make_keep(
    model: ContextDiffusion,
    schedule: diffusion.Schedule,
    texts: Sequence[Captions],
    beside: Float[ArrayLike, "B H W E"] | None = None,
    read: ReadFn | None = None,
) -> KeepFn:
    """`keep(x, t)`: the coarser levels' part of the UNet, of a branch for each of `texts`.
    ValueError for a backbone without them.
    """
    if not model.backbone.keeps_coarse:
        raise ValueError(
            f"reuse: a {model.backbone.name} has no coarser levels whose part could be kept; 1"
        )
    rows, read = Rows.of(texts, beside), read or schedule.network_time

    def keep(x, t):
        if len(texts) > 1:
            x, t = (diffusion.interleave(*[a] * len(texts)) for a in (x, t))
        x, _ = schedule.network_input(x, t)
        return model.deep_features(rows.widen(x), read(t), rows.text)

    return keep
