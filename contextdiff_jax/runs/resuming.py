"""The way into a run's folder for all that trains: a new run, or the same one gone on with."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from jaxtyping import PyTree
from orbax.checkpoint import CheckpointManager

from contextdiff_jax.parallel.processes import is_first
from contextdiff_jax.runs import checkpoints
from contextdiff_jax.runs.checkpoints import State
from contextdiff_jax.runs.workdir import FREE_FIELDS, claim_workdir


def resume(
    workdir: pathlib.Path,
    config: Mapping[str, Any],
    abstract: State,
    shardings: PyTree,
    keep: int,
    *,
    best: int = 0,
    metric: str = "loss",
    free: tuple[str, ...] = FREE_FIELDS,
) -> tuple[CheckpointManager, State | None, dict[str, Any]]:
    """(the folder's manager, the state of its newest whole checkpoint, its place in the data); None
    and {} in a folder without one, which becomes `config`'s. `keep`, `best`, `metric`: as
    `checkpoints.open_manager`; `free`: the fields that another config of the same run may change.

    Raises ValueError for a folder of another config's run or of another model.
    """
    checkpoints.set_damaged_aside(workdir)
    manager = checkpoints.open_manager(workdir, keep, best=best, metric=metric)
    checkpoints.check_shapes(manager, workdir, abstract)
    claim_workdir(workdir, config, free, write=is_first())
    if manager.latest_step() is None:
        return manager, None, {}
    return manager, *checkpoints.restore(manager, checkpoints.placed(abstract, shardings))
