"""All that is asked of an accelerator, in a given time, the most telling first.

Each part is a process of its own: one that fails or takes too long costs its own result and no
other. Those of a group compile beside each other and measure one after the other (turns.py); what
needs the device's memory is in a group with what needs little. This process never touches the
device.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from contextdiff_jax.benchmarks import turns
from contextdiff_jax.benchmarks.accelerator_page import page
from contextdiff_jax.benchmarks.loading import Result
from contextdiff_jax.benchmarks.upkeep import upkeep
from contextdiff_jax.runtime.files import write_json

LEAST = 20  # seconds without which no part is begun
# Of a GPU almost all, as it is needed: torch has none of it while it isn't.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
CONFIG = "--config=configs/benchmark_gpu.py:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AcceleratorBenchmark:
    """`minutes`: for all. `json`: the file that each result is written to as it comes; the page
    stands beside it. `tiny`: small networks, to see on any machine that all of it runs.
    """

    minutes: float
    json: pathlib.Path
    tiny: bool = False

    def __post_init__(self):
        if not self.minutes > 0:
            raise ValueError(f"--minutes={self.minutes}: must be above 0")


@dataclasses.dataclass(frozen=True)
class Part:
    """A question, and the flags of the benchmark command that answers it."""

    name: str
    flags: tuple[str, ...]


def groups(tiny: bool, compare: bool, folder: pathlib.Path) -> list[list[Part]]:
    """The parts in their order, those together that run beside each other; `compare`: torch and
    diffusers are there; `folder`: for the profiles.
    """
    unet, mmdit = ("tiny-unet", "tiny-mmdit") if tiny else ("sd15", "sd3")
    beside = ("--compare=torch",) if compare else ()
    small, shapes = (("--tiny",), ("--config.data.image_size=16",)) if tiny else ((), ())

    def part(mode: str, name: str, network: str) -> Part:
        flags = (f"--mode={mode}", CONFIG + network, "--subjects=network", *beside)
        profile = () if tiny else (f"--profile={folder / f'{mode}_{network}'}",)
        return Part(f"{mode}: {name}", (*flags, *profile))

    agree = ("--mode=agree", f"{CONFIG}tiny-unet", "--config.train.precision=float32")
    context = ("--mode=train", CONFIG + unet, "--subjects=method")
    first, second = ("UNet", unet), ("transformer", mmdit)
    found = [
        [Part("the device", ("--mode=facts",))],
        [part("train", *first), Part("agreement with the CPU", agree)],
        [part("train", *second)],
        [
            part("sample", *first),
            part("sample", *second),
            Part("kernels", ("--mode=kernels", *small)),
        ],
        [Part("the context's cost: UNet", context)],
        [Part("feeding", ("--mode=data", CONFIG + unet, "--config.data.source=shapes", *shapes))],
    ]
    for side in ("ours", *(["torch"] if compare else [])):
        flags = ("--mode=largest", f"--side={side}", CONFIG + unet)
        found.append([Part(f"largest batch: {side}", flags)])
    return found


def _run(part: Part, seconds: float, turns_file: str) -> dict[str, Any]:
    """The part's rows, or `error`: its last line, or that the time was over."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "rows.json")
        command = [sys.executable, "-m", "contextdiff_jax.benchmark", *part.flags, f"--json={file}"]
        try:
            done = subprocess.run(
                command,
                env=ENVIRONMENT | {turns.FILE: turns_file} | os.environ,
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired as error:  # whose output are bytes in any case
            lines = (error.stderr or b"no message").decode(errors="replace").splitlines()
            return {"error": f"not finished in {seconds:.0f} s: {lines[-1]}", "stderr": lines[-20:]}
        if done.returncode or not file.exists():
            lines = done.stderr.strip().splitlines() or ["no message"]
            return {"error": lines[-1], "stderr": lines[-20:]}
        return {"text": done.stdout.rstrip(), "rows": json.loads(file.read_text())["rows"]}


def run(options: AcceleratorBenchmark, show: Callable[[str], None] = print) -> Result:
    """Runs the parts until the time is over; the file has what there is after each."""
    end = time.monotonic() + 60 * options.minutes
    lacking = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
    told: dict[str, Any] = {
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "minutes": options.minutes,
        "lacking": lacking,
        "parts": {},
    }

    writing = threading.Lock()

    def note(name: str, found: dict[str, Any], seconds: float) -> None:
        told["parts"][name] = found | {"seconds": round(seconds, 1)}
        write_json(options.json, told)
        options.json.with_suffix(".md").write_text(page(told))
        show(f"== {name} ({seconds:.0f} s)\n{found.get('text') or found.get('error')}")

    def measure(name: str, job: Callable[[float], dict[str, Any]]) -> None:
        left, began = end - time.monotonic(), time.monotonic()
        found = {"error": "no time was left"} if left < LEAST else job(left)
        with writing:
            note(name, found, time.monotonic() - began)

    profiles = options.json.with_name(f"{options.json.stem}_profiles")
    with tempfile.NamedTemporaryFile() as file, concurrent.futures.ThreadPoolExecutor() as pool:
        for group in groups(options.tiny, not lacking, profiles):
            jobs = [functools.partial(_run, part, turns_file=file.name) for part in group]
            list(pool.map(measure, [part.name for part in group], jobs))
        measure("training, killed and resumed", lambda left: upkeep(left, options.tiny))
    failed = sum("error" in part for part in told["parts"].values())
    count = len(told["parts"])
    text = f"{count - failed} of {count} parts: {options.json}, a page beside it"
    if lacking:
        text += f"; not installed, so nothing is beside ours: {', '.join(lacking)}"
    return Result(text, list(told["parts"].values()))
