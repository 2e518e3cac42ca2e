"""The objective of pictures and of clips: the error of a network's output on a noised example.

x_t = a_t x0 + k_t r + b_t noise -> network -> squared error of its target, and of r itself
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree, Real

from contextdiff_jax import diffusion

Text = TypeVar("Text", bound=PyTree)


def drop(dropped: Bool[Array, "B"], empty: Text, captions: Text) -> Text:
    """The captions [B, ...] with the empty one's [1, ...] in the place of those that are dropped.

    They are hidden from the denoiser; whether from the shift of x_t, too, `related` says.
    """

    def choose(empty: Array, caption: Array) -> Array:
        return jnp.where(dropped.reshape(-1, *[1] * (caption.ndim - 1)), empty, caption)

    return jax.tree.map(choose, empty, captions)


def errors(
    predict: Callable[[Array, Array], Array | tuple[Array, Array]],
    process: diffusion.Process,
    x0: Float[Array, "B *D"],
    r: Float[Array, "B *D"],
    t: Real[Array, "B"],
    noise: Float[Array, "B *D"],
    rate: Float[Array, "B *D"] | None = None,
    fixed_target: bool = False,
) -> tuple[Float[Array, "B"], Float[Array, ""]]:
    """(each example's mean squared error of `predict(x, t)`, x and t as networks read them; the
    mean squared error of r). `rate` is dr/dt where r moves with time; with
    `fixed_target` no gradient reaches r through the target, which r may be a part of.

    The second is 0 unless the network has an output for r, which learns r as it is: no gradient
    reaches the relational network from there.
    """
    schedule, shift = process.schedule, process.shift
    x_t = diffusion.q_sample(schedule, x0, r, t, noise, shift)
    target = diffusion.training_target(
        schedule, x0, x_t, t, process.prediction_type, context=r, context_rate=rate, shift=shift
    )
    target = jax.lax.stop_gradient(target) if fixed_target else target
    output, context_error = predict(*schedule.network_input(x_t, t)), jnp.zeros(())
    if isinstance(output, tuple):
        output, r_hat = output
        context_error = jnp.mean((r_hat - jax.lax.stop_gradient(r)) ** 2)
    return jnp.mean((output - target) ** 2, axis=tuple(range(1, x0.ndim))), context_error
