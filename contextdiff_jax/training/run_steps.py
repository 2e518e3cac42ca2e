"""The loop of every training: of a run, of an autoencoder, and of a model on one clip."""

from __future__ import annotations

import logging
import pathlib
import time
from abc import ABC, abstractmethod
from contextlib import closing
from typing import Any, Generic

import jax
from orbax.checkpoint import CheckpointManager
from PIL.Image import Image
from tqdm import tqdm

from contextdiff_jax.parallel.processes import PeerWatch, StopSignal, is_first
from contextdiff_jax.runs import checkpoints, snapshots
from contextdiff_jax.runs.checkpoints import State
from contextdiff_jax.runtime import host
from contextdiff_jax.runtime.terminal import TRAINING_BAR
from contextdiff_jax.settings import TrainConfig
from contextdiff_jax.training.log import MetricsLog, speed
from contextdiff_jax.training.profiling import Profiler
from contextdiff_jax.training.state import find_power_averages

LOGGER = logging.getLogger(__name__)


class Task(ABC, Generic[State]):
    """What is particular to one training. `batch_size` and `flops`: examples and floating-point
    operations of a step, for the log's speed; None: unknown.
    """

    batch_size: int
    flops: float | None = None

    @abstractmethod
    def advance(self, state: State, step: int, watch: PeerWatch) -> State:
        """The state after step number `step`. The host doesn't wait for it; every transfer between
        host and devices is asked for by name.
        """

    def check(self, state: State) -> None:
        """Waits for the newest step. RunError if there is no going on from `state`."""

    @abstractmethod
    def summary(self, state: State, step: int) -> tuple[dict[str, float], State]:
        """The log's values for the steps since the summary before, and the state that goes on."""

    def data_state(self) -> dict[str, Any]:
        """The place in the data, which a checkpoint keeps."""
        return {}

    def report(self, state: State, step: int) -> dict[str, Image]:
        """Shows the state to whoever looks into the run's folder; pictures for the log, by name."""
        return {}


def run_steps(
    task: Task[State],
    state: State,
    config: TrainConfig,
    workdir: pathlib.Path,
    manager: CheckpointManager,
    label: str | None = None,
    wandb: str = "",
) -> State:
    """The state after the step `config.steps`, or after an earlier one, where a signal asked to
    stop: logged, saved and shown as often as `config` says. `wandb`: `log.wandb` of the run.

    Whatever happens, the log and the manager are closed, which waits for the save under way.
    RunError for what the task refuses to go on from, or for a full disk.
    """
    first = int(state.step)
    with (
        closing(StopSignal()) as asked_to_stop,
        PeerWatch(config.peer_timeout) as watch,
        closing(MetricsLog(workdir, first, config.steps, wandb)) as lines,
        checkpoints.closing(manager, workdir),
        closing(Profiler(workdir, config.profile_steps)) as profiler,
    ):
        since, count = time.perf_counter(), 0
        bar = _make_bar(first, config.steps, label)
        for step in bar:
            with profiler.step(step), jax.transfer_guard("disallow"):
                state = task.advance(state, step, watch)
            profiler.done(step, state)
            if step == first + 1:
                _tell_start(state)
            count += 1
            end = step == config.steps
            last = end or asked_to_stop(step)
            if step % config.log_every == 0 or end:
                task.check(state)
                seconds = time.perf_counter() - since
                values, state = task.summary(state, step)
                values |= speed(count, task.batch_size, seconds, task.flops)
                lines.write(step, values)
                pace = f"{values['images_per_second']:.1f} images/s"
                bar.set_postfix_str(f"loss {values['loss']:.4g}, {pace}")
                since, count = time.perf_counter(), 0
            keep_averages(config, workdir, manager, state, step, watch)
            if step % config.checkpoint_every == 0 or last:
                task.check(state)
                watch(f"saving step {step}")
                checkpoints.save(manager, state, task.data_state(), lines.last)
            due = config.sample_every and step % config.sample_every == 0
            if end or (due and not last):  # told to stop, there may be no time for pictures
                watch(f"sampling after step {step}")
                for name, picture in task.report(state, step).items():
                    lines.show(step, name, picture)
                since, count = time.perf_counter(), 0
            if last:
                break
        watch("finishing the last save")
    return state


def _make_bar(first: int, steps: int, label: str | None) -> tqdm:
    """The numbers of the steps after `first`, with a bar on the first process's terminal."""
    return tqdm(
        range(first + 1, steps + 1),
        initial=first,
        total=steps,
        desc=label,
        bar_format=TRAINING_BAR,
        disable=None if is_first() else True,
    )


def _tell_start(state: State) -> None:
    jax.block_until_ready(state.step)
    seconds = time.perf_counter() - host.STARTED
    LOGGER.info("first step done %.1f s after the command's start", seconds)


def keep_averages(
    config: TrainConfig,
    workdir: pathlib.Path,
    manager: CheckpointManager,
    state: State,
    step: int,
    watch: PeerWatch,
) -> None:
    """Writes the snapshot of `train.power_ema` that is due after this step, if one is.

    It is complete before the step's checkpoint is begun: a run that goes on from there has it.
    """
    if not config.power_ema or (step % config.power_ema_every and step < config.steps):
        return
    watch(f"saving the averages of step {step}")
    checkpoints.wait(manager, workdir)  # Orbax's processes meet for one save at a time
    updates, averages = find_power_averages(state.opt_state)
    snapshots.save(workdir, state.step, int(jax.device_get(updates)), averages)
