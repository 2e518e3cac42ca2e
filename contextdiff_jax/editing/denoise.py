"""The denoise function of a clip: context, guidance, windows over long clips, attention control."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from contextdiff_jax import diffusion
from contextdiff_jax.diffusion.process import Process
from contextdiff_jax.diffusion.samplers import DenoiseFn
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.models.denoising import estimate_of, related
from contextdiff_jax.models.frames import AnyControl
from contextdiff_jax.models.video import VideoDiffusion


def first_row(text: Captions) -> Captions:
    """The first prompt alone, the source's."""
    return jax.tree.map(lambda a: a[:1], text)


def join(first: Captions, second: Captions) -> Captions:
    """Both prompts' rows."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)


def window_weights(
    frames: int, window: int, overlap: int
) -> tuple[Int[np.ndarray, "W"], Float[np.ndarray, "W window"]]:
    """(first frames, weights of their frames) of windows that cover a longer clip; the weights of a
    frame sum to 1.

    Windows start every window - overlap frames, the last ends with the clip. Inside an overlap one
    fades into the next.
    """
    starts = np.array([*range(0, frames - window, window - overlap), frames - window])
    ramp = np.minimum(np.arange(1, window + 1), overlap + 1) / (overlap + 1)
    weights = np.tile(np.minimum(ramp, ramp[::-1]), (len(starts), 1))
    of_window = starts[:, None] + np.arange(window)
    total = np.bincount(of_window.ravel(), weights.ravel())
    return starts, (weights / total[of_window]).astype(np.float32)


def windowed(
    function: Callable[..., Any], frames: int, window: int, overlap: int
) -> Callable[..., Any]:
    """function(x, ...) on windows of x's frames, one after another; its results, trees of
    [B, F, ...], are blended. A clip that fits in one window is given to `function` as it is.
    """
    if not window or frames <= window:
        return function
    parts = window_weights(frames, window, overlap)

    def blended(x, *rest):
        def seen(start):
            return function(jax.lax.dynamic_slice_in_dim(x, start, window, axis=1), *rest)

        def add(total, part):
            start, weight = part

            def place(total, y):
                before = jax.lax.dynamic_slice_in_dim(total, start, window, axis=1)
                after = before + y * weight.reshape(1, -1, *[1] * (y.ndim - 2))
                return jax.lax.dynamic_update_slice_in_dim(total, after, start, axis=1)

            return jax.tree.map(place, total, seen(start)), None

        empty = jax.tree.map(
            lambda y: jnp.zeros((y.shape[0], frames, *y.shape[2:]), y.dtype),
            jax.eval_shape(seen, parts[0][0]),
        )
        return jax.lax.scan(add, empty, parts)[0]

    return blended


def make_branches(
    model: VideoDiffusion,
    process: Process,
    text: Captions,
    r_text: Captions,
    control: AnyControl | None = None,
) -> DenoiseFn:
    """Denoises rows of clips, each by its own text; r reads `r_text`."""

    schedule = process.schedule

    def predict(x, t):
        return model.predict(*schedule.network_input(x, t), text, control)

    def relate(x0, t):
        return model.context(x0, r_text.tokens, r_text.mask, schedule.network_time(t))

    return estimate_of(
        predict,
        relate,
        schedule,
        process.prediction_type,
        model.context.image.config,
        head=model.backbone.context_head is not None,
        shift=process.shift,
        clip=model.bound,
        clip_head=model.bound,
    )


def make_denoise(
    model: VideoDiffusion,
    process: Process,
    text: Captions,
    null: Captions | None = None,
    *,
    guidance: float = 1.0,
    control: AnyControl | None = None,
) -> DenoiseFn:
    """`denoise(x, t, s)` of P clips [P, F, H, W, C]. With guidance other than 1 the rows of `null`
    follow those of `text` in one batch of 2 P: a control sees both.
    """
    if guidance == 1.0 or null is None:
        return make_branches(model, process, text, text, control)
    both = join(text, null)
    r_text = related(process.caption, join(text, text), lambda true: both)
    branches = make_branches(model, process, both, r_text, control)
    guided = diffusion.classifier_free(
        branches,
        guidance,
        join=lambda a, b: jnp.concatenate([a, b]),
        split=lambda both: jnp.split(both, 2),
    )

    def denoise(x, t, s):
        out = guided(x, t, s)
        if model.bound is None or not process.estimates_context:  # M of a motion has no bound
            return out
        return out._replace(x0=jnp.clip(out.x0, -model.bound, model.bound))

    return denoise
