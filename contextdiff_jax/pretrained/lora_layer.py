"""One layer's change by LoRA (Hu et al., 2021)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class LoraLayer:
    """One layer's change: down [R, I, ...], up [O, R, ...] and alpha, its scale's numerator."""

    down: np.ndarray
    up: np.ndarray
    alpha: float

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]

    def delta(self) -> np.ndarray:
        """(alpha / rank) up @ down as a float32 matrix [O, I * ...]."""
        up, down = (np.asarray(w, np.float32) for w in (self.up, self.down))
        return (self.alpha / self.rank) * (up.reshape(len(up), -1) @ down.reshape(len(down), -1))

    def shape_problem(self, shape: tuple[int, ...]) -> str | None:
        """Why this is no change of a weight of that `shape`, or None."""
        fits = (
            self.up.shape[0] == shape[0]
            and self.up.size == shape[0] * self.rank
            and self.down.size == self.rank * math.prod(shape[1:])
        )
        if fits:
            return None
        return f"up {self.up.shape}, down {self.down.shape}; the layer's weight is {shape}"
