"""Snapshots of a run's power-function averages, and the average of any length that they make.

They lie in `workdir`/averages/STEP and are written as checkpoints are, but all of them are kept.
The mathematics is in averages.py.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jaxtyping import Array, Float32, Int, PyTree

from contextdiff_jax.parallel.mesh import path_name
from contextdiff_jax.runs import checkpoints
from contextdiff_jax.runs.averages import solve
from contextdiff_jax.settings.train import PLAIN_MEAN, check_length

LOGGER = logging.getLogger(__name__)
FOLDER = "averages"
# What may be left of a length's shares, relative to their norm. A length outside of those that were
# kept needs ever denser snapshots.
TOLERANCE = 0.1
# A snapshot whose weights no digit of float32 shows isn't read.
NEGLIGIBLE = 1e-9


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The averaged parameters after a step, by `profile_name`."""

    step: Int[Array, ""]
    params: dict[str, PyTree]


def profile_name(number: int) -> str:
    """The name of the average of `train.power_ema[number]`."""
    return f"profile_{number}"


def save(
    workdir: pathlib.Path, step: Int[Array, ""], updates: int, averages: Sequence[PyTree]
) -> None:
    """Writes the averages after so many updates; all processes call it. Complete when it returns.

    RunError, one line, for what goes wrong in writing.
    """
    snapshot = Snapshot(step, {profile_name(i): average for i, average in enumerate(averages)})
    manager = checkpoints.open_archive(workdir, FOLDER)
    with checkpoints.closing(manager, workdir):
        checkpoints.save(manager, snapshot, {"updates": updates})


def drop_after(workdir: pathlib.Path, step: int) -> None:
    """Deletes the snapshots of steps that a run which goes on from `step` does again; all processes
    call it.
    """
    with checkpoints.open_archive(workdir, FOLDER) as manager:
        for later in [saved for saved in manager.all_steps() if saved > step]:
            manager.delete(later)


def load_average(
    workdir: pathlib.Path, abstract: nnx.State, lengths: Sequence[float], length: float
) -> tuple[nnx.State, int]:
    """(parameters, step) of the average of `length` after the newest snapshot, laid out as
    `abstract` says; `lengths`: those that the run kept. What isn't trained is the newest
    checkpoint's.

    Raises ValueError for a run without snapshots, and a length that they don't make.
    """
    check_length("--ema_length", length)
    if not lengths:
        raise ValueError(
            f"--ema_length={length}: --workdir={workdir} has no averages to make it of; train with "
            "--config.train.power_ema='(0.05,0.1)'"
        )
    with checkpoints.open_archive(workdir, FOLDER, read_only=True) as manager:
        steps = _whole(manager)
        if not steps:
            raise ValueError(
                f"--ema_length={length}: {manager.directory} holds no snapshot; the first is due "
                "after train.power_ema_every steps"
            )
        updates = [_updates(manager, step) for step in steps]
        weights = _weights(updates, lengths, length)
        held, rest = _divided(abstract, manager, steps[-1])
        params = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), held)
        used = [i for i, each in enumerate(weights) if np.abs(each).max() > NEGLIGIBLE]
        for i in used:
            folder = manager.directory / str(steps[i])
            wanted = {profile_name(profile): held for profile in range(len(lengths))}
            read = checkpoints.read_part(folder, {"params": wanted})["params"]
            parts = [read[name] for name in wanted]
            params = _added(params, weights[i].astype(np.float32), parts)
    LOGGER.info(
        "made ema_length %g of step %d from %d of %d snapshots",
        *(length, steps[-1], len(used), len(steps)),
    )
    if nnx.to_flat_state(rest):
        params = nnx.merge_state(params, checkpoints.restore_weights(workdir, rest)[0])
    return params, steps[-1]


def _whole(manager: ocp.CheckpointManager) -> list[int]:
    """The steps of the snapshots that aren't damaged, oldest first; the others are said."""
    whole = []
    for step in sorted(manager.all_steps()):
        problem = checkpoints.damage(manager.directory / str(step))
        if problem:
            LOGGER.warning("snapshot %d of the averages is left out: %s", step, problem)
        else:
            whole.append(step)
    return whole


def _updates(manager: ocp.CheckpointManager, step: int) -> int:
    restored = manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))
    return restored["data"]["updates"]


def _weights(updates: Sequence[int], lengths: Sequence[float], length: float) -> np.ndarray:
    """The weights [K, P] of the averages that make `length`. ValueError if they don't."""
    weights, left = solve(updates, lengths, (length,))
    if left[0] <= TOLERANCE:
        return weights[0]
    others = np.sort([*lengths, *np.arange(0.005, PLAIN_MEAN, 0.005)])
    made = others[solve(updates, lengths, others)[1] <= TOLERANCE]
    nearest = made[np.abs(made - length).argmin()]
    count = f"{len(updates)} snapshot{'s' * (len(updates) > 1)}"
    raise ValueError(
        f"--ema_length={length}: {count} of train.power_ema={tuple(lengths)} can't make it (off by "
        f"{left[0]:.0%}, {TOLERANCE:.0%} is allowed); the nearest possible is {nearest:.3g}"
    )


def _divided(
    abstract: nnx.State, manager: ocp.CheckpointManager, step: int
) -> tuple[nnx.State, nnx.State]:
    """`abstract` as (what the snapshots hold, the rest)."""
    saved = manager.item_metadata(step)["state"]
    saved = getattr(saved, "tree", saved)["params"][profile_name(0)]
    names = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(saved)}
    parts = [], []
    for path, leaf in nnx.to_flat_state(abstract):
        parts["/".join(map(str, path)) not in names].append((path, leaf))
    return nnx.from_flat_state(parts[0]), nnx.from_flat_state(parts[1])


@functools.partial(jax.jit, donate_argnums=0)
def _added(total: PyTree, weights: Float32[np.ndarray, " P"], parts: Sequence[PyTree]) -> PyTree:
    for weight, part in zip(weights, parts, strict=True):
        total = jax.tree.map(lambda a, b, weight=weight: a + weight * b, total, part)
    return total
