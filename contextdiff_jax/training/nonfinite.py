"""Steps without a finite loss or gradient: skipped and counted by the step itself, and here the end
of a run that has too many of them, with all that it takes to do the last one again (`train
--replay=DUMP`, replay.py).
"""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from contextdiff_jax.parallel.processes import is_first
from contextdiff_jax.runs import checkpoints
from contextdiff_jax.runs.workdir import claim_workdir
from contextdiff_jax.runtime.errors import RunError
from contextdiff_jax.settings import Settings
from contextdiff_jax.training.state import TrainState

LOGGER = logging.getLogger(__name__)


class FiniteGuard:
    """Says which steps were skipped, and ends the run past `train.max_nonfinite` of them. The step
    has left the parameters as they were, so the answer may come one step late: the host never waits
    for the step that it has just started.
    """

    def __init__(
        self,
        settings: Settings,
        config: Mapping[str, Any],
        workdir: pathlib.Path,
        state: TrainState,
    ):
        self._limit, self._config, self._workdir = settings.train.max_nonfinite, config, workdir
        self._count, self._watched = int(jax.device_get(state.metric_sums["nonfinite"])), None

    def watch(
        self, step: int, state: TrainState, batch: Mapping[str, jax.Array], nonfinite: jax.Array
    ) -> None:
        """Checks the step before, then remembers this one; `nonfinite`: the count after it."""
        self.check(state)
        self._watched = step, batch, nonfinite

    def check(self, state: TrainState) -> None:
        """Waits for the remembered step. RunError, after a dump of it, if it was one too many;
        `state` is the newest, which past the limit is the one that the step began with, but for its
        number.
        """
        if self._watched is None:
            return
        step, batch, count = self._watched
        count = int(jax.device_get(count))
        if count == self._count:
            return
        self._count = count
        LOGGER.warning(
            "step %d: the loss or the gradient is not finite; skipped (%d so far)",
            step,
            self._count,
        )
        if self._count <= self._limit:
            return
        folder = self._workdir / f"nonfinite_{step}"
        self._dump(folder, batch, state)
        raise RunError(
            f"step {step}: the loss or the gradient is not finite ({self._count} steps so far, "
            f"train.max_nonfinite={self._limit}); run the step again with --replay={folder}; the "
            "last good checkpoint is kept; lower train.learning_rate or train.clip_norm and run "
            "again"
        )

    def _dump(
        self, folder: pathlib.Path, batch: Mapping[str, jax.Array], state: TrainState
    ) -> None:
        arrays = {
            name: multihost_utils.process_allgather(value, tiled=True)
            for name, value in batch.items()
        }
        if is_first():
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "batch.npz").open("wb") as file:
                np.savez(file, **arrays)
        claim_workdir(folder, self._config, write=is_first())
        manager = checkpoints.open_manager(folder)
        with checkpoints.closing(manager, folder):
            checkpoints.save(manager, state, {})
