"""A real training that is stopped by SIGTERM and taken up: does it go on where it was, how fast?"""

from __future__ import annotations

import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

CONFIG = "configs/shapes_mmdit.py"
TINY = (
    "--config.train.batch_size=8",
    "--config.model.num_layers=1",
    "--config.data.image_size=16",
    "--config.model.sample_size=16",
    "--config.data.num_scenes=64",
)
_SHARE = 0.4  # of the time, until the signal
_AFTER = 3  # log lines that the second part must reach


def _lines(folder: pathlib.Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]


def _wait(process: subprocess.Popen, done, end: float) -> bool:
    """Whether `done()` came to be before the time's end and the process's."""
    while time.monotonic() < end:
        if done():
            return True
        if process.poll() is not None:
            return done()
        time.sleep(0.2)
    return False


def upkeep(seconds: float, tiny: bool) -> dict[str, Any]:
    """Trains, signals, trains on, in that many seconds. One row: pace, seconds until the state was
    saved, seconds from the start to the first log line after it, and whether no step is lost or
    done twice.
    """
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as name:
        folder, told = pathlib.Path(name, "run"), pathlib.Path(name, "stderr")
        command = [
            *(sys.executable, "-m", "contextdiff_jax.train", f"--config={CONFIG}"),
            *(f"--workdir={folder}", "--config.train.log_every=10"),
            *("--config.train.steps=1000000", "--config.train.sample_every=0"),
            *(TINY if tiny else ("--config.train.precision=bfloat16",)),
        ]

        def start() -> subprocess.Popen:
            # Into a file: a pipe that nobody reads is full after some thousand steps.
            with told.open("w") as lines:
                return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=lines)

        process = start()
        try:
            reached = _wait(process, lambda: len(_lines(folder)) >= 2, end)
            _wait(process, lambda: False, min(time.monotonic() + _SHARE * seconds / 2, end - 10))
            if not reached or process.poll() is not None:
                return {"error": f"no 20 steps in {seconds:.0f} s: {_last(told)}"}
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            process.wait(max(end - began, 1))
            saved, before = time.monotonic() - began, _lines(folder)
            began, process = time.monotonic(), start()
            wanted = len(before) + _AFTER
            if not _wait(process, lambda: len(_lines(folder)) >= wanted, end):
                return {"error": f"not taken up in the time left: {_last(told)}"}
            resumed, after = time.monotonic() - began, _lines(folder)
        except subprocess.TimeoutExpired:
            return {"error": "not stopped by SIGTERM in the time left"}
        finally:
            process.kill()
            process.wait()
    steps = [line["step"] for line in after]
    row = {
        "images_per_second": before[-1]["images_per_second"],
        "stop_seconds": saved,
        "resume_seconds": resumed,
        "steps_before": before[-1]["step"],
        "steps_after": steps[-1],
        "in_order": steps == sorted(set(steps)),
        "loss_before": before[-1]["loss"],
        "loss_after": after[-1]["loss"],
    }
    text = (
        f"{row['images_per_second']:.1f} images/s; stopped and saved in {saved:.1f} s at step "
        f"{row['steps_before']}; {resumed:.1f} s from the next start to step {row['steps_after']}; "
        f"{'no step lost or done twice' if row['in_order'] else 'STEPS ARE OUT OF ORDER'}"
    )
    return {"text": text, "rows": [row]}


def _last(file: pathlib.Path) -> str:
    lines = file.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"
