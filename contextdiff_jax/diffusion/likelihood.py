"""The likelihood of a sample under a probability flow.

The flow x' = u(x, t) carries the density along: d log p(x_t) / dt = -div u (Chen et al. 2018, eq.
8), so that log p(x_0) = log p(x_T) + int_0^T div u dt along the solution that begins at x_0. The
divergence is estimated without bias by e^T (du / dx) e of one random e of signs (Hutchinson 1989).
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from contextdiff_jax.diffusion.paths import Time
from contextdiff_jax.diffusion.process import Samples, bcast, drift_coefficient
from contextdiff_jax.diffusion.protocols import Denoised
from contextdiff_jax.diffusion.schedule import Schedule


@runtime_checkable
class VelocityFn(Protocol):
    """`velocity(x_t, t)` is the derivative of x in t."""

    def __call__(self, x_t: Float[Array, "B *D"], t: Float[Array, "B"]) -> Float[Array, "B *D"]: ...


def flow_velocity(
    schedule: Schedule, denoised: Denoised, x_t: Samples, t: Time, shift: str
) -> Float[Array, "B *D"]:
    """u = (a' - a b' / b) M + (b' / b) x_t with M of (12), by estimates of x0 and of a context that
    doesn't move with time.
    """
    rho = drift_coefficient(schedule, t, shift)
    data = denoised.x0 + bcast(rho, x_t) * denoised.context_t
    (da, db), a, b = schedule.rates(t), schedule.alpha(t), schedule.sigma(t)
    return bcast(da - a * db / b, x_t) * data + bcast(db / b, x_t) * x_t


def follow_flow(
    velocity: VelocityFn, x0: Samples, times: Float[Array, "S"], key: PRNGKeyArray
) -> tuple[Float[Array, "B *D"], Float[Array, "B"]]:
    """(x at the last of the ascending `times`, the integral of div u up to there), from x0 at the
    first, by Heun's method: two evaluations of u and of its derivative a step.
    """
    x0 = jnp.asarray(x0)
    probe = jax.random.rademacher(key, x0.shape, x0.dtype)
    axes = tuple(range(1, x0.ndim))

    def rates(x, t):
        ts = jnp.full(x.shape[:1], t)
        # Backwards: networks have layers with a gradient of their own, and no forward derivative.
        u, pull = jax.vjp(lambda x: velocity(x, ts), x)
        return u, jnp.sum(probe * pull(probe)[0], axes)

    def step(carry, ends):
        (x, total), (t, s) = carry, ends
        u, div = rates(x, t)
        u_s, div_s = rates(x + (s - t) * u, s)
        return (x + 0.5 * (s - t) * (u + u_s), total + 0.5 * (s - t) * (div + div_s)), None

    start = x0, jnp.zeros(x0.shape[:1], x0.dtype)
    return jax.lax.scan(step, start, (times[:-1], times[1:]))[0]
