"""The steps of a sampler as data of a compiled program: times, ends, noise levels between indices.

diffusers' solvers go through noise levels that lie between a discrete schedule's indices, and have
the network read a rounded index beside each. Here such levels are a small schedule of their own,
whose indices number the steps: a solver needs no fractional index, and the network's times are
looked up (`Steps.read`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real

from contextdiff_jax.diffusion.schedule import NoiseSchedule, Schedule


class Levels(NamedTuple):
    """What the steps know beside the schedule.

    Attributes:
      times: those that are described here. reads: what the network reads at each.
      noise: b / a at the times, which are then 0, 1, ...; None: the schedule's own.
      start: the standard deviation of the noise that sampling starts from.
    """

    times: Real[Array, "N"]
    reads: Float[Array, "N"]
    noise: Float[Array, "N"] | None
    start: Float[ArrayLike, ""]


class Steps(NamedTuple):
    """Descending times, and where each step goes (None: to the next one, the last to clean data):
    indices of a discrete schedule, floats of a path, or numbers of `levels`.
    """

    timesteps: Real[Array, "S"]
    ends: Real[Array, "S"] | None = None
    levels: Levels | None = None

    def last(self, count: int) -> Steps:
        """The last `count` steps."""
        ends = None if self.ends is None else self.ends[-count:]
        return self._replace(timesteps=self.timesteps[-count:], ends=ends)

    def schedule(self, schedule: Schedule) -> Schedule:
        """The schedule that the times belong to: `schedule`, or that of their own levels."""
        if self.levels is None or self.levels.noise is None:
            return schedule
        squared = jnp.asarray(self.levels.noise) ** 2
        return NoiseSchedule(1 / (1 + squared), squared / (1 + squared))

    def reader(self, schedule: Schedule) -> Callable[[Array], Array]:
        """From a time to what the networks read of it."""
        return schedule.network_time if self.levels is None else self.read

    def read(self, t: Real[ArrayLike, "*B"]) -> Real[Array, "*B"]:
        """What the network reads at the time t, one of `levels.times`; without levels t itself."""
        t = jnp.asarray(t)
        if self.levels is None:
            return t
        nearest = jnp.abs(t[..., None] - jnp.asarray(self.levels.times)).argmin(-1)
        return jnp.asarray(self.levels.reads)[nearest]
