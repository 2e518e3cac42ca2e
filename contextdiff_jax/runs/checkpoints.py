"""Checkpoints of a run (Orbax): asynchronous, sharded, complete or invisible, with the place in the
data.

Each carries manifest.json, the size and digest of its every file, which is written before the
folder gets its name. What doesn't agree with its manifest is never read: the checkpoint before it
is.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Array, Int, PyTree
from orbax.checkpoint import checkpoint_managers
from safetensors import SafetensorError

from contextdiff_jax.parallel.processes import is_first
from contextdiff_jax.runtime.errors import RunError, one_line
from contextdiff_jax.runtime.host import is_remote

LOGGER = logging.getLogger(__name__)
MANIFEST, METADATA = "manifest.json", "_CHECKPOINT_METADATA"
# A full disk comes as OSError, or from TensorStore's threads as ValueError or JaxRuntimeError with
# its text.
_SAVING = OSError, ValueError, jax.errors.JaxRuntimeError
_REASONS = [os.strerror(n) for n in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)]


class RunState(Protocol):
    """The state of any kind of run: a training's, an autoencoder's, a clip's."""

    step: Int[Array, ""]
    params: PyTree


State = TypeVar("State", bound=RunState)


def _digest(path: pathlib.Path) -> list:
    # Orbax adds the time of the commit after the manifest is written; nobody reads it.
    if path.name == METADATA:
        known = {
            k: v for k, v in json.loads(path.read_text()).items() if k != "commit_timestamp_nsecs"
        }
        return [
            len(known),
            hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=16).hexdigest(),
        ]
    with path.open("rb") as file:
        digest = hashlib.blake2b(digest_size=16)
        size = 0
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return [size, digest.hexdigest()]


def _digests(folder: pathlib.Path) -> dict[str, list]:
    """{file: [bytes, digest]} of all files in `folder` but its manifest."""
    paths, folders = [], [folder]
    while folders:
        for path in folders.pop().iterdir():
            (folders if path.is_dir() else paths).append(path)
    paths = sorted(path for path in paths if path != folder / MANIFEST)
    with ThreadPoolExecutor(8) as pool:  # reading and hashing both leave Python
        return dict(
            zip(
                (str(path.relative_to(folder)) for path in paths),
                pool.map(_digest, paths),
                strict=True,
            )
        )


def _seal(folder: pathlib.Path) -> None:
    """Writes the manifests of the checkpoints under way. Orbax calls it when all their files are
    written, before a folder gets its name; in the first process only.
    """
    for path in folder.iterdir():
        if ".orbax-checkpoint-tmp" in path.name:
            files = _digests(path)
            total = hashlib.blake2b(json.dumps(files).encode(), digest_size=16).hexdigest()
            (path / MANIFEST).write_text(json.dumps({"files": files, "digest": total}))


def damage(folder: pathlib.Path, contents: bool = True) -> str:
    """The damage of the checkpoint in `folder`, '' if there is none.

    Without `contents` only missing files are found, which reads none of them.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files, total = manifest["files"], manifest["digest"]
    except FileNotFoundError:  # it is written before a checkpoint gets its name
        return f"it has no {MANIFEST}, so it was copied in part"
    except NotADirectoryError:
        return "it is a file"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    if hashlib.blake2b(json.dumps(files).encode(), digest_size=16).hexdigest() != total:
        return f"{MANIFEST} is damaged"
    for name in files:
        if not (folder / name).exists():
            return f"{name} is missing"
    if not contents:
        return ""
    try:
        there = _digests(folder)
    except ValueError:
        return f"{METADATA} is damaged"
    except FileNotFoundError as error:  # a run that goes on has deleted it meanwhile
        return f"{error.filename} is missing"
    for name, wanted in files.items():
        if there[name] != wanted:
            (size, _), (old, _) = there[name], wanted
            return f"{name} is damaged: " + (
                "its bytes have changed" if size == old else f"size {size}, not {old}"
            )
    return ""


def _folder(workdir: pathlib.Path, name: str = "checkpoints") -> epath.Path:
    workdir = epath.Path(workdir)
    return (workdir if is_remote(workdir) else workdir.absolute()) / name


def _steps(workdir: pathlib.Path) -> list[int]:
    """Steps with a finished checkpoint, newest first."""
    folder = _folder(workdir)
    return (
        sorted((int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True)
        if folder.exists()
        else []
    )


def newest_good(workdir: pathlib.Path) -> int | None:
    """The newest checkpoint that is whole; those that are skipped are said."""
    for step in _steps(workdir):
        problem = damage(_folder(workdir) / str(step))
        if not problem:
            return step
        LOGGER.warning("checkpoint %d is skipped: %s", step, problem)
    return None


def set_damaged_aside(workdir: pathlib.Path) -> None:
    """Moves damaged checkpoints to `workdir`/damaged, so that a run that resumes can save those
    steps again. What is older than the newest whole one must only have all its files. Where none is
    whole, metrics.jsonl moves, too, and training begins anew. All processes of a run call it.
    """
    if is_first():
        _set_aside(workdir)
    multihost_utils.sync_global_devices("checkpoints verified")


def _set_aside(workdir: pathlib.Path) -> None:
    good, aside = newest_good(workdir), []
    for step in _steps(workdir):
        folder = _folder(workdir) / str(step)
        if good is None or step > good or (step < good and damage(folder, contents=False)):
            aside.append(folder)
    log = epath.Path(workdir) / "metrics.jsonl"
    if aside and good is None:
        LOGGER.warning("%s: none is whole; training begins at step 0", _folder(workdir))
        aside += [log] * log.exists()
    for path in aside:
        target = workdir / "damaged" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        while target.exists():
            target = target.with_name(target.name + "_")
        path.rename(target)


def open_manager(
    workdir: pathlib.Path,
    keep: int = 1,
    read_only: bool = False,
    best: int = 0,
    metric: str = "loss",
) -> ocp.CheckpointManager:
    """Orbax's manager of `workdir`/checkpoints: the newest `keep` are kept, and the `best` with the
    lowest `metric`;
    `read_only`: for a run that another process may be training, all are."""
    lowest = checkpoint_managers.BestN(
        # a small batch may lack a quartile of t
        get_metric_fn=lambda metrics: -metrics.get(metric, math.inf),
        n=best,
        keep_checkpoints_without_metrics=False,
    )
    kept = [checkpoint_managers.LatestN(keep)] + [lowest] * (best > 0)
    # A manager that is never asked to save writes and deletes nothing. Orbax's own read_only warns,
    # each time, that it is.
    policy = None if read_only else checkpoint_managers.AnyPreservationPolicy(kept)
    return _manager(_folder(workdir), policy, read_only)


def open_archive(
    workdir: pathlib.Path, name: str, read_only: bool = False
) -> ocp.CheckpointManager:
    """Orbax's manager of `workdir`/`name`, where all that is saved stays."""
    return _manager(_folder(workdir, name), None, read_only)


def _manager(
    folder: epath.Path, policy: checkpoint_managers.PreservationPolicy | None, read_only: bool
) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        create=not read_only,
        cleanup_tmp_directories=not read_only,
        async_options=ocp.AsyncOptions(post_finalization_callback=functools.partial(_seal, folder)),
    )
    # Named, so that a fresh process can read the saved shapes before it restores anything.
    handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


@contextlib.contextmanager
def closing(manager: ocp.CheckpointManager, workdir: pathlib.Path) -> Iterator[None]:
    """Closes the manager after the save that is under way. RunError, one line, for what went wrong
    in writing.
    """
    try:
        yield
    finally:
        with _saving(manager, workdir):
            manager.close()


def wait(manager: ocp.CheckpointManager, workdir: pathlib.Path) -> None:
    """Waits for the save that is under way. RunError, one line, for what went wrong in writing."""
    with _saving(manager, workdir):
        manager.wait_until_finished()


def _saving(
    manager: ocp.CheckpointManager, workdir: pathlib.Path
) -> contextlib.AbstractContextManager[None]:
    return writing(workdir, f"{manager.directory.name}: a checkpoint", _SAVING)


@contextlib.contextmanager
def writing(
    workdir: pathlib.Path,
    what: str,
    errors: tuple[type[Exception], ...] = (OSError, SafetensorError),
) -> Iterator[None]:
    """Turns what goes wrong in writing `workdir`/`what` into a RunError, one line, with the
    checkpoint that is kept.
    """
    try:
        yield
    except errors as error:
        kept = next((f"step {step} is kept" for step in _steps(workdir)), "no checkpoint is there")
        text = one_line(error)
        # TensorStore says it after three paths.
        reason = next((reason for reason in _REASONS if reason in text), text[:300])
        raise RunError(f"{workdir}/{what} could not be written: {reason}; {kept}") from error


def save(
    manager: ocp.CheckpointManager,
    state: RunState,
    data_state: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Starts saving; visible when complete. The state may be donated as soon as this returns."""
    arguments = ocp.args.Composite(
        state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(dict(data_state))
    )
    with _saving(manager, manager.directory.parent):
        step = int(jax.device_get(state.step))
        manager.save(step, args=arguments, metrics=dict(metrics) if metrics else None)


def shape_differences(saved: PyTree, wanted: PyTree, limit: int = 3) -> str:
    """The first names whose shapes differ between two trees of arrays, or '' if none do."""

    def table(tree):
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    old, new = table(saved), table(wanted)
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return "; ".join(
        f"{name}: {old.get(name, 'absent')} saved, {new.get(name, 'absent')} wanted"
        for name in names[:limit]
    )


def check_shapes(manager: ocp.CheckpointManager, workdir: pathlib.Path, wanted: RunState) -> None:
    """Raises ValueError, with the first names and shapes, if the newest checkpoint is of another
    model.
    """
    step = manager.latest_step()
    if step is None:
        return
    saved = manager.item_metadata(step)["state"]
    saved = getattr(saved, "tree", saved)
    difference = shape_differences(saved["params"], wanted.params)
    if difference:
        raise ValueError(
            f"--workdir={workdir}: its checkpoint {step} is of another model: {difference}"
        )


def placed(abstract: PyTree, shardings: PyTree) -> PyTree:
    """Shapes and dtypes with the place that each array shall get."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
    )


def restore(
    manager: ocp.CheckpointManager, abstract: State, step: int | None = None
) -> tuple[State, dict[str, Any]]:
    """The checkpoint of `step` (the newest), laid out as `abstract` says (shapes, dtypes and
    shardings), whatever mesh and number of processes wrote it.
    """
    step = manager.latest_step() if step is None else step
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
        ),
    )
    LOGGER.info("restored step %d", step)
    return restored["state"], restored["data"]


def restore_newest(workdir: pathlib.Path, abstract: State) -> tuple[State, dict[str, Any], int]:
    """(state, place in the data, step) of the newest whole checkpoint, for readers.

    Raises ValueError if there is none.
    """
    step = _required(workdir)
    with open_manager(workdir, read_only=True) as manager:
        return *restore(manager, abstract, step), step


def restore_weights(
    workdir: pathlib.Path, abstract: PyTree, weights: str = "ema"
) -> tuple[PyTree, int]:
    """(parameters, step) of the newest whole checkpoint: `weights` (`ema` or `params`) alone is
    read, as `abstract` says (bf16 dtypes read float32 values as bf16).

    Raises ValueError if there is none.
    """
    step = _required(workdir)
    restored = read_part(_folder(workdir) / str(step), {weights: abstract})
    LOGGER.info("read %s of step %d", weights, step)
    return restored[weights], step


def read_part(folder: epath.Path, wanted: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The arrays of a checkpoint's state that are `wanted`, with their shapes, dtypes and places,
    by the names that they have there. No others are read.
    """
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(
            folder / "state",
            args=ocp.args.PyTreeRestore(
                wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            ),
        )


def _required(workdir: pathlib.Path) -> int:
    step = newest_good(workdir)
    if step is None:
        steps = ", ".join(map(str, _steps(workdir)))
        lack = f"all its checkpoints are damaged ({steps})" if steps else ""
        raise ValueError(f"--workdir={workdir}: {lack or 'has no finished checkpoint yet'}")
    return step
