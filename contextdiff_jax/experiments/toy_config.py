"""The toy's settings."""

from __future__ import annotations

import dataclasses

from contextdiff_jax.runtime.fields import check_choice
from contextdiff_jax.settings.process import ESTIMATES

DENOISERS = ("exact", "learned")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """One run of the toy. The second group of fields is the learned denoiser's alone.

    Attributes:
        denoiser: `exact`, in closed form, or `learned`.
        kind: the context's network: `toy.fixed_context` or `toy.Network` names the kinds.
        head_width: the hidden layer that the second head has for itself; 0: none.
    """

    seed: int = 0
    denoiser: str = "learned"
    kind: str = "none"
    shift: str = "quadratic"
    estimate: str = "plugin"

    max_gain: float = 1.0
    width: int = 128
    head_width: int = 0
    time_dependent: bool = False
    steps: int = 4000
    batch_size: int = 256
    learning_rate: float = 3e-3

    def __post_init__(self):
        check_choice("denoiser", self.denoiser, DENOISERS)
        check_choice("estimate", self.estimate, ESTIMATES)
