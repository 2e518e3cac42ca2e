"""A run's log: metrics.jsonl, TensorBoard events, Weights & Biases, and the terminal."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import pathlib
import queue
import socket
import textwrap
import threading
import time
from collections.abc import Mapping

import jax
from etils import epath
from PIL.Image import Image

from contextdiff_jax.parallel.chips import CHIPS
from contextdiff_jax.parallel.processes import is_first
from contextdiff_jax.runs.checkpoints import writing
from contextdiff_jax.runtime.files import read_lines, replacing
from contextdiff_jax.runtime.host import hidden, is_remote
from contextdiff_jax.runtime.terminal import duration
from contextdiff_jax.training.state import METRICS
from contextdiff_jax.training.weights_and_biases import WeightsAndBiases

# It imports torch wherever that is installed, for two seconds of each start, in case it is given a
# tensor.
with hidden("torch"):
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import RecordWriter, directory_check
    from tensorboardX.summary import scalar, text

LOGGER = logging.getLogger(__name__)


class MetricsLog:
    """Appends one JSON object a logged step; on resume the lines after `step` are cut off, as if
    not yet run.
    """

    def __init__(self, workdir: pathlib.Path, step: int, steps: int | None = None, wandb: str = ""):
        """`steps`: where the training ends, for the time that is left; None: unknown. `wandb`: as
        `log.wandb` of a config.
        """
        self._steps = steps
        self.last: dict[str, float] = {}  # what was logged last
        self.path = workdir / "metrics.jsonl"
        if not is_first():
            return
        rows = read_lines(self.path) if self.path.exists() else []
        self._text = "".join(
            json.dumps(row) + "\n" for row in rows if row.get("step", step) <= step
        )
        with writing(workdir, self.path.name), replacing(self.path) as file:
            file.write_text(self._text)
        self._sinks: list[Events | WeightsAndBiases] = [
            Events(str(workdir / "events"), first=step + 1, config=_read_config(workdir))
        ]
        if wandb:
            self._sinks.append(WeightsAndBiases(wandb, epath.Path(workdir)))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs `values` at `step`; in the first process only. RunError for a full disk."""
        self.last = values
        if not is_first():
            return
        line = json.dumps({"step": step, **values}) + "\n"
        self._text += line
        with writing(self.path.parent, self.path.name):
            if is_remote(self.path):  # an object can't be added to
                self.path.write_text(self._text)
            else:
                with self.path.open("a") as file:
                    file.write(line)
        for sink in self._sinks:
            sink.add(step, values)
        LOGGER.info("%s", summary_line(step, self._steps, values))

    def show(self, step: int, name: str, picture: Image) -> None:
        """Shows a picture of `step` wherever the values go but on the terminal."""
        for sink in self._sinks if is_first() else ():
            sink.show(step, name, picture)

    def close(self) -> None:
        """Writes the events that are left; a disk that hangs is given up."""
        for sink in self._sinks if is_first() else ():
            sink.close()


def _read_config(workdir: pathlib.Path) -> str:
    file = workdir / "config.json"
    return file.read_text() if file.exists() else ""


# Of the columns of a line on the terminal: name, how its number is written, what stands around it.
COLUMNS = (
    ("loss", "<8.4g", "loss {}"),
    ("grad_norm", "<7.3g", "grad {}"),
    ("learning_rate", "<8.3g", "lr {}"),
    ("images_per_second", ">7.1f", "{} images/s"),
)
# What is said only where it happened.
TROUBLES = {"nonfinite": "skipped steps", "broken_records": "broken records"}


def summary_line(step: int, steps: int | None, values: Mapping[str, float]) -> str:
    """Return what the terminal shows of a logged step; metrics.jsonl has all of it."""
    of = "" if steps is None else f"/{steps}"
    parts = [f"step {step:>{max(len(of) - 1, 0)}}{of}"]
    for name, form, around in COLUMNS:
        if name in values:
            parts.append(around.format(f"{values[name]:{form}}"))
    if steps is not None and "seconds_per_step" in values:
        left = duration((steps - step) * values["seconds_per_step"])
        parts.append(f"{left:>7} left")
    parts += [f"{values[name]:.0f} {what}" for name, what in TROUBLES.items() if values.get(name)]
    return "  ".join(parts)


class Events:
    """TensorBoard's event file, written by a thread of its own. A full or hanging disk ends the
    events, with one warning; it never holds up or ends the run, as tensorboardX's queue does.
    """

    FLUSH_SECONDS = 30

    def __init__(self, folder: str, first: int, config: str = ""):
        """`first`: TensorBoard hides what an earlier run logged at this step and later ones.
        `config`: is shown under Text.
        """
        self._queue: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._put(Event(step=first, file_version="brain.Event:2"))
        self._put(Event(step=first, session_log=SessionLog(status=SessionLog.START)))
        if config:  # indented: markdown for text that stays as it is
            self._put(Event(step=first, summary=text("config", textwrap.indent(config, "    "))))
        self._thread = threading.Thread(target=self._run, args=(folder,), daemon=True)
        self._thread.start()

    def _put(self, event: Event) -> None:
        event.wall_time = time.time()
        self._queue.put(event)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Hands the values over; returns at once."""
        if self._thread.is_alive():
            for name, value in values.items():
                self._put(Event(step=step, summary=scalar(name, value)))

    def show(self, step: int, name: str, picture: Image) -> None:
        """Hands a picture over."""
        encoded = io.BytesIO()
        picture.save(encoded, format="PNG")
        shown = Summary.Image(
            height=picture.height,
            width=picture.width,
            colorspace=len(picture.getbands()),
            encoded_image_string=encoded.getvalue(),
        )
        if self._thread.is_alive():
            self._put(
                Event(step=step, summary=Summary(value=[Summary.Value(tag=name, image=shown)]))
            )

    def close(self, seconds: float = 10) -> None:
        """Waits until all is written, but not for longer than `seconds`."""
        self._queue.put(None)
        self._thread.join(seconds)

    def _run(self, folder: str) -> None:
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        try:
            directory_check(folder)
            with contextlib.closing(RecordWriter(f"{folder}/{name}")) as writer:
                due = 0.0
                while (event := self._queue.get()) is not None:
                    writer.write(event.SerializeToString())
                    if self._queue.empty() and time.monotonic() >= due:
                        writer.flush()
                        due = time.monotonic() + self.FLUSH_SECONDS
        # A bucket's library raises what it likes. Training goes on, whatever it is.
        except Exception as error:
            LOGGER.warning("%s: no more events are written: %s", folder, error)


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


def speed(steps: int, batch_size: int, seconds: float, flops: float | None) -> dict[str, float]:
    """Examples a second, model FLOP/s, and utilisation where the device's peak is known; `flops`:
    of one step.
    """
    images = steps * batch_size
    values = {"images_per_second": images / seconds, "seconds_per_step": seconds / steps}
    if flops:
        values["model_flops_per_second"] = flops * steps / seconds
        chip = CHIPS.get(jax.devices()[0].device_kind)
        if chip:
            peak = chip.peak * jax.device_count()
            values["utilization"] = values["model_flops_per_second"] / peak
    return values
