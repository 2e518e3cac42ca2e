"""The section `log` of a config."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where a training is shown beside its own folder.

    `wandb`: a project of Weights & Biases, or TEAM/PROJECT; empty: none.
    """

    wandb: str = ""  # a project of Weights & Biases, or TEAM/PROJECT; empty: none

    def __post_init__(self):
        parts = self.wandb.split("/")
        if self.wandb and not (len(parts) <= 2 and all(part.strip() for part in parts)):
            raise ValueError(f"log.wandb={self.wandb!r}: must be PROJECT or TEAM/PROJECT")
