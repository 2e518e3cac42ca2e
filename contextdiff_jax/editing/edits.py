"""The way from a clip to its edits, in one batch with the source beside them.

Two movers share the network's calls, attention control and blending. `sample_edits` samples each
row by DDIM from the last state of the source's path. `flow_edits` inverts nothing: it moves the
difference delta between edit and source, by the difference of their estimates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from contextdiff_jax import diffusion
from contextdiff_jax.diffusion.process import Process
from contextdiff_jax.diffusion.protocols import Denoised
from contextdiff_jax.editing.attention import Alignment, Control, blend_mask, difference_map
from contextdiff_jax.editing.denoise import first_row, make_denoise, windowed
from contextdiff_jax.editing.inversion import edit_timesteps, invert, noised
from contextdiff_jax.editing.settings import DIFFERENCE, EditConfig, VideoConfig
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.models.denoising import empty_like
from contextdiff_jax.models.video import VideoDiffusion


class Row(NamedTuple):
    """What a step of all rows is given, of one time."""

    t: Real[Array, ""]
    s: Real[Array, ""]
    cross_on: Float[Array, ""]
    self_on: Float[Array, ""]
    blend_on: Float[Array, ""]


def _during(
    progress: Float[np.ndarray, "S"], limits: tuple[float, float]
) -> Float[np.ndarray, "S"]:
    """1 for the steps inside a range."""
    return ((progress >= limits[0]) & (progress < limits[1])).astype(np.float32)


def _plan(schedule: diffusion.Schedule, edit: EditConfig) -> Row:
    """The steps' times and ranges, the noisiest first, [S] each."""
    t = edit_timesteps(schedule, edit)[::-1]
    progress = np.arange(len(t)) / len(t)
    ranges = (_during(progress, r) for r in (edit.cross_range, edit.self_range, edit.blend_range))
    return Row(t, np.append(t[1:], schedule.t_min), *ranges)


Estimate = Callable[[Float[Array, "P F H W C"], Row], tuple[Denoised, Float[Array, "P F H W"]]]


def _make_estimate(
    model: VideoDiffusion,
    process: Process,
    text: Captions,
    null: Captions,
    alignment: Alignment,
    edit: EditConfig,
) -> Estimate:
    """`estimate(x, row)` of frames that the network sees at a time: `Denoised` of all rows, and the
    map that blending goes by.
    """
    null = first_row(text) if edit.negative == "source" else null
    copied, looked_at = edit.control != "none", edit.blend not in ("", DIFFERENCE)

    def estimate(x, row):
        control = None
        if copied or edit.reweight or looked_at:
            on = (row.cross_on * copied, row.self_on * copied)
            control = Control(alignment, *on, edit.self_tokens)
        out = make_denoise(
            model, process, text, empty_like(text, null), guidance=edit.guidance, control=control
        )(x, *(jnp.full(x.shape[:1], time) for time in (row.t, row.s)))
        if edit.blend == DIFFERENCE:
            return out, difference_map(out.x0)
        return out, control.mean_map(x.shape[2:4]) if control else jnp.zeros(x.shape[:4])

    return estimate


def _mask(maps: Float[Array, "P F H W"], row: Row, edit: EditConfig) -> Float[Array, "P F H W 1"]:
    """1 where the edits may differ from the source at this step."""
    if not edit.blend:
        return jnp.ones((1, 1, 1, 1, 1))
    return jnp.where(row.blend_on > 0, blend_mask(maps, edit.blend_threshold), 1.0)


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

    The source row is set to its own `path` at each step, so what is taken from it, its attention
    and, outside of the blend's mask, its pixels, is that of the true clip (as direct inversion, Ju
    et al. 2023). With `noised` in the place of an inversion this is SDEdit (Meng et al. 2022).
    """
    schedule, P = process.schedule, text.tokens.shape[0]
    rows = _plan(schedule, edit)
    estimate = windowed(
        _make_estimate(model, process, text, null, alignment, edit),
        path.shape[2],
        video.window,
        video.overlap,
    )

    def step(carry, inputs):
        (x, maps), (row, source) = carry, inputs
        out, new = estimate(x, row)
        maps = maps + new
        t, s = (jnp.full((P,), time) for time in (row.t, row.s))
        mean = diffusion.q_posterior(
            schedule, out.x0, x, out.context_t, out.context_s, t, s, 0.0, process.shift
        ).mean
        mean = source + _mask(maps, row, edit) * (mean - source)
        return (mean.at[0].set(source[0]), maps), None

    start = jnp.broadcast_to(path[-1], (P, *path.shape[2:]))
    (x, maps), _ = jax.lax.scan(step, (start, jnp.zeros(start.shape[:4])), (rows, path[:-1][::-1]))
    return x, maps / len(rows.t)


def flow_edits(
    model: VideoDiffusion,
    process: Process,
    path: Float[Array, "S1 1 F H W C"],
    text: Captions,
    null: Captions,
    alignment: Alignment,
    video: VideoConfig,
    edit: EditConfig,
) -> tuple[Float[Array, "P F H W C"], Float[Array, "P F H W"]]:
    """`sample_edits` without an inversion, after FlowEdit (Kulikov et al. 2024), on any path.

    With z = x0 + delta, a and b the signal and noise of x_t, and D the guided estimates of x0,

    x_t = q_sample(z, r(z, c), t, noise),
    delta_s = rho delta_t + (1 - rho) (D(x_t, c) - D(x_t of the source, its c)),
    rho = b_s a_t / (a_s b_t),

    which is the straight path's motion of x_t / a_t, in which DDIM is Euler's method on every path.
    The context moves with z: each row's process is the one of its own caption. The noise is drawn
    anew at each step, one for all rows. Row 0 stays the source, the only state that `path` needs.
    """
    schedule, P, x0 = process.schedule, text.tokens.shape[0], path[0]
    rows, key = _plan(schedule, edit), jax.random.key(edit.seed)
    estimate = _make_estimate(model, process, text, null, alignment, edit)

    def noised_estimate(z_and_noise, row):
        z, noise = jnp.split(z_and_noise, 2, axis=-1)  # one array, which windows cut together
        t = jnp.full((P,), row.t)
        r = model.context(z, text.tokens, text.mask, schedule.network_time(t))
        out, new = estimate(diffusion.q_sample(schedule, z, r, t, noise, process.shift), row)
        return out.x0, new

    run = windowed(noised_estimate, x0.shape[1], video.window, video.overlap)

    def step(carry, inputs):
        (delta, maps), (i, row) = carry, inputs
        noise = jax.random.normal(jax.random.fold_in(key, i), x0.shape)
        z_and_noise = jnp.concatenate([x0 + delta, jnp.broadcast_to(noise, delta.shape)], axis=-1)
        estimates, new = run(z_and_noise, row)
        maps = maps + new
        (a_t, b_t), (a_s, b_s) = (
            (jnp.sqrt(schedule.alpha_bar(time)), schedule.sigma(time)) for time in (row.t, row.s)
        )
        rho = b_s * a_t / (a_s * b_t)
        delta = rho * delta + (1 - rho) * (estimates - estimates[:1])
        return (_mask(maps, row, edit) * delta, maps), None

    start = jnp.zeros((P, *x0.shape[1:]))
    inputs = np.arange(len(rows.t)), rows
    (delta, maps), _ = jax.lax.scan(step, (start, jnp.zeros(start.shape[:4])), inputs)
    return x0 + delta, maps / len(rows.t)


@dataclasses.dataclass(frozen=True)
class Mover:
    """A way from the clip to its edits.

    Attributes:
      make_path: the source's states, from the clip to the noisiest, as `invert`.
      move: the edits along it, as `sample_edits`.
      keeps_source: the clip's own prompt gives the clip back as it is: nothing is reconstructed.
    """

    make_path: Callable[..., Float[Array, "S1 1 F H W C"]]
    move: Callable[..., tuple[Float[Array, "P F H W C"], Float[Array, "P F H W"]]]
    keeps_source: bool = False


# What `edit.method` names.
MOVERS = {
    "inversion": Mover(invert, sample_edits),
    "sdedit": Mover(noised, sample_edits),
    "flowedit": Mover(lambda model, process, x0, *_: x0[None], flow_edits, keeps_source=True),
}
