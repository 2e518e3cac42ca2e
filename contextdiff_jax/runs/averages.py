"""Power-function averages of parameters, and those of any length that they make afterwards.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2),
section 3 and appendix C. Plain numpy in float64: no files, no networks.

The average after update n takes a share w(n) of the newest parameters theta_n. With p = gamma + 1
of the paper and beta(n) = 1 - w(n) = (1 - 1/n)^p, it holds of each theta_t the share s(t; n):

    average_n = average_(n-1) + w(n) (theta_n - average_(n-1)),    w(n) = 1 - (1 - 1/n)^p       (1)
    s(t; n) = (t/n)^p w(t) = (t^p - (t - 1)^p) / n^p,              t = 1 ... n                  (2)

The shares keep their shape as a run grows. Their standard deviation, as a share of n, is the
average's length (the paper's sigma_rel):

    length^2 = p / ((p + 1)^2 (p + 2))                                                          (3)

A weighted sum of kept averages holds the same sum of their shares. The weights x of a wanted
length's shares s, which no run kept, are those nearest to it that sum to 1:

    minimise  sum_t (sum_i x_i s_i(t) - s(t))^2   such that   sum_i x_i = 1                     (4)

The paper takes integrals over continuous time in (4), and divides x by its sum. Here sums over the
updates are taken, so that (4) is exact for short runs, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float64


def power_of_length(length: float) -> float:
    """The p of (3), at least 1 for a length up to that of the plain mean, 12^-0.5."""
    roots = np.roots([1.0, 4.0, 5.0 - length**-2, 2.0])
    return float(roots.real.max())


def newest_share(power: float, update: Any, xp: ModuleType = np) -> Any:
    """w of (1); `xp`: numpy, or jax.numpy in a program.

    Accurate where 1 - 1/n, rounded, no longer is: in float32 the power of it is off by 6% of w
    after a million updates.
    """
    return -xp.expm1(power * xp.log1p(-1.0 / update))


def solve(
    updates: Sequence[int], lengths: Sequence[float], wanted: Sequence[float]
) -> tuple[Float64[np.ndarray, "W K P"], Float64[np.ndarray, " W"]]:
    """The x of (4) for `wanted` lengths after the last of `updates`, and what is left of the
    difference, the root of (4)'s minimum as a share of the wanted one's own norm.

    Averages of all `lengths` were kept after each of `updates`, which ascend.
    """
    powers = np.array([power_of_length(length) for length in (*lengths, *wanted)])
    products, count = _products(updates, powers), np.asarray(updates, np.float64)
    K, P, W = len(updates), len(lengths), len(wanted)
    # <s_a(n_i), s_b(n_j)> ends at the earlier of the two, to which (2) scales the later one.
    first = np.minimum.outer(np.arange(K), np.arange(K))
    scale = (count[first] / count)[..., None] ** powers  # [i, j, b], of what ends at n_j
    gram = products[first] * scale.swapaxes(0, 1)[..., None] * scale[:, :, None]  # [i, j, a, b]
    kept = gram[:, :, :P, :P].transpose(0, 2, 1, 3).reshape(K * P, K * P)
    right = gram[:, -1, :P, P:].reshape(K * P, W)
    own = np.diagonal(products[-1])[P:]

    # Lagrange's equations. Averages after the first update are all theta_1: least squares takes
    # equations that say the same twice.
    unit = np.trace(kept) / len(kept)
    ones = np.ones((len(kept), 1))
    equations = np.block([[kept / unit, ones], [ones.T, np.zeros((1, 1))]])
    x = np.linalg.lstsq(equations, np.vstack([right / unit, np.ones((1, W))]), rcond=1e-13)[0][:-1]
    left = np.einsum("iw,ij,jw->w", x, kept, x) - 2 * np.einsum("iw,iw->w", x, right) + own
    return x.T.reshape(W, K, P), np.sqrt(np.maximum(left, 0) / own)


def _products(
    updates: Sequence[int], powers: Float64[np.ndarray, " Q"]
) -> Float64[np.ndarray, "K Q Q"]:
    """sum_t s_a(t; n) s_b(t; n) for all pairs of powers after each of `updates`. From one to the
    next only the updates between are summed: (2) scales what was there.
    """
    total, before, found = np.zeros((len(powers), len(powers))), 0, []
    for update in updates:
        t = np.arange(before + 1, update + 1, dtype=np.float64)
        with np.errstate(divide="ignore"):  # w(1) = 1: the logarithm of 0 is meant
            shares = (t / update) ** powers[:, None] * newest_share(powers[:, None], t)
        total = total * (before / update) ** np.add.outer(powers, powers) + shares @ shares.T
        found.append(total)
        before = update
    return np.stack(found)
