"""The way from a clip to the noise that gives it back: inversion with context."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Real

from contextdiff_jax import diffusion
from contextdiff_jax.diffusion.process import Process
from contextdiff_jax.editing.denoise import make_denoise, windowed
from contextdiff_jax.editing.settings import EditConfig, VideoConfig
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.models.video import VideoDiffusion


def edit_timesteps(schedule: diffusion.Schedule, edit: EditConfig) -> Real[np.ndarray, "S"]:
    """The times that an edit visits, ascending from the first above `t_min`, index 0 of a discrete
    schedule; the largest `strength` cuts the noisiest off.

    A clip is read as a sample at `t_min`, so all start and end there.
    """
    with jax.ensure_compile_time_eval():
        ascending = np.asarray(diffusion.time_grid(schedule, edit.steps, "trailing"))[::-1]
    return ascending[ascending > schedule.t_min][: max(edit.moves)]


def invert(
    model: VideoDiffusion,
    process: Process,
    x0: Float[Array, "1 F H W C"],
    source: Captions,
    video: VideoConfig,
    edit: EditConfig,
) -> Float[Array, "S1 1 F H W C"]:
    """The clip at `t_min` and at each of `edit_timesteps`, without guidance: DDIM backwards, which
    on the straight path is Euler's method.
    """
    denoise = windowed(
        make_denoise(model, process, source), x0.shape[1], video.window, video.overlap
    )
    exact = (
        dict(iterations=edit.iterations, tolerance=edit.tolerance)
        if edit.inversion == "exact"
        else {}
    )
    timesteps = edit_timesteps(process.schedule, edit)
    _, path = diffusion.ddim_invert(
        denoise, x0, process.schedule, timesteps, process.shift, keep=True, **exact
    )
    return jnp.concatenate([x0[None], path])


def noised(
    key: PRNGKeyArray,
    model: VideoDiffusion,
    process: Process,
    x0: Float[Array, "1 F H W C"],
    source: Captions,
    video: VideoConfig,
    edit: EditConfig,
) -> Float[Array, "S1 1 F H W C"]:
    """`invert` without a network's pass: the clip at each time with one noise, the key's."""
    schedule, times = process.schedule, edit_timesteps(process.schedule, edit)
    noise = jax.random.normal(key, x0.shape)

    def at(t):
        t = jnp.full((1,), t)
        r = model.context(x0, source.tokens, source.mask, schedule.network_time(t))
        return diffusion.q_sample(schedule, x0, r, t, noise, process.shift)

    return jnp.concatenate([x0[None], jax.lax.map(at, jnp.asarray(times))])


def reconstruct(
    model: VideoDiffusion,
    process: Process,
    x: Float[Array, "1 F H W C"],
    source: Captions,
    video: VideoConfig,
    edit: EditConfig,
) -> Float[Array, "1 F H W C"]:
    """The inverted clip, sampled with its own prompt and without guidance."""
    denoise = windowed(
        make_denoise(model, process, source), x.shape[1], video.window, video.overlap
    )
    descending = edit_timesteps(process.schedule, edit)[::-1]
    following = np.append(descending[1:], process.schedule.t_min)
    return diffusion.ddim_sample(
        denoise, x, process.schedule, descending, shift=process.shift, next_timesteps=following
    )
