"""All that is asked of an accelerator, in a given time, the most telling first.

Each part is a process of its own, so that it has the device's memory alone, and one that fails or
takes too long costs its own result and no other. This process never touches the device.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

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


def parts(tiny: bool, compare: bool) -> list[Part]:
    """The parts in their order; `compare`: torch and diffusers are there."""
    unet, mmdit = ("tiny-unet", "tiny-mmdit") if tiny else ("sd15", "sd3")
    beside = ("--compare=torch",) if compare else ()
    small = ("--tiny",) if tiny else ()
    found = [Part("the device", ("--mode=facts",))]
    for name, network in (("UNet", unet), ("transformer", mmdit)):
        for mode in ("train", "sample"):
            flags = (f"--mode={mode}", CONFIG + network, "--subjects=network", *beside)
            found.append(Part(f"{mode}: {name}", flags))
    found += [
        Part("kernels", ("--mode=kernels", *small)),
        Part(
            "agreement with the CPU",
            ("--mode=agree", f"{CONFIG}tiny-unet", "--config.train.precision=float32"),
        ),
        Part("the context's cost: UNet", ("--mode=train", CONFIG + unet, "--subjects=method")),
        Part("feeding", ("--mode=data", CONFIG + unet, "--config.data.source=shapes")),
    ]
    for side in ("ours", *(["torch"] if compare else [])):
        flags = ("--mode=largest", f"--side={side}", CONFIG + unet)
        found.append(Part(f"largest batch: {side}", flags))
    return found


def _run(part: Part, seconds: float) -> dict[str, Any]:
    """The part's rows, or `error`: its last line, or that the time was over."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "rows.json")
        command = [sys.executable, "-m", "contextdiff_jax.benchmark", *part.flags, f"--json={file}"]
        try:
            done = subprocess.run(
                command,
                env=ENVIRONMENT | os.environ,
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not finished in {seconds:.0f} s"}
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

    def note(name: str, found: dict[str, Any], seconds: float) -> None:
        told["parts"][name] = found | {"seconds": round(seconds, 1)}
        write_json(options.json, told)
        options.json.with_suffix(".md").write_text(page(told))
        show(f"== {name} ({seconds:.0f} s)\n{found.get('text') or found.get('error')}")

    jobs: Sequence[tuple[str, Callable[[float], dict[str, Any]]]] = [
        (part.name, lambda left, part=part: _run(part, left))
        for part in parts(options.tiny, not lacking)
    ] + [("training, killed and resumed", lambda left: upkeep(left, options.tiny))]
    for name, job in jobs:
        left, began = end - time.monotonic(), time.monotonic()
        found = {"error": "no time was left"} if left < LEAST else job(left)
        note(name, found, time.monotonic() - began)
    failed = sum("error" in part for part in told["parts"].values())
    text = f"{len(jobs) - failed} of {len(jobs)} parts: {options.json}, a page beside it"
    if lacking:
        text += f"; not installed, so nothing is beside ours: {', '.join(lacking)}"
    return Result(text, list(told["parts"].values()))
