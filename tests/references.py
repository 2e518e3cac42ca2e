"""The process in float64 numpy, written independently of the library, and what its tests share."""

from __future__ import annotations

import jax
import numpy as np
import pytest

FLOAT32 = 2e-5
NEAR_CLEAN = 2e-3
SHIFTS = ("quadratic", "prior", "data_normalization", "none")
SCHEDULES = {
    "linear": dict(name="linear"),
    "stable_diffusion": dict(name="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": dict(name="cosine"),
    "linear_short": dict(name="linear", num_timesteps=20, beta_start=1e-3, beta_end=0.4),
}
ALL_SCHEDULES = [
    dict(kwargs, zero_terminal_snr=zero) for kwargs in SCHEDULES.values() for zero in (False, True)
]
ALL_IDS = [f"{name}{suffix}" for name in SCHEDULES for suffix in ("", "-zero_snr")]
every_schedule = pytest.mark.parametrize("kwargs", ALL_SCHEDULES, ids=ALL_IDS)


def reference_alphas_cumprod(
    name: str = "linear",
    num_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 2e-2,
    zero_terminal_snr: bool = False,
) -> np.ndarray:
    """abar in float64, written from the papers (Ho 2020; Rombach 2022; Nichol & Dhariwal 2021; Lin
    2023, alg. 1).
    """
    if name == "linear":
        betas = np.linspace(beta_start, beta_end, num_timesteps)
    elif name == "scaled_linear":
        betas = np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps) ** 2
    else:
        u = np.arange(num_timesteps + 1) / num_timesteps
        f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    abar = np.cumprod(1 - betas)
    if zero_terminal_snr:
        root = np.sqrt(abar)
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return abar


def reference_coefficients(kwargs: dict, index: np.ndarray, shift: str) -> tuple[np.ndarray, ...]:
    """(abar, a, b, k) at integer indices, with -1 the clean picture (abar = 1, k = 0 by
    definition).
    """
    # numpy's index -1 is the appended 1.
    abar = np.append(reference_alphas_cumprod(**kwargs), 1.0)[index]
    a, b = np.sqrt(abar), np.sqrt(1 - abar)
    k = {"quadratic": a * (1 - a), "prior": 1 - a, "data_normalization": -a, "none": 0 * a}[shift]
    return abar, a, b, np.where(np.asarray(index) < 0, 0.0, k)


def index_pairs(num_timesteps: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs t > s >= -1: every pair of a short schedule, a sample with the edge cases of a long
    one.
    """
    if num_timesteps <= 20:
        pairs = [(t, s) for t in range(num_timesteps) for s in range(-1, t)]
    else:
        rng = np.random.default_rng(0)
        t = rng.integers(1, num_timesteps, size=200)
        edges = [
            (0, -1),
            (1, -1),
            (1, 0),
            (num_timesteps - 1, num_timesteps - 2),
            (num_timesteps - 1, -1),
        ]
        pairs = (
            edges
            + [(int(i), int(rng.integers(-1, i))) for i in t]
            + [(int(i), int(i) - 1) for i in t]
        )
    t, s = np.array(pairs).T
    return t, s


def column(values: np.ndarray) -> np.ndarray:
    return np.asarray(values)[:, None]


def expanded(values: jax.Array, ndim: int) -> np.ndarray:
    """A per-sample coefficient in whatever trailing ones the library chose, as [B, 1, ...]."""
    values = np.asarray(values)
    return values.reshape(values.shape + (1,) * (ndim - values.ndim))


def draws(count: int, width: int = 3, seed: int = 1, number: int = 4) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(count, width)).astype(np.float32) for _ in range(number)]


def assert_error_lists(error: pytest.ExceptionInfo, value: str, allowed: tuple[str, ...]) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert all(name in message for name in (value, *allowed)), message


def mmd2(x, y, kernel, unbiased):
    """Squared maximum mean discrepancy of two sets, pair by pair; `unbiased`: without the pairs of
    one with itself.
    """

    def mean(a, b, own):
        return np.mean(
            [
                kernel(p, q)
                for i, p in enumerate(a)
                for j, q in enumerate(b)
                if not (own and unbiased and i == j)
            ]
        )

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def gaussian_kernel(p, q):
    """CMMD's, of two vectors: sigma is 10."""
    return np.exp(-np.sum((p - q) ** 2) / 200)


# a and b of each path, in float64.
PATHS = {
    "flow": (lambda t: 1 - t, lambda t: t),
    "cosine_continuous": (lambda t: np.cos(np.pi * t / 2), lambda t: np.sin(np.pi * t / 2)),
    "edm": (lambda t: np.ones_like(t), lambda t: t),
}
