"""Noise schedules.

abar_t = prod_{i<=t} (1 - beta_i), a_t = sqrt(abar_t), b_t = sqrt(1 - abar_t), t = 0..T-1        (1)

The index -1 means clean data: abar = 1, b = 0.

1 - abar_t is stored beside abar_t: near t = 0 it is about 1e-4, and a float32 subtraction would
keep only three of its digits.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from contextdiff_jax.diffusion.paths import EDM, PATHS, CosineContinuous, Flow
from contextdiff_jax.runtime.fields import check_choice

# A noise level, 0..T-1, or -1 for clean data: one a sample, or one for all.
Index = Int[ArrayLike, "*B"]


def index_of_share(u: Float[ArrayLike, "*B"], num_timesteps: int) -> Int[Array, "*B"]:
    """The index of 0..T-1 at the share u in [0, 1] of all."""
    return jnp.minimum((u * num_timesteps).astype(jnp.int32), num_timesteps - 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """A discrete variance-preserving schedule (a pytree of two arrays)."""

    clean: ClassVar[int] = -1  # the index of clean data
    t_min: ClassVar[int] = 0  # the least noisy index
    variance_preserving: ClassVar[bool] = True  # a^2 + b^2 = 1
    continuous: ClassVar[bool] = False
    noise_scale: ClassVar[float] = 1.0  # the standard deviation of x_T
    alphas_cumprod: Float[Array, "T"]
    variances: Float[Array, "T"]  # 1 - alphas_cumprod, to full precision

    @property
    def num_timesteps(self) -> int:
        """T, the number of noise levels."""
        return self.alphas_cumprod.shape[0]

    @property
    def t_max(self) -> int:
        """The noisiest index."""
        return self.num_timesteps - 1

    def time_of_share(self, u: Float[ArrayLike, "*B"]) -> Int[Array, "*B"]:
        """The index at the share u in [0, 1] of all."""
        return index_of_share(u, self.num_timesteps)

    def share(self, t: Index) -> Float[Array, "*B"]:
        """The share of the indices that are below t."""
        return jnp.asarray(t) / self.num_timesteps

    def network_input(
        self, x: Float[Array, "B *D"], t: Index
    ) -> tuple[Float[Array, "B *D"], Int[Array, "*B"]]:
        """What a network reads in the place of x and t: these."""
        return x, jnp.asarray(t)

    def network_time(self, t: Index) -> Int[Array, "*B"]:
        """What a network reads in the place of t: this."""
        return jnp.asarray(t)

    def alpha_bar(self, t: Index) -> Float[Array, "*B"]:
        """abar_t; 1 at t = -1."""
        t = jnp.asarray(t)
        return jnp.where(t < 0, 1.0, self.alphas_cumprod[jnp.maximum(t, 0)])

    def variance(self, t: Index) -> Float[Array, "*B"]:
        """b_t^2 = 1 - abar_t; 0 at t = -1."""
        t = jnp.asarray(t)
        return jnp.where(t < 0, 0.0, self.variances[jnp.maximum(t, 0)])

    def alpha(self, t: Index) -> Float[Array, "*B"]:
        """a_t; 1 at t = -1."""
        return jnp.sqrt(self.alpha_bar(t))

    def sigma(self, t: Index) -> Float[Array, "*B"]:
        """b_t; 0 at t = -1."""
        return jnp.sqrt(self.variance(t))

    def rest(self, t: Index) -> Float[Array, "*B"]:
        """1 - a_t^2 = b_t^2."""
        return self.variance(t)

    def scale(self, t: Index) -> Float[Array, "*B"]:
        """c of (14): a_t."""
        return self.alpha(t)

    def rates(self, t: Index) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
        """The derivatives of a = cos(angle) and b = sin(angle) in the angle: indices have none."""
        return -self.sigma(t), self.alpha(t)

    def transition_variance(self, t: Index, s: Index) -> Float[Array, "*B"]:
        """1 - abar_t / abar_s, of x_t given x_s, for s < t, by whichever difference keeps its
        digits in float32: near clean data or near noise.
        """
        abar_t, abar_s = self.alpha_bar(t), self.alpha_bar(s)
        near_clean = (self.variance(t) - self.variance(s)) / abar_s
        return jnp.where(abar_s > 0.5, near_clean, 1 - abar_t / abar_s)


# Every schedule: discrete, or a path in continuous time.
Schedule = NoiseSchedule | Flow | CosineContinuous | EDM


def _linear(num_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    return np.linspace(beta_start, beta_end, num_timesteps, dtype=np.float64)


def _scaled_linear(num_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    return np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=np.float64) ** 2


def _cosine(num_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    del beta_start, beta_end  # the cosine schedule has no end points to choose
    f = np.cos((np.arange(num_timesteps + 1) / num_timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


SCHEDULES = {"linear": _linear, "scaled_linear": _scaled_linear, "cosine": _cosine}


NAMES = (*SCHEDULES, *PATHS)


def make_schedule(
    name: str = "linear",
    num_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 2e-2,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """A schedule by name: `linear` (Ho et al. 2020), `scaled_linear` (Stable Diffusion), `cosine`
    (Nichol & Dhariwal 2021, eq. 17; `beta_start` and `beta_end` have no meaning there); or one of
    the paths in continuous time, `flow`, `cosine_continuous`, `edm`, which read no other argument.

    `zero_terminal_snr` shifts and scales a_t so that a_{T-1} = 0 and a_0 is kept (Lin et al. 2023,
    alg. 1). Computed in float64, stored in JAX's default float type.

    Raises ValueError for an unknown name, T < 2, or betas outside 0 < beta_start <= beta_end < 1.
    """
    check_choice("diffusion.schedule", name, NAMES)
    if name in PATHS:
        return PATHS[name]()
    if num_timesteps < 2:
        raise ValueError(f"diffusion.num_timesteps={num_timesteps}: must be at least 2")
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(
            f"beta_start={beta_start}, beta_end={beta_end}: must satisfy "
            "0 < beta_start <= beta_end < 1"
        )
    betas = SCHEDULES[name](num_timesteps, beta_start, beta_end)
    log_alphas_cumprod = np.cumsum(np.log1p(-betas))
    alphas_cumprod, variances = np.exp(log_alphas_cumprod), -np.expm1(log_alphas_cumprod)
    if zero_terminal_snr:
        a = np.sqrt(alphas_cumprod)
        a = (a - a[-1]) * a[0] / (a[0] - a[-1])
        alphas_cumprod, variances = a**2, 1 - a**2
    return NoiseSchedule(jnp.asarray(alphas_cumprod, float), jnp.asarray(variances, float))


def _trailing(num_timesteps: int, num_steps: int) -> np.ndarray:
    return np.round(np.arange(num_timesteps, 0, -num_timesteps / num_steps))[:num_steps] - 1


def _leading(num_timesteps: int, num_steps: int) -> np.ndarray:
    return (np.arange(num_steps) * (num_timesteps // num_steps))[::-1]


def _linspace(num_timesteps: int, num_steps: int) -> np.ndarray:
    return np.linspace(0, num_timesteps - 1, num_steps).round()[::-1]


SPACINGS = {"leading": _leading, "linspace": _linspace, "trailing": _trailing}


def spaced_timesteps(
    num_timesteps: int, num_steps: int, spacing: str = "trailing"
) -> Int[Array, "S"]:
    """`num_steps` descending indices of 0..T-1. `trailing` starts at T-1 (Lin et al. 2023, table
    2), `leading` ends at 0, `linspace` does both.

    Raises ValueError for an unknown spacing or num_steps outside 1..T.
    """
    check_choice("spacing", spacing, SPACINGS)
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(
            f"steps={num_steps}: must lie in 1..{num_timesteps}, the schedule's number of timesteps"
        )
    return jnp.asarray(SPACINGS[spacing](num_timesteps, num_steps).astype(np.int32))
