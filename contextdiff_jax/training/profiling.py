"""A trace of some steps, for TensorBoard's profile plugin and xprof (`train.profile_steps`)."""

from __future__ import annotations

import contextlib
import logging
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from contextdiff_jax.runs.checkpoints import writing

LOGGER = logging.getLogger(__name__)
FOLDER = "profile"


class Profiler:
    """Traces the steps from the first to the last of `steps`, both counted; none: nothing.

    Each process writes WORKDIR/profile/process_N/plugins/profile/TIME/HOST.xplane.pb: in one folder
    the processes of a host would overwrite each other's file.
    """

    def __init__(self, workdir: pathlib.Path, steps: tuple[int, ...]):
        self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
        self._workdir, self._name = epath.Path(workdir), f"{FOLDER}/process_{jax.process_index()}"
        self._scratch: str | None = None  # where the trace under way is written

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """What is dispatched inside it is this step's."""
        if number not in self._steps:
            yield
            return
        if self._scratch is None:
            self._scratch = tempfile.mkdtemp(prefix="contextdiff-profile-")
            jax.profiler.start_trace(self._scratch)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def done(self, number: int, state: Any) -> None:
        """After the step: at the last one waits for it and writes the trace."""
        if self._scratch is not None and number == self._steps[-1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Writes what was traced, where a run ends before the last of the steps too."""
        if self._scratch is None:
            return
        scratch, self._scratch = pathlib.Path(self._scratch), None
        try:
            jax.profiler.stop_trace()
            with writing(self._workdir, self._name):
                for file in scratch.rglob("*.*"):
                    copy = self._workdir / self._name / str(file.relative_to(scratch))
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.write_bytes(file.read_bytes())
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        LOGGER.info("trace written: xprof --logdir=%s", self._workdir / FOLDER)
