"""What a person sees of a command's work: short lines, and a bar below them on a terminal."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Collection, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
PATIENCE = 1.0  # seconds before a bar appears: what is done sooner needs none
# tqdm's own shows steps a second, which says little of batches of any size
TRAINING_BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}, {remaining} left"


def bar(items: Collection[Item], label: str, unit: str = "it") -> Iterable[Item]:
    """The items, with a bar of how many are done, if there is a terminal and they take long."""
    return tqdm(items, desc=label, unit=unit, leave=False, disable=None, delay=PATIENCE)


def reading(tensors: Collection[Item]) -> Iterable[Item]:
    """`bar` for the tensors of a folder that is read."""
    return bar(tensors, "reading weights", "tensor")


@contextlib.contextmanager
def clock(label: str) -> Iterator[None]:
    """The seconds that have gone by beside the label, on a terminal, while the one call inside
    runs: a compiled program says nothing of how far it is.
    """
    shown = "{desc}, {elapsed} so far"
    with tqdm(desc=label, bar_format=shown, leave=False, disable=None, delay=PATIENCE) as line:
        if line.disable:
            yield
            return
        done = threading.Event()

        def tick() -> None:
            while not done.wait(PATIENCE):
                line.refresh()

        ticking = threading.Thread(target=tick, daemon=True, name="clock")
        ticking.start()
        try:
            yield
        finally:
            done.set()
            ticking.join()


class LineHandler(logging.Handler):
    """Writes records to stderr as lines: above a bar, and with the time where there is no terminal
    that shows when they come.
    """

    def __init__(self):
        super().__init__()
        self.setFormatter(_Plain(datefmt="%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # as every handler of logging's: a closed stderr doesn't end the work
            self.handleError(record)


class _Plain(logging.Formatter):
    """The message alone; `warning: ` before what should be read."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        return text if sys.stderr.isatty() else f"{self.formatTime(record, self.datefmt)} {text}"


def set_up_logging() -> None:
    """Our modules' lines at INFO, the libraries' (Orbax logs dozens a save) at WARNING."""
    root = logging.getLogger()
    for handler in [*root.handlers]:
        root.removeHandler(handler)
    root.addHandler(LineHandler())
    root.setLevel(logging.WARNING)
    logging.getLogger("contextdiff_jax").setLevel(logging.INFO)


def duration(seconds: float) -> str:
    """2:07, or 1:02:07: as a clock shows it."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
