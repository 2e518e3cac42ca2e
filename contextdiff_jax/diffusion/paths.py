"""Gaussian paths in continuous time.

x_t = a(t) x0 + k(t) r + b(t) e                                                                (10)

t is a float and 0 is clean data. `flow` is a = 1 - t, b = t (Lipman et al. 2023; Liu et al. 2023);
`cosine_continuous` a = cos(pi t / 2), b = sin(pi t / 2); `edm` a = 1, b = t (Karras et al. 2022).

What a path says of itself, the discrete `NoiseSchedule` says too: `alpha` (a), `sigma` (b), their
squares, 1 - a^2, the derivatives of a and b, and the variance between two times, each to float32's
precision: a difference of two numbers that are nearly equal is never taken.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real

# A time of a path, or an index of a discrete schedule: one a sample, or one for all.
Time = Real[ArrayLike, "*B"]

_pytree = functools.partial(jax.tree_util.register_dataclass, data_fields=[])


def _as_time(t: Time) -> Float[Array, "*B"]:
    # An index 0..999 is no time in [0, 1]: it would give numbers, and all of them would be wrong.
    if jnp.issubdtype(getattr(t, "dtype", float), jnp.integer):
        raise ValueError(f"t: integers of type {t.dtype}; a continuous path's times are floats")
    return jnp.asarray(t, float)


class Path:
    """The common part of the continuous paths: b = t, and c = a, where they say nothing else."""

    clean: ClassVar[float] = 0.0  # the time of clean data
    continuous: ClassVar[bool] = True
    noise_scale: ClassVar[float] = 1.0  # the standard deviation of x_T
    variance_preserving: ClassVar[bool] = False  # whether a^2 + b^2 = 1

    def sigma(self, t: Time) -> Float[Array, "*B"]:
        """b = t."""
        return _as_time(t)

    def scale(self, t: Time) -> Float[Array, "*B"]:
        """c of (14): a."""
        return self.alpha(t)

    def alpha_bar(self, t: Time) -> Float[Array, "*B"]:
        """a^2."""
        return self.alpha(t) ** 2

    def variance(self, t: Time) -> Float[Array, "*B"]:
        """b^2."""
        return self.sigma(t) ** 2

    def transition_variance(self, t: Time, s: Time) -> Float[Array, "*B"]:
        """b_t^2 - (a_t b_s / a_s)^2, of x_t given x_s, for s < t."""
        a_t, a_s = self.alpha(t), self.alpha(s)
        both = a_s * self.sigma(t) + a_t * self.sigma(s)
        return self._cross(t, s) * both / a_s**2

    def _cross(self, t, s):
        return _as_time(t) - _as_time(s)  # a_s b_t - a_t b_s

    def time_at(self, ratio: np.ndarray) -> np.ndarray:
        """The time where b / c is `ratio`, in float64."""
        return ratio

    def ratio_at(self, noise_to_signal: np.ndarray) -> np.ndarray:
        """The b / c of a b / a."""
        return noise_to_signal

    def time_of_share(self, u: Float[ArrayLike, "*B"]) -> Float[Array, "*B"]:
        """The time at the share u in [0, 1] of the path, not below `t_min`."""
        return jnp.maximum(self.t_max * u, self.t_min)

    def share(self, t: Time) -> Float[Array, "*B"]:
        """The inverse of `time_of_share`."""
        return _as_time(t) / self.t_max

    def network_input(
        self, x: Float[Array, "B *D"], t: Time
    ) -> tuple[Float[Array, "B *D"], Float[Array, "*B"]]:
        """What a network reads in the place of x and t: the time as a share of 1000, the range of
        the discrete schedules' indices.
        """
        return x, self.network_time(t)

    def network_time(self, t: Time) -> Float[Array, "*B"]:
        """1000 times the share."""
        return 1000 * self.share(t)

    @property
    def num_timesteps(self) -> int:
        """Raises ValueError: there are no indices."""
        raise ValueError(f"schedule={self.name!r}: continuous, it has no num_timesteps")


@functools.partial(_pytree, meta_fields=["t_min", "t_max"])
@dataclasses.dataclass(frozen=True)
class Flow(Path):
    """The straight path, rectified flow: a = 1 - t, b = t. `t_min`, `t_max` end the time grids."""

    name: ClassVar[str] = "flow"
    t_min: float = 1e-3
    t_max: float = 1.0

    def alpha(self, t: Time) -> Float[Array, "*B"]:
        """a = 1 - t."""
        return 1 - _as_time(t)

    def rest(self, t: Time) -> Float[Array, "*B"]:
        """1 - a^2."""
        t = _as_time(t)
        return t * (2 - t)

    def scale(self, t: Time) -> Float[Array, "*B"]:
        """c of (14): a + b = 1."""
        return jnp.ones_like(_as_time(t))

    def rates(self, t: Time) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
        """The derivatives of a and b in t."""
        one = jnp.ones_like(_as_time(t))
        return -one, one

    def noise_at(self, t: float) -> float:
        """b / a, in float64."""
        return t / (1 - t) if t < 1 else np.inf

    def ratio_at(self, noise_to_signal: np.ndarray) -> np.ndarray:
        """The b / c of a b / a."""
        return 1 / (1 + 1 / noise_to_signal)


@functools.partial(_pytree, meta_fields=["t_min", "t_max"])
@dataclasses.dataclass(frozen=True)
class CosineContinuous(Path):
    """The variance-preserving path of equal angles: a = cos(pi t / 2), b = sin(pi t / 2)."""

    name: ClassVar[str] = "cosine_continuous"
    variance_preserving: ClassVar[bool] = True
    t_min: float = 1e-3
    t_max: float = 1.0

    def alpha(self, t: Time) -> Float[Array, "*B"]:
        """a, exactly 0 at t = 1."""
        return jnp.sin(jnp.pi / 2 * (1 - _as_time(t)))

    def sigma(self, t: Time) -> Float[Array, "*B"]:
        """b."""
        return jnp.sin(jnp.pi / 2 * _as_time(t))

    def rest(self, t: Time) -> Float[Array, "*B"]:
        """1 - a^2 = b^2."""
        return self.variance(t)

    def rates(self, t: Time) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
        """The derivatives of a and b in t."""
        return -jnp.pi / 2 * self.sigma(t), jnp.pi / 2 * self.alpha(t)

    def _cross(self, t, s):
        return jnp.sin(jnp.pi / 2 * (_as_time(t) - _as_time(s)))

    def noise_at(self, t: float) -> float:
        """b / a, in float64."""
        return float(np.tan(np.pi / 2 * t)) if t < 1 else np.inf

    def time_at(self, ratio: np.ndarray) -> np.ndarray:
        """The time where b / c is `ratio`, in float64."""
        return 2 / np.pi * np.arctan(ratio)


@functools.partial(_pytree, meta_fields=["sigma_min", "sigma_max"])
@dataclasses.dataclass(frozen=True)
class EDM(Path):
    """The variance-exploding path: a = 1, and the time is the noise, b = t. `sigma_min`,
    `sigma_max` end the time grids. x_T is N(0, sigma_max^2 I).
    """

    name: ClassVar[str] = "edm"
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    @property
    def noise_scale(self) -> float:
        """The standard deviation of x_T."""
        return self.sigma_max

    def time_of_share(self, u: Float[ArrayLike, "*B"]) -> Float[Array, "*B"]:
        """The noise at the share u of the angle whose tangent it is: as `cosine_continuous`."""
        # bounded first: the tangent of what float32 has for a right angle is negative
        u = jnp.clip(u, *(self.share(end) for end in (self.sigma_min, self.sigma_max)))
        return jnp.tan(jnp.pi / 2 * u)

    def share(self, t: Time) -> Float[Array, "*B"]:
        """The inverse of `time_of_share`."""
        return 2 / jnp.pi * jnp.arctan(_as_time(t))

    def network_input(
        self, x: Float[Array, "B *D"], t: Time
    ) -> tuple[Float[Array, "B *D"], Float[Array, "*B"]]:
        """What a network reads: x / sqrt(1 + t^2), of unit variance where x0 is (Karras et al.
        2022, table 1), and the angle: both as on `cosine_continuous`.
        """
        t = _as_time(t)
        scale = jax.lax.rsqrt(1 + t**2)
        return scale.reshape(t.shape + (1,) * (x.ndim - t.ndim)) * x, self.network_time(t)

    @property
    def t_min(self) -> float:
        """The least noise of the time grids."""
        return self.sigma_min

    @property
    def t_max(self) -> float:
        """The most noise of the time grids."""
        return self.sigma_max

    def alpha(self, t: Time) -> Float[Array, "*B"]:
        """a = 1."""
        return jnp.ones_like(_as_time(t))

    def rest(self, t: Time) -> Float[Array, "*B"]:
        """1 - a^2 = 0."""
        return jnp.zeros_like(_as_time(t))

    def rates(self, t: Time) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
        """The derivatives of a and b in t."""
        one = jnp.ones_like(_as_time(t))
        return 0 * one, one

    def noise_at(self, t: float) -> float:
        """b / a, in float64."""
        return t


PATHS = {path.name: path for path in (Flow, CosineContinuous, EDM)}
