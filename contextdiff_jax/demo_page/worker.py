"""One job at a time on the device, in a thread of its own; what it reports is yielded on the way.

    made = yield from worker.run(lambda report: pipeline.text_to_image(..., callback=report))

A visitor who leaves, or who clicks Stop, closes the generator: the job's next report then raises
`Stopped` in it, so the device is free for the next visitor after one step.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

from contextdiff_jax.demo_page.limits import LONGEST

BEAT = 1.0  # seconds


class Stopped(Exception):
    """Nobody waits for the job any more, or it has taken too long."""


class Worker:
    """A device's queue of one."""

    def __init__(self, longest: float = LONGEST):
        self._lock, self._longest = threading.Lock(), longest

    def run(self, job: Callable[[Callable[..., None]], Any]) -> Generator[tuple | None, None, Any]:
        """Yields the arguments of the job's latest report, and returns what the job does. While
        nothing is new, the same again each `BEAT`: None until the device is free, then ().

        `job(report)` runs when the device is free. Raises what the job raises; ValueError, one
        sentence, for one that takes longer than is allowed.
        """
        updates: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        left, late = threading.Event(), threading.Event()

        def work() -> None:
            try:
                with self._lock:
                    began = time.monotonic()

                    def report(*values: Any) -> None:
                        if time.monotonic() - began > self._longest:
                            late.set()
                        if left.is_set() or late.is_set():
                            raise Stopped
                        updates.put(("report", values))

                    report()  # the device is free; or nobody waits any more
                    updates.put(("done", job(report)))
            except BaseException as error:
                updates.put(("error", error))

        threading.Thread(target=work, daemon=True).start()
        latest: tuple | None = None
        try:
            while True:
                try:
                    kind, value = updates.get(timeout=BEAT)
                except queue.Empty:
                    yield latest
                    continue
                while kind == "report" and value and not updates.empty():  # only the newest
                    kind, value = updates.get()
                if kind == "done":
                    return value
                if kind == "error":
                    if late.is_set():
                        raise ValueError(
                            f"That took longer than {self._longest:.0f} seconds and was stopped: "
                            "ask for fewer steps."
                        )
                    raise value
                latest = value
                yield latest
        finally:
            left.set()
