"""Checkpoints of a run (Orbax): asynchronous, complete or invisible, with the place in the data."""

from __future__ import annotations

import json
import logging
import pathlib
from typing import Any, Mapping

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from contextdiff_jax.training.state import TrainState

LOGGER = logging.getLogger(__name__)
# Fields that a run may change when it goes on: they don't alter what a step computes.
FREE_FIELDS = (
    "train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.sample_every",
    "data.path", "data.index_folder", "data.num_workers", "data.prefetch", "mesh.", "sample.",
)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'train.steps': 1000, ...}"""
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def claim_workdir(workdir: pathlib.Path, config: Mapping[str, Any], free: tuple[str, ...] = FREE_FIELDS) -> None:
    """Writes config.json, or checks that the one there is of the same run (but for `free` fields).

    Raises ValueError naming the first field that differs.
    """
    path = workdir / "config.json"
    new = flatten(config)
    if path.exists():
        old = flatten(json.loads(path.read_text()))
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name) and not name.startswith(free):
                raise ValueError(
                    f"--workdir={workdir}: holds another config's run, {name} is {old.get(name)!r} there and "
                    f"{new.get(name)!r} here; choose another workdir or that config"
                )
    workdir.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(config, indent=2) + "\n")
    partial.replace(path)


def open_manager(workdir: pathlib.Path, keep: int = 1, read_only: bool = False) -> ocp.CheckpointManager:
    """Orbax's manager of `workdir`/checkpoints, newest `keep` kept; `read_only`: for a run that another process may be
    training, all are."""
    # A manager that is never asked to save writes and deletes nothing. Orbax's own read_only warns, each time, that it is.
    options = ocp.CheckpointManagerOptions(max_to_keep=None if read_only else keep, create=not read_only)
    # Named, so that a fresh process can read the saved shapes before it restores anything.
    handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options, item_handlers=handlers)


def save(manager: ocp.CheckpointManager, state: TrainState, data_state: Mapping[str, Any]) -> None:
    """Starts saving; visible when complete. The state may be donated as soon as this returns."""
    arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(dict(data_state)))
    manager.save(int(state.step), args=arguments)


def shape_differences(saved: PyTree, wanted: PyTree, limit: int = 3) -> str:
    """The first names whose shapes differ between two trees of arrays, or '' if none do."""
    def table(tree):
        return {
            "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    old, new = table(saved), table(wanted)
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return "; ".join(f"{name}: {old.get(name, 'absent')} saved, {new.get(name, 'absent')} wanted" for name in names[:limit])


def check_shapes(manager: ocp.CheckpointManager, workdir: pathlib.Path, wanted: TrainState) -> None:
    """Raises ValueError, with the first names and shapes, if the newest checkpoint is of another model."""
    step = manager.latest_step()
    if step is None:
        return
    saved = manager.item_metadata(step)["state"]
    saved = getattr(saved, "tree", saved)
    difference = shape_differences(saved["params"], wanted.params)
    if difference:
        raise ValueError(f"--workdir={workdir}: its checkpoint {step} is of another model: {difference}")


def restore(manager: ocp.CheckpointManager, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The newest complete checkpoint, laid out as `abstract` says (shapes, dtypes and shardings)."""
    step = manager.latest_step()
    restored = manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
    )
    LOGGER.info("restored step %d", step)
    return restored["state"], restored["data"]
