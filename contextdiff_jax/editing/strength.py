"""The strength of an edit, chosen by the model itself (`edit.strength=auto`).

Each edit is made at all of `CANDIDATES` in one batch. How much better a clip z fits prompt c than
prompt d is read from the model's own errors, as a diffusion classifier does (Li et al. 2023),

    fit(z; c, d) = mean over t of 2 (e_d - e_c) / (e_d + e_c),    e_c = |D(x_t, c) - z|^2,   (1)

with x_t = q_sample(z, r(z, c), t, noise), the same noise for all. Chosen is the least strength at
which the edit fits its prompt as much better than the clip's as the clip fits its own,

    fit(edit; edit prompt, clip's prompt) >= fit(clip; clip's prompt, edit prompt),           (2)

or, where none does, the one that fits best. Less change than (2) asks for leaves the clip what it
was called; more is paid for by what was to stay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from contextdiff_jax import diffusion
from contextdiff_jax.diffusion.process import Process
from contextdiff_jax.editing.denoise import make_denoise, windowed
from contextdiff_jax.editing.settings import CANDIDATES, EditSettings
from contextdiff_jax.models.captions import Captions

TIMES = (0.15, 0.35, 0.55, 0.75, 0.9)  # shares of the process, of the mean in (1)


def at_every_strength(settings: EditSettings) -> EditSettings:
    """The settings of all candidates: each prompt as often as there are, at each of them."""
    video, edit, count = settings.video, settings.edit, len(CANDIDATES)
    prompts = tuple(prompt for prompt in video.edit_prompts for _ in range(count))
    return dataclasses.replace(
        settings,
        video=dataclasses.replace(video, edit_prompts=prompts),
        edit=dataclasses.replace(edit, strength=CANDIDATES * len(video.edit_prompts)),
    )


def make_fits(
    graph: nnx.GraphDef, process: Process, settings: EditSettings
) -> Callable[..., Float[Array, "N"]]:
    """`fits(state, clips, prompts)`: (1) of clips [N, F, H, W, C], c being the second prompt and d
    the first.
    """
    video, schedule = settings.video, process.schedule

    def fits(state, clips, prompts):
        model = nnx.merge(graph, state)

        def error(text: Captions, share: Float[Array, ""], noise: Array) -> Float[Array, "N"]:
            t = jnp.full(clips.shape[:1], schedule.time_of_share(share))
            text = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(clips), *a.shape)), text)

            def of_frames(z_and_noise):  # one array, which windows cut together
                z, noise = jnp.split(z_and_noise, 2, axis=-1)
                r = model.context(z, text.tokens, text.mask, schedule.network_time(t))
                x = diffusion.q_sample(schedule, z, r, t, noise, process.shift)
                out = make_denoise(model, process, text)(x, t, t)
                return ((out.x0 - z) ** 2).mean(-1)  # [N, F, H, W]

            run = windowed(of_frames, clips.shape[1], video.window, video.overlap)
            noise = jnp.broadcast_to(noise, clips.shape)
            return run(jnp.concatenate([clips, noise], axis=-1)).mean((1, 2, 3))

        def at(_, inputs):
            number, share = inputs
            key = jax.random.fold_in(jax.random.key(0), number)
            noise = jax.random.normal(key, clips.shape[1:])
            d, c = (error(jax.tree.map(lambda a, i=i: a[i], prompts), share, noise) for i in (0, 1))
            return None, 2 * (d - c) / (d + c)

        inputs = np.arange(len(TIMES)), np.array(TIMES, np.float32)
        return jax.lax.scan(at, None, inputs)[1].mean(0)

    return fits


def choose(fit_of_clip: float, fits: Float[np.ndarray, "K"]) -> dict[str, Any]:
    """(2), of the candidates' fits, and what it went by. `fit_of_clip`: the clip's own, to its own
    prompt.
    """
    enough = np.flatnonzero(fits >= fit_of_clip)
    place = int(enough[0]) if len(enough) else int(fits.argmax())
    return {
        "strength": CANDIDATES[place],
        "reached": bool(len(enough)),
        "fit_of_the_clip": float(fit_of_clip),
        "fits": {str(share): float(fit) for share, fit in zip(CANDIDATES, fits, strict=True)},
    }


def choices(
    fits: Callable[[Float[Array, "N F H W C"], Captions], Float[Array, "N"]],
    clips: Float[Array, "S P F H W C"],
    text: Captions,
    prompts: Sequence[str],
) -> list[dict[str, Any]]:
    """A choice for each edit prompt, of the clips at every strength and of all seeds, the source's
    row first; `text`, `prompts`: of those rows, of all but the first. Of several seeds the mean fit
    counts.
    """
    seeds, count, found = len(clips), len(CANDIDATES), []
    for first in range(1, clips.shape[1], count):
        of_edit = clips[:, first : first + count]
        rows = jnp.concatenate([clips[0, :1], of_edit.reshape(-1, *clips.shape[2:])])
        pair = jax.tree.map(lambda a, first=first: a[jnp.array([0, first])], text)
        values = np.asarray(fits(rows, pair), np.float64)
        choice = choose(-values[0], values[1:].reshape(seeds, count).mean(0))
        found.append({"prompt": prompts[first - 1]} | choice)
    return found
