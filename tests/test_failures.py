"""Runs that are killed, told to stop, or find their newest checkpoint damaged, as processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import NO_ATTENTION, ROOT, config_dict, config_file

from contextdiff_jax.runs import checkpoints
from contextdiff_jax.settings import parse
from contextdiff_jax.training.state import init_state

KILLS = 20
STEPS = 24
CONFIG = config_dict(**NO_ATTENTION | {"train.steps": STEPS, "train.checkpoint_every": 2})


def start(workdir, cache) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "contextdiff_jax.train",
            f"--config={config_file(cache.with_suffix('.py'), CONFIG)}",
            f"--workdir={workdir}",
        ],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(workdir):
    state, data, step = checkpoints.restore_newest(
        workdir, jax.eval_shape(lambda: init_state(parse(CONFIG)))
    )
    assert step == STEPS and data["next_batch"] == step
    return state


def logged(workdir) -> list[tuple]:
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(tmp_path):
    """bash launch/test.sh -m slow tests/test_failures.py: some 15 s of a core for each kill.

    Kills come at any moment from the start of training: in a step, in a save, in its commit.
    """
    rng, cache = random.Random(0), tmp_path / "cache"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    begun = time.monotonic()
    output, _ = start(whole, cache).communicate()
    seconds = time.monotonic() - begun
    for number in range(KILLS):
        process = start(killed, cache)
        time.sleep(seconds * rng.uniform(0.3, 0.9))
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), f"kill {number}: {output[-2000:]}"
    process = start(killed, cache)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-2000:]
    jax.tree.map(np.testing.assert_array_equal, finished(killed), finished(whole))
    assert logged(killed) == logged(whole)
    assert [step for step, *_ in logged(killed)] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_stopped_run_saves_its_step_and_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path,
):
    """bash launch/test.sh -m slow tests/test_failures.py: two runs."""
    process = start(tmp_path / "run", tmp_path / "cache")
    while not (tmp_path / "run" / "checkpoints" / "4").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 0 and "SIGTERM: saving, then stopping" in output
    steps = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert steps[-1] == logged(tmp_path / "run")[-1][0] and len(steps) == 2
    victim = max(
        (tmp_path / "run" / "checkpoints" / str(steps[-1])).rglob("*"),
        key=lambda path: path.stat().st_size,
    )
    victim.write_bytes(victim.read_bytes()[:-1])
    process = start(tmp_path / "run", tmp_path / "cache")
    output, _ = process.communicate()
    assert process.returncode == 0, output[-2000:]
    assert f"checkpoint {steps[-1]} is skipped" in output and f"restored step {steps[0]}" in output
    finished(tmp_path / "run")
