"""The way from a clip to its edits, in one batch with the source beside them.

Two movers share the network's calls, attention control and blending. `sample_edits` samples each
row by DDIM from the last state of the source's path. `flow_edits` inverts nothing: it moves the
difference delta between edit and source, by the difference of their estimates.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Real

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
from contextdiff_jax.runtime.keys import make_key


class Row(NamedTuple):
    """What a step of all rows is given, of one time: for each edit, 1 if it has started, and 1 for
    what happens at this step.
    """

    t: Real[Array, ""]
    s: Real[Array, ""]
    started: Float[Array, "E"]
    cross_on: Float[Array, "E"]
    self_on: Float[Array, "E"]
    blend_on: Float[Array, "E"]


def _during(
    progress: Float[np.ndarray, "S E"], limits: tuple[float, float]
) -> Float[np.ndarray, "S E"]:
    """1 for the steps inside a range."""
    return ((progress >= limits[0]) & (progress < limits[1])).astype(np.float32)


def _plan(schedule: diffusion.Schedule, edit: EditConfig, edits: int) -> Row:
    """The steps' times and ranges, the noisiest first, [S, ...] each. An edit of less strength
    starts later; its ranges are of its own steps.
    """
    t = edit_timesteps(schedule, edit)[::-1]
    # a schedule's own first time is not visited: of all its steps one less is made
    moves = np.minimum(np.broadcast_to(edit.moves, (edits,)), len(t))
    progress = (np.arange(len(t))[:, None] - (len(t) - moves)) / moves
    ranges = (edit.cross_range, edit.self_range, edit.blend_range)
    plan = (_during(progress, limits) for limits in ((0.0, 1.0), *ranges))
    return Row(t, np.append(t[1:], schedule.t_min), *plan)


Estimate = Callable[[Float[Array, "P F H W C"], Row], tuple[Denoised, Float[Array, "M F H W"]]]


def _make_estimate(
    model: VideoDiffusion,
    process: Process,
    text: Captions,
    null: Captions,
    alignment: Alignment,
    edit: EditConfig,
) -> Estimate:
    """`estimate(x, row)` of frames that the network sees at a time: `Denoised` of all rows, and the
    maps that blending goes by, as `blend_mask` takes them.
    """
    null = first_row(text) if edit.negative == "source" else null
    copied = edit.control != "none"
    looked_at = bool(edit.keep) or edit.blend not in ("", DIFFERENCE)

    def estimate_by(guidance, row, x, t, s):
        control = None
        if copied or edit.reweight or looked_at:
            on = (row.cross_on * copied, row.self_on * copied)
            control = Control(alignment, *on, edit.self_tokens)
        out = make_denoise(
            model, process, text, empty_like(text, null), guidance=guidance, control=control
        )(x, t, s)
        maps = control.mean_map(x.shape[2:4]) if looked_at else _no_maps(x)
        if edit.blend == DIFFERENCE:
            source, _, kept = jnp.split(maps, 3)
            maps = jnp.concatenate([source, difference_map(out.x0), kept])
        return out, maps

    def estimate(x, row):
        guided, alone = (
            functools.partial(estimate_by, guidance, row) for guidance in (edit.guidance, 1.0)
        )
        if edit.guidance != 1:
            guided = diffusion.within(guided, alone, process.schedule, edit.guidance_interval)
        return guided(x, *(jnp.full(x.shape[:1], time) for time in (row.t, row.s)))

    return estimate


def _no_maps(x: Float[Array, "P F H W C"]) -> Float[Array, "M F H W"]:
    """The maps before the first step, three for each edit."""
    return jnp.zeros((3 * (len(x) - 1), *x.shape[1:4]))


def _added(
    maps: Float[Array, "M F H W"], new: Float[Array, "M F H W"], row: Row
) -> Float[Array, "M F H W"]:
    """The maps' sums with those of this step, of the edits that have started."""
    return maps + jnp.tile(row.started, 3).reshape(-1, 1, 1, 1) * new


def _mask(maps: Float[Array, "M F H W"], row: Row, edit: EditConfig) -> Float[Array, "E F H W 1"]:
    """1 where the edits may differ from the source at this step: nowhere before they start."""
    started, blend_on = (on.reshape(-1, 1, 1, 1, 1) for on in (row.started, row.blend_on))
    if not edit.blends:
        return started
    return started * jnp.where(blend_on > 0, blend_mask(maps, edit), 1.0)


def _mean_maps(maps: Float[Array, "M F H W"], edit: EditConfig) -> Float[Array, "M F H W"]:
    moves = np.broadcast_to(edit.moves, (len(maps) // 3,)).astype(np.float32)
    return maps / np.tile(moves, 3)[:, None, None, None]


def sample_edits(
    model: VideoDiffusion,
    process: Process,
    path: Float[Array, "S1 1 F H W C"],
    text: Captions,
    null: Captions,
    alignment: Alignment,
    video: VideoConfig,
    edit: EditConfig,
) -> tuple[Float[Array, "P F H W C"], Float[Array, "M F H W"]]:
    """(clips, maps that blending went by) of `text`, whose first row is the source's. An edit that
    starts later keeps the source's row until then.

    The source row is set to its own `path` at each step, so what is taken from it, its attention
    and, outside of the blend's mask, its pixels, is that of the true clip (as direct inversion, Ju
    et al. 2023). With `noised` in the place of an inversion this is SDEdit (Meng et al. 2022).
    """
    schedule, P = process.schedule, text.tokens.shape[0]
    rows = _plan(schedule, edit, P - 1)
    estimate = windowed(
        _make_estimate(model, process, text, null, alignment, edit),
        path.shape[2],
        video.window,
        video.overlap,
    )

    def step(carry, inputs):
        (x, maps), (row, source) = carry, inputs
        out, new = estimate(x, row)
        maps = _added(maps, new, row)
        t, s = (jnp.full((P,), time) for time in (row.t, row.s))
        mean = diffusion.q_posterior(
            schedule, out.x0, x, out.context_t, out.context_s, t, s, 0.0, process.shift
        ).mean
        edits = source + _mask(maps, row, edit) * (mean[1:] - source)
        return (jnp.concatenate([source, edits]), maps), None

    start = jnp.broadcast_to(path[-1], (P, *path.shape[2:]))
    (x, maps), _ = jax.lax.scan(step, (start, _no_maps(start)), (rows, path[:-1][::-1]))
    return x, _mean_maps(maps, edit)


def flow_edits(
    key: PRNGKeyArray,
    model: VideoDiffusion,
    process: Process,
    path: Float[Array, "S1 1 F H W C"],
    text: Captions,
    null: Captions,
    alignment: Alignment,
    video: VideoConfig,
    edit: EditConfig,
) -> tuple[Float[Array, "P F H W C"], Float[Array, "M F H W"]]:
    """`sample_edits` without an inversion, after FlowEdit (Kulikov et al. 2024), on any path.

    With z = x0 + delta, a and b the signal and noise of x_t, and D the guided estimates of x0,

    x_t = q_sample(z, r(z, c), t, noise),
    delta_s = rho delta_t + (1 - rho) (D(x_t, c) - D(x_t of the source, its c)),
    rho = b_s a_t / (a_s b_t),

    which is the straight path's motion of x_t / a_t, in which DDIM is Euler's method on every path.
    The context moves with z: each row's process is the one of its own caption. The noise is drawn
    anew at each step, by `key`, one for all rows. Row 0 stays the source, the only state that
    `path` needs.
    """
    schedule, P, x0 = process.schedule, text.tokens.shape[0], path[0]
    rows = _plan(schedule, edit, P - 1)
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
        maps = _added(maps, new, row)
        (a_t, b_t), (a_s, b_s) = (
            (jnp.sqrt(schedule.alpha_bar(time)), schedule.sigma(time)) for time in (row.t, row.s)
        )
        rho = b_s * a_t / (a_s * b_t)
        delta = rho * delta + (1 - rho) * (estimates - estimates[:1])
        return (delta.at[1:].multiply(_mask(maps, row, edit)), maps), None

    start = jnp.zeros((P, *x0.shape[1:]))
    # counted from the clip, so that an edit's noise doesn't depend on how early others start
    inputs = np.arange(len(rows.t))[::-1], rows
    (delta, maps), _ = jax.lax.scan(step, (start, _no_maps(start)), inputs)
    return x0 + delta, _mean_maps(maps, edit)


@dataclasses.dataclass(frozen=True)
class Mover:
    """A way from the clip to its edits.

    Attributes:
      make_path: the source's states, from the clip to the noisiest, of a key and what `invert`
          takes.
      move: the edits along it, of a key and what `sample_edits` takes.
      keeps_source: the clip's own prompt gives the clip back as it is: nothing is reconstructed.
    """

    make_path: Callable[..., Float[Array, "S1 1 F H W C"]]
    move: Callable[..., tuple[Float[Array, "P F H W C"], Float[Array, "M F H W"]]]
    keeps_source: bool = False


def _without_noise(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda key, *arguments: function(*arguments)


# What `edit.method` names.
MOVERS = {
    "inversion": Mover(_without_noise(invert), _without_noise(sample_edits)),
    "sdedit": Mover(noised, _without_noise(sample_edits)),
    "flowedit": Mover(lambda key, model, process, x0, *_: x0[None], flow_edits, keeps_source=True),
}


def for_each_seed(function: Callable[..., Any], seeds: Sequence[int], *each: Any) -> Any:
    """function(key, ...) for the key of each seed and its entry of `each`, in one batch: a tree of
    [seeds, ...].
    """
    keys = [make_key(seed) for seed in seeds]
    if len(keys) == 1:  # the very program of one seed
        own = jax.tree.map(lambda a: a[0], each)
        return jax.tree.map(lambda a: a[None], function(keys[0], *own))
    return jax.vmap(function)(jnp.stack(keys), *each)
