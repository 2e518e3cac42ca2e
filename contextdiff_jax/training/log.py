"""A run's log: metrics.jsonl, TensorBoard events, and the terminal."""

from __future__ import annotations

import json
import logging
import pathlib

import jax
from tensorboardX import SummaryWriter

from contextdiff_jax.cli import is_remote
from contextdiff_jax.parallel.chips import CHIPS
from contextdiff_jax.parallel.processes import is_first
from contextdiff_jax.training.state import METRICS

LOGGER = logging.getLogger(__name__)


class MetricsLog:
    """Appends one JSON object a logged step; on resume the lines after `step` are cut off, as if
    not yet run.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        self.last: dict[str, float] = {}  # what was logged last
        self.path = workdir / "metrics.jsonl"
        if not is_first():
            return
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        self._text = "".join(line + "\n" for line in kept)
        self.path.write_text(self._text)
        self._events = SummaryWriter(str(workdir / "events"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs `values` at `step`; in the first process only."""
        self.last = values
        if not is_first():
            return
        line = json.dumps({"step": step, **values}) + "\n"
        self._text += line
        if is_remote(self.path):  # an object can't be added to
            self.path.write_text(self._text)
        else:
            with self.path.open("a") as file:
                file.write(line)
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        LOGGER.info("step %d: %s", step, ", ".join(f"{k} {v:.4g}" for k, v in values.items()))

    def close(self) -> None:
        """Flushes the events."""
        if is_first():
            self._events.close()


def averages(sums: dict[str, jax.Array]) -> dict[str, float]:
    """Means from a state's metric sums; a quartile of t without samples has no entry."""
    sums = jax.device_get(sums)
    means = {name: float(sums[name] / max(sums["count"], 1)) for name in METRICS if name != "count"}
    means["nonfinite"] = float(sums["nonfinite"])
    for i, (loss, count) in enumerate(
        zip(sums["quartile_loss"], sums["quartile_count"], strict=True), start=1
    ):
        if count:
            means[f"loss_q{i}"] = float(loss / count)
    return means


def speed(images: int, seconds: float, steps: int, flops: float | None) -> dict[str, float]:
    """Examples a second, model FLOP/s, and utilisation where the device's peak is known."""
    values = {"images_per_second": images / seconds, "seconds_per_step": seconds / steps}
    if flops:
        values["model_flops_per_second"] = flops * steps / seconds
        chip = CHIPS.get(jax.devices()[0].device_kind)
        if chip:
            peak = chip.peak * jax.device_count()
            values["utilization"] = values["model_flops_per_second"] / peak
    return values
