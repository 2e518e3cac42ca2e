"""Training, from settings to a trained run in a folder. Read it from top to bottom."""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from orbax.checkpoint import CheckpointManager
from PIL.Image import Image

from contextdiff_jax.data import (
    AnyTokenizer,
    CacheSource,
    Loader,
    Pieces,
    RandomAccessSource,
    bucket_sizes,
    make_loader,
    make_source,
)
from contextdiff_jax.data.identity import identity, shared_settings
from contextdiff_jax.parallel.mesh import Feed, make_mesh, replicated, state_shardings
from contextdiff_jax.parallel.processes import PeerWatch, agree
from contextdiff_jax.runs import snapshots
from contextdiff_jax.runs.resuming import resume
from contextdiff_jax.runs.tokenizer import open_tokenizer
from contextdiff_jax.settings import Settings
from contextdiff_jax.training.cached_text import check_cache, frozen_for_training
from contextdiff_jax.training.compilation import compile_step
from contextdiff_jax.training.distillation import load_teacher
from contextdiff_jax.training.first_state import first_state
from contextdiff_jax.training.log import averages
from contextdiff_jax.training.nonfinite import FiniteGuard
from contextdiff_jax.training.reporter import Reporter
from contextdiff_jax.training.run_steps import Task, run_steps
from contextdiff_jax.training.state import (
    TrainState,
    init_state,
    learning_rate_schedule,
    with_empty_metrics,
)
from contextdiff_jax.training.weights_and_biases import check_wandb

LOGGER = logging.getLogger(__name__)


def train(settings: Settings, config: Mapping[str, Any], workdir: pathlib.Path) -> TrainState:
    """Trains to `settings.train.steps`, resuming what `workdir` holds; `config` is what config.json
    records.

    Raises ValueError for what the user must change, RunError for a run that broke down.
    """
    every = settings.train
    check_wandb(settings.log)
    mesh = make_mesh(settings.mesh, every.batch_size, every.accumulation)
    feed = Feed(mesh, every.batch_size, settings.mesh.rules)
    tokenizer, loader = open_data(settings, feed)
    frozen = frozen_for_training(
        settings, functools.partial(state_shardings, mesh, rules=settings.mesh.rules)
    )
    if settings.distill.teacher:
        frozen = frozen._replace(teacher=load_teacher(settings, frozen))
    manager, state, shardings = open_state(settings, config, workdir, mesh, loader)
    first = int(state.step)
    if first >= every.steps:
        LOGGER.info("trained to step %d already", first)
        manager.close()
        return state
    null = jax.device_put(null_caption(tokenizer, settings.data.max_length), replicated(mesh))
    batch = peek(loader, first, feed)
    compiled, flops = compile_step(settings, state, shardings, batch, null, frozen)
    with closing(loader):
        task = Training(
            batch_size=every.batch_size,
            flops=flops,
            step=lambda state, batch: compiled(state, batch, null, frozen),
            loader=loader,
            feed=feed,
            guard=FiniteGuard(settings, config, workdir, state),
            shardings=shardings,
            learning_rate=learning_rate_schedule(every),
            reporter=Reporter(settings, workdir, tokenizer, mesh, frozen),
        )
        return run_steps(task, state, every, workdir, manager, wandb=settings.log.wandb)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Task[TrainState]):
    """The training of a run, for `run_steps`: its compiled step, its data, and what looks on."""

    batch_size: int
    flops: float | None
    step: Callable[..., tuple[TrainState, jax.Array]]
    loader: Loader
    feed: Feed
    guard: FiniteGuard
    shardings: TrainState
    learning_rate: optax.Schedule
    reporter: Reporter

    def advance(self, state: TrainState, step: int, watch: PeerWatch) -> TrainState:
        watch(f"reading the batch of step {step}")
        batch = to_devices(next(self.loader), self.feed)
        watch(f"in step {step}")
        state, nonfinite = self.step(state, batch)
        self.guard.watch(step, state, batch, nonfinite)
        return state

    def check(self, state: TrainState) -> None:
        self.guard.check(state)

    def summary(self, state: TrainState, step: int) -> tuple[dict[str, float], TrainState]:
        values = averages(state.metric_sums) | {
            "learning_rate": float(self.learning_rate(step - 1)),
            "broken_records": self.loader.num_broken,
            "cut_captions": self.loader.num_cut,
        }
        return values, with_empty_metrics(state, self.shardings)

    def data_state(self) -> dict[str, Any]:
        return self.loader.get_state()

    def report(self, state: TrainState, step: int) -> dict[str, Image]:
        grid = self.reporter(state, step)
        return {} if grid is None else {"samples": grid}


def open_data(settings: Settings, feed: Feed) -> tuple[AnyTokenizer, Loader]:
    """The tokenizer, and this process's share of the training batches, which all processes take
    from the same records.
    """

    def facts(opened: tuple[AnyTokenizer, RandomAccessSource, Loader]) -> dict[str, Any]:
        tokenizer, source, loader = opened
        ids, _ = tokenizer.encode([source[0]["caption"]], settings.data.max_length)
        records = identity(source, bucket_sizes(settings.data))
        words = {"ids of the first caption": ids.tolist()}
        return shared_settings(settings.data) | loader.get_state() | records | words

    tokenizer, _, loader = agree("data", lambda: _open_data(settings, feed), facts)
    return tokenizer, loader


def _open_data(settings: Settings, feed: Feed) -> tuple[AnyTokenizer, RandomAccessSource, Loader]:
    data = settings.data
    tokenizer = open_tokenizer(settings)
    source = make_source(data, "train")
    if isinstance(source, CacheSource):
        check_cache(settings, source.cache)
    loader = make_loader(
        source,
        batch_size=settings.train.batch_size,
        seed=data.seed,
        tokenizer=tokenizer,
        num_workers=data.num_workers,
        max_length=data.max_length,
        prefetch=data.prefetch,
        rows=feed.rows,
        buckets=bucket_sizes(data),
        pieces=Pieces(data.crop_size, data.crop == "random", data.seed) if data.crop_size else None,
    )
    return tokenizer, source, loader


def open_state(
    settings: Settings, config: Mapping[str, Any], workdir: pathlib.Path, mesh: Mesh, loader: Loader
) -> tuple[CheckpointManager, TrainState, TrainState]:
    """(manager, state, the state's shardings): a new state, or the newest checkpoint of the same
    run, whose place in the data the loader then takes.
    """
    abstract = jax.eval_shape(lambda: init_state(settings))
    shardings = state_shardings(mesh, abstract, settings.mesh.rules)
    train = settings.train
    manager, state, data_state = resume(
        workdir,
        config,
        abstract,
        shardings,
        train.keep_checkpoints,
        best=train.keep_best,
        metric=train.best_metric,
    )
    if train.power_ema:
        snapshots.drop_after(workdir, 0 if state is None else int(state.step))
    if state is None:
        return manager, first_state(settings, shardings), shardings
    loader.set_state(data_state)
    return manager, state, shardings


def peek(loader: Loader, step: int, feed: Feed) -> dict[str, jax.Array]:
    """The next batch, for its shapes; the loader stays where it was."""
    batch = to_devices(next(loader), feed)
    loader.set_state({**loader.get_state(), "next_batch": step})
    return batch


def null_caption(tokenizer: AnyTokenizer, max_length: int) -> dict[str, np.ndarray]:
    """The empty caption's ids and mask, [1, L]: what the denoiser reads where the caption is
    dropped.
    """
    ids, mask = tokenizer.encode([""], max_length)
    return {"token_ids": ids, "token_mask": mask}


def to_devices(batch: Mapping[str, Any], feed: Feed) -> dict[str, jax.Array]:
    """This process's share of a global batch as global arrays; captions stay behind."""
    return feed.put({name: value for name, value in batch.items() if isinstance(value, np.ndarray)})
