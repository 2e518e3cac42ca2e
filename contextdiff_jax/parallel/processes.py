"""Processes of one run: how they find each other, stop together, and notice that one of them is
gone.

Found by flags, by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or by what a
cluster's scheduler tells (`CLUSTERS`); none of them: one process.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import pathlib
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax

# The coordination service's client has no public name; Orbax uses this one too.
from jax._src import distributed
from jax.experimental import multihost_utils

from contextdiff_jax.runtime.errors import one_line

LOGGER = logging.getLogger(__name__)
T = TypeVar("T")
_AGREED = itertools.count()  # all processes agree on the same things in the same order
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# How a collective's error begins, be it JaxRuntimeError or (Gloo's, on CPUs) ValueError.
STATUS = re.compile(
    r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION)\b"
)
TIMEOUT = 600  # seconds that commands without a config wait for the others
FLAGS = ("--coordinator_address", "--num_processes", "--process_id")


def _on_tpu_machine(env: Mapping[str, str]) -> bool:
    chips = pathlib.Path("/dev/accel0").exists() or pathlib.Path("/dev/vfio/0").exists()
    return chips and "TPU_SKIP_MDS_QUERY" not in env


# Signs of a scheduler whose processes `jax.distributed` can bring together by itself.
CLUSTERS: dict[str, Callable[[Mapping[str, str]], bool]] = {
    "SLURM": lambda env: "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", 1)) > 1,
    "GKE": lambda env: (
        "," in env.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in env
    ),
    "Open MPI": lambda env: "OMPI_MCA_orte_hnp_uri" in env,
    "Cloud TPU": _on_tpu_machine,
}


def start(
    address: str | None, count: int | None, index: int | None, env: Mapping[str, str], timeout: int
) -> str:
    """Joins this process to the others; returns how they were found. Call it before anything asks
    JAX for devices.

    Raises ValueError for an incomplete or impossible answer to "who are we", or if the others don't
    come in `timeout` seconds.
    """
    given = (address, count, index)
    source = "flags"
    if given == (None, None, None) and VARIABLES[0] in env:
        source = "environment"
        given = (
            env[VARIABLES[0]],
            *(int(env[name]) if name in env else None for name in VARIABLES[1:]),
        )
    if given == (None, None, None):
        source = next((name for name, sign in CLUSTERS.items() if sign(env)), "alone")
        if source == "alone":
            return source
    else:
        names = FLAGS if source == "flags" else VARIABLES
        missing = [name for name, value in zip(names, given, strict=True) if value is None]
        if missing:
            raise ValueError(
                f"{', '.join(missing)}: missing; many processes need {', '.join(names)}"
            )
        address, count, index = given
        if not 0 <= index < count or ":" not in address:
            raise ValueError(
                f"{names[0]}={address}, {names[2]}={index}: "
                f"must be HOST:PORT and lie in 0..{count - 1}"
            )
        if count == 1:
            return "alone"
    try:
        jax.distributed.initialize(
            *given,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"{source}: the processes did not all start within {timeout} s: {error}"
        ) from error
    LOGGER.info("process %d of %d, found by %s", jax.process_index(), jax.process_count(), source)
    return source


def is_first() -> bool:
    """Whether this process writes the logs and the pictures."""
    return jax.process_index() == 0


def agree(what: str, make: Callable[[], T], facts_of: Callable[[T], Mapping[str, Any]]) -> T:
    """The result of `make`, once the run's processes have compared the facts about theirs.

    Each makes its own, from what it has on its own disks. `what` is its name.

    Raises:
        ValueError: in all processes, if one of them failed to make it or has other facts than the
            first; the text names that process.
    """
    client = distributed.global_state.client
    if jax.process_count() == 1 or client is None:
        return make()
    made, facts, failed = None, {}, None
    try:
        made = make()
        facts = facts_of(made)
    except (ValueError, OSError) as error:
        failed = error
    folder = f"contextdiff/agree/{what} {next(_AGREED)}"
    who = f"process {jax.process_index()} ({socket.gethostname()})"
    entry = {"who": who, "failed": str(failed or ""), "facts": dict(facts)}
    client.key_value_set(f"{folder}/{jax.process_index():08d}", json.dumps(entry))
    try:  # a process that dies ends the wait; one that measures a large set takes its time
        client.wait_at_barrier(f"{folder}/all", 24 * 3600 * 1000)
        entries = [json.loads(text) for _, text in sorted(client.key_value_dir_get(folder))]
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{what}: a process was lost before all had opened it: {reason}") from None
    if failed:
        raise failed
    problem = disagreement(what, entries)
    if problem:
        raise ValueError(problem)
    return made


def disagreement(what: str, entries: Sequence[Mapping[str, Any]]) -> str:
    """The words of the first process that failed or has other facts than the first; '' if all
    agree.
    """
    for entry in entries:
        if entry["failed"]:
            return f"{entry['who']} failed: {entry['failed']}"
    first = entries[0]
    for entry in entries[1:]:
        for name in first["facts"] | entry["facts"]:
            here, there = first["facts"].get(name), entry["facts"].get(name)
            if here != there:
                return (
                    f"{what}: {entry['who']} has other ones than {first['who']}: {name}: {there} "
                    f"there, {here} here; give all processes the same files and settings"
                )
    return ""


class StopSignal:
    """SIGTERM, SIGINT and a closed terminal (SIGHUP, but under nohup) as an orderly stop: called at
    every step, it says whether this is the last. Many processes stop at the same step, whichever of
    them got the signal.

    Schedulers repeat SIGTERM (`timeout` sends two), so only a second SIGINT, a second or more after
    the first, ends the process at once. `close` gives the signals back, unless one came: then the
    process is about to end.
    """

    def __init__(self):
        self._came, self._many = False, jax.process_count() > 1
        self._first_ctrl_c = float("inf")
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
        if self._many:  # JAX itself listens to SIGTERM and agrees on the step
            numbers.remove(signal.SIGTERM)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            numbers.remove(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._note) for number in numbers}

    def _note(self, number, _):
        if number == signal.SIGHUP:  # what is written to a terminal that is gone is an error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for terminal in self._terminals:
                os.dup2(nowhere, terminal)
        if self._many:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        first, self._came = not self._came, True
        if first:
            LOGGER.info("%s: saving, then stopping", signal.Signals(number).name)
        if number == signal.SIGINT:
            if time.monotonic() - self._first_ctrl_c > 1:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self._first_ctrl_c = min(self._first_ctrl_c, time.monotonic())

    def __call__(self, step: int = 0) -> bool:
        return multihost_utils.reached_preemption_sync_point(step) if self._many else self._came

    def close(self) -> None:
        """Gives the signals back to whoever had them."""
        if not self._came:
            for number, handler in self._before.items():
                signal.signal(number, handler or signal.SIG_DFL)


class PeerWatch:
    """Ends this process, with a line that names the culprit, when a peer is lost, failed, or stands
    still.

    Each process writes its progress into the coordination service's table every few seconds, from a
    thread of its own. A peer whose entry stays as it is for `timeout` is lost. If this process
    hasn't gone on for `timeout`, the peer that has gone on least holds it up: all run the same
    program, so their counts compare.
    """

    FOLDER = "contextdiff/progress"

    def __init__(self, timeout: float):
        self._client, self._timeout = distributed.global_state.client, timeout
        self._me, self._many = jax.process_index(), jax.process_count() > 1
        self._count, self._doing, self._since = 0, "starting", time.monotonic()
        self._failed, self._beat, self._seen = "", 0, {}
        self._closed = threading.Event()
        self._interval = min(timeout / 8, 5)
        self._silence = timeout  # that makes a peer lost; a collective that broke shortens it

    def __enter__(self) -> PeerWatch:
        if self._many:
            # at once: a peer that dies before its thread's first turn has a name, too
            self._publish()
            threading.Thread(target=self._run, name="peer-watch", daemon=True).start()
        return self

    def __exit__(self, kind, error, _) -> None:
        """An error is told to the others, which end; what only reports that a peer is gone waits
        for its name.
        """
        if self._many and isinstance(error, Exception):
            text = one_line(error)
            if STATUS.match(text):
                self._silence = 4 * self._interval
                # The thread ends the process when it knows who it was.
                time.sleep(2 * self._silence)
            self._failed = text
            self._publish()
            _end(f"process {self._me}: {self._failed}")
        self._closed.set()
        if self._many:
            self._client.key_value_delete(f"{self.FOLDER}/{self._me}")  # done, not lost

    def __call__(self, doing: str) -> None:
        """Notes that this process goes on to something else."""
        self._count, self._doing, self._since = self._count + 1, doing, time.monotonic()

    def _publish(self) -> None:
        self._beat += 1
        entry = {
            "beat": self._beat,
            "count": self._count,
            "doing": self._doing,
            "failed": self._failed,
            "who": f"process {self._me} ({socket.gethostname()}, pid {os.getpid()})",
        }
        self._client.key_value_set(
            f"{self.FOLDER}/{self._me}", json.dumps(entry), allow_overwrite=True
        )

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            try:
                self._publish()
                entries = [
                    json.loads(text) for _, text in self._client.key_value_dir_get(self.FOLDER)
                ]
            except jax.errors.JaxRuntimeError as error:
                if self._closed.is_set():
                    return
                reason = str(error).splitlines()[0]
                _end(f"process 0, the coordinator, is lost: {reason}")
            problem = self._problem(entries, time.monotonic())
            if problem and not self._closed.is_set():
                _end(problem)

    def _problem(self, entries: list[dict], now: float) -> str:
        """The line that says what is wrong with a peer, or ''."""
        for entry in entries:
            if entry["failed"]:
                return f"{entry['who']} failed: {entry['failed']}"
            beat, _ = self._seen.get(entry["who"], (None, None))
            if beat != entry["beat"]:
                self._seen[entry["who"]] = entry["beat"], now
            elif now - self._seen[entry["who"]][1] > self._silence:
                return (
                    f"{entry['who']} is lost: not heard of for {self._silence:g} s, "
                    f"last seen {entry['doing']}"
                )
        # Where nobody is behind, all may be compiling or saving, which takes what it takes.
        behind = len({entry["count"] for entry in entries}) > 1
        if now - self._since > self._timeout * (1 if behind else 4):
            last = min(entries, key=lambda entry: entry["count"])
            return f"{last['who']} stands still: {last['doing']} for more than {self._timeout:g} s"
        return ""


def _end(message: str) -> None:
    """Ends the process at once: its collectives wait for a peer that won't come, so nothing can be
    unwound.
    """
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(2)
