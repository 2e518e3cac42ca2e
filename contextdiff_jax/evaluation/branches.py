"""Differences that guidance works with: the denoiser with the caption and without, by t.

Guidance extrapolates from x0_hat without the caption to x0_hat with it. At x_t of the forward
process, which its context has shifted towards x0, both are measured against x0 and against each
other.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from contextdiff_jax import diffusion
from contextdiff_jax.diffusion.process import Process
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.models.contextdiff import ContextDiffusion


def in_reverse(caption: str) -> str:
    """The caption's words, the last one first."""
    return " ".join(caption.split()[::-1])


def model_branches(
    model: ContextDiffusion,
    process: Process,
    x0: Float[Array, "B H W C"],
    captions: Captions,
    empty: Captions,
    key: PRNGKeyArray,
    timesteps: Int[Array, "K"],
) -> dict[str, Float[Array, "K B"]]:
    """Root mean squares over a picture, in units of x0 (in [-1, 1]), of `with` and `without`,
    x0_hat's errors, and of `apart`, their difference; a row a timestep.
    """
    schedule, shift = process.schedule, process.shift

    def row(_, index):
        t = jnp.full(x0.shape[:1], index)
        noise = jax.random.normal(jax.random.fold_in(key, index), x0.shape)
        x_t = diffusion.q_sample(schedule, x0, model.relate(x0, captions, t), t, noise, shift)

        def estimate(captions):
            output = model.predict(x_t, t, captions)
            output = output if model.backbone.context_head is None else output[0]
            return diffusion.predict_x0(schedule, output, x_t, t, process.prediction_type)

        with_caption, without = estimate(captions), estimate(empty)
        differences = {
            "with": with_caption - x0,
            "without": without - x0,
            "apart": with_caption - without,
        }
        return None, {name: jnp.sqrt((d**2).mean((1, 2, 3))) for name, d in differences.items()}

    return jax.lax.scan(row, None, timesteps)[1]
