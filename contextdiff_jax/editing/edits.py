"""The way from an inverted clip to its edits, in one batch: DDIM with the source beside them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from contextdiff_jax import diffusion
from contextdiff_jax.diffusion.process import Process
from contextdiff_jax.editing.attention import Alignment, Control, blend_mask
from contextdiff_jax.editing.denoise import first_row, make_denoise, windowed
from contextdiff_jax.editing.inversion import edit_timesteps
from contextdiff_jax.editing.settings import EditConfig, VideoConfig
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.models.denoising import empty_like
from contextdiff_jax.models.video import VideoDiffusion


def _during(
    progress: Float[np.ndarray, "S"], limits: tuple[float, float]
) -> Float[np.ndarray, "S"]:
    """1 for the steps inside a range."""
    return ((progress >= limits[0]) & (progress < limits[1])).astype(np.float32)


def sample_edits(
    model: VideoDiffusion,
    process: Process,
    path: Float[Array, "S1 1 F H W C"],
    text: Captions,
    null: Captions,
    alignment: Alignment,
    video: VideoConfig,
    edit: EditConfig,
) -> tuple[Float[Array, "P F H W C"], Float[Array, "P F H W"]]:
    """(clips, attention maps of the blended words) of `text`, whose first row is the source's.

    The source row is set to the inversion's own `path` at each step, so what is taken from it, its
    attention and, outside of the blend's mask, its pixels, is that of the true clip (as direct
    inversion, Ju et al. 2023).
    """
    P, F, (H, W) = text.tokens.shape[0], path.shape[2], path.shape[3:5]
    schedule = process.schedule
    timesteps = edit_timesteps(schedule, edit)[::-1]
    progress = np.arange(len(timesteps)) / len(timesteps)
    ranges = [
        _during(progress, limits)
        for limits in (edit.cross_range, edit.self_range, edit.blend_range)
    ]
    controlled = edit.control != "none" or bool(edit.reweight) or bool(edit.blend)
    null = first_row(text) if edit.negative == "source" else null

    def network(x, t, s, cross_on, self_on):
        control = None
        if controlled:
            copied = edit.control != "none"
            control = Control(alignment, cross_on * copied, self_on * copied, edit.self_tokens)
        out = make_denoise(
            model, process, text, empty_like(text, null), guidance=edit.guidance, control=control
        )(x, t, s)
        return out, control.mean_map((H, W)) if controlled else jnp.zeros((P, x.shape[1], H, W))

    denoise = windowed(network, F, video.window, video.overlap)

    def step(carry, inputs):
        x, maps = carry
        t, s, source, cross_on, self_on, blend_on = inputs
        t, s = (jnp.full((P,), index) for index in (t, s))
        out, new = denoise(x, t, s, cross_on, self_on)
        mean = diffusion.q_posterior(
            schedule, out.x0, x, out.context_t, out.context_s, t, s, 0.0, process.shift
        ).mean
        maps = maps + new
        if edit.blend:
            mask = jnp.where(blend_on > 0, blend_mask(maps, edit.blend_threshold), 1.0)
            mean = source + mask * (mean - source)
        return (mean.at[0].set(source[0]), maps), None

    start = jnp.broadcast_to(path[-1], (P, *path.shape[2:]))
    inputs = (timesteps, np.append(timesteps[1:], schedule.t_min), path[:-1][::-1], *ranges)
    (x, maps), _ = jax.lax.scan(step, (start, jnp.zeros((P, F, H, W))), inputs)
    return x, maps / len(timesteps)
