"""A run's folder: of one config, and of one run at a time.

The lock is `run.lock`, which the system holds for the process (flock), so that a killed run's ends
with it. It names host and process, and shows by its time stamp, every few seconds, that they live.
That is what counts where the system's lock doesn't reach: buckets, file systems without flock, and
those that keep it to one host.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from contextdiff_jax.parallel.processes import is_first
from contextdiff_jax.pretrained.folder_files import read_json
from contextdiff_jax.runtime.fields import defaults
from contextdiff_jax.runtime.files import write_json
from contextdiff_jax.runtime.host import is_remote
from contextdiff_jax.settings import default_config
from contextdiff_jax.settings.autoencoder import AutoencoderSettings

LOGGER = logging.getLogger(__name__)
LOCK, BEAT_SECONDS = "run.lock", 10.0
# Fields that a run may change when it goes on: they don't alter what a step computes.
FREE_FIELDS = (
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.power_ema_every",
    "train.sample_every",
    "train.keep_best",
    "train.best_metric",
    "train.max_nonfinite",
    "train.peer_timeout",
    "train.profile_steps",
    "data.path",
    "data.max_pixels",
    "data.index_folder",
    "data.num_workers",
    "data.prefetch",
    "mesh.",
    "sample.",
    "log.",
)


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return {'train.steps': 1000, ...}, as JSON holds it."""
    return flatten_dict(json.loads(json.dumps(config)), sep=".")


@functools.cache
def _defaults() -> dict[str, Any]:
    return flatten(defaults(AutoencoderSettings) | default_config())


def claim_workdir(
    workdir: pathlib.Path,
    config: Mapping[str, Any],
    free: tuple[str, ...] = FREE_FIELDS,
    write: bool = True,
) -> None:
    """Writes config.json, or checks that the one there is of the same run (but for `free` fields).
    A field that one of them lacks has its default there, as in runs of before there was that field.

    Raises ValueError naming the first field that differs.
    """
    path = workdir / "config.json"
    new = flatten(config)
    if path.exists():
        try:
            old = flatten(read_json(path, "a run's config"))
        except ValueError as error:
            raise ValueError(f"{error}; delete it to go on with the config given here") from None
        for name in sorted(old.keys() | new.keys()):
            there, here = (fields.get(name, _defaults().get(name)) for fields in (old, new))
            if there != here and not name.startswith(free):
                raise ValueError(
                    f"--workdir={workdir}: holds another config's run, {name} is {there!r} there "
                    f"and {here!r} here; choose another workdir or that config"
                )
    if not write:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, config)


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the folder for this run, of however many processes.

    Raises ValueError, in all of them, naming the host and process of the run that is there.
    """
    lock, problem = contextlib.ExitStack(), ""
    with lock:
        if is_first():
            try:
                lock.enter_context(_Lock(workdir))
            except ValueError as error:
                problem = str(error)
        problem = _from_first(problem)
        if problem:
            raise ValueError(problem)
        yield


def _from_first(text: str) -> str:
    """The first process's text, in all."""
    if jax.process_count() == 1:
        return text
    letters = np.zeros(1000, np.uint8)
    encoded = np.frombuffer(text.encode()[: len(letters)], np.uint8)
    letters[: len(encoded)] = encoded
    letters = np.asarray(multihost_utils.broadcast_one_to_all(letters))
    return bytes(letters).rstrip(b"\0").decode(errors="replace")


class _Lock:
    """The lock of one process on a folder; entered, it is held."""

    def __init__(self, workdir: pathlib.Path):
        self._workdir, self._path, self._file = workdir, workdir / LOCK, None
        self._mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.ctime()}
        self._released, self._is_new = threading.Event(), not workdir.exists()

    def __enter__(self) -> _Lock:
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            flocked = not is_remote(self._path) and self._flock()
            owner = self._owner()
            # Of this host, what isn't locked is left of a run that was killed.
            if owner and (owner.get("host") != self._mine["host"] or not flocked):
                self._refuse_living(owner)
            self._path.write_text(json.dumps(self._mine))
        except (ValueError, OSError) as error:
            if self._file:
                self._file.close()
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"{self._path}: can't be written: {error.strerror}") from error
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._released.set()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        if self._file:
            self._file.close()
        if self._is_new and not is_remote(self._workdir):
            with contextlib.suppress(OSError):  # not empty: the run began
                os.rmdir(self._workdir)

    def _flock(self) -> bool:
        """Takes the system's lock; False where the file system has none."""
        while True:
            self._file = open(self._path, "a")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise ValueError(self._said(self._owner())) from None
            except OSError as error:
                LOGGER.info("%s: no lock of the file system (%s)", self._path, error)
                return False
            with contextlib.suppress(FileNotFoundError):  # its owner has deleted it meanwhile
                if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path)):
                    return True
            self._file.close()

    def _owner(self) -> dict[str, Any]:
        try:
            return read_json(self._path, "a run's lock")
        except ValueError:  # none, or its owner is just writing it
            return {}

    def _refuse_living(self, owner: dict[str, Any]) -> None:
        """ValueError if the owner's time stamp moves; hosts' clocks are not compared."""
        if owner.get("host") == self._mine["host"] and not _runs(owner.get("pid")):
            return
        seconds = 3.5 * BEAT_SECONDS
        LOGGER.info("%s; waiting %.0f s to see whether it lives", self._said(owner), seconds)
        first, end = self._stamp(), time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(BEAT_SECONDS / 10)
            if self._stamp() != first:
                raise ValueError(self._said(owner))
        LOGGER.info("%s: left by a run that is gone", self._path)

    def _stamp(self) -> Any:
        if is_remote(self._path):
            return self._path.stat().mtime if self._path.exists() else None
        with contextlib.suppress(FileNotFoundError), open(self._path) as file:
            return os.fstat(file.fileno()).st_mtime_ns  # opened: an NFS client asks the server then

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            try:
                if is_remote(self._path):
                    self._path.write_text(json.dumps(self._mine))
                else:
                    os.utime(self._path)
            # The lock never ends the run, whatever a bucket's library raises.
            except Exception as error:
                LOGGER.debug("%s: %s", self._path, error)

    def _said(self, owner: dict[str, Any]) -> str:
        who = "another process"
        if owner:
            who = f"process {owner.get('pid')} on {owner.get('host')}"
        return (
            f"--workdir={self._workdir}: {who} is writing to it, since "
            f"{owner.get('since', 'now')}; wait for it or stop it, or name another workdir"
        )


def _runs(pid: Any) -> bool:
    """Whether a process of this host has that number, and it isn't this one."""
    if not isinstance(pid, int) or pid in (0, os.getpid()):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
