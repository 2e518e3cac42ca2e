"""What a metric finds, as the report shows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from contextdiff_jax.evaluation.intervals import Estimate

Scores = dict[str, dict[str, Estimate]]  # {row: {name: estimate}}


class Shown(NamedTuple):
    """Pictures to look at, in rows of `columns`, each with its caption."""

    images: UInt8[np.ndarray, "N H W 3"]
    captions: Sequence[str]
    columns: int


@dataclasses.dataclass(frozen=True)
class Result:
    """A metric's scores; `unit` is % (the values are shares), bits/dim, or none. `shown`: pictures
    for the page, by their title.
    """

    scores: Scores
    unit: str = ""
    note: str = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    shown: dict[str, Shown] = dataclasses.field(default_factory=dict)
