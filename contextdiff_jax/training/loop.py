"""Training, from settings to a trained run in a folder. Read it from top to bottom."""

from __future__ import annotations

import functools
import json
import logging
import pathlib
import signal
import time
from contextlib import closing
from typing import Any, Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import CheckpointManager
from tqdm import tqdm

from contextdiff_jax import pictures
from contextdiff_jax.cli import RunError
from contextdiff_jax.data import (
    CacheSource,
    DataConfig,
    Loader,
    Tokenizer,
    bucket_sizes,
    load_tokenizer,
    make_loader,
    make_source,
)
from contextdiff_jax.generation import Generator
from contextdiff_jax.models.contextdiff import Frozen
from contextdiff_jax.parallel.mesh import batch_sharding, make_mesh, state_shardings
from contextdiff_jax.settings import Settings
from contextdiff_jax.training import checkpoints
from contextdiff_jax.training.frozen import load_frozen
from contextdiff_jax.training.log import MetricsLog, averages, speed
from contextdiff_jax.training.start import first_state
from contextdiff_jax.training.state import TrainState, init_state, learning_rate_schedule, zero_metrics
from contextdiff_jax.training.step import make_train_step

LOGGER = logging.getLogger(__name__)


def train(settings: Settings, config: Mapping[str, Any], workdir: pathlib.Path) -> TrainState:
    """Trains to `settings.train.steps`, resuming what `workdir` holds; `config` is what config.json records.

    Raises ValueError for what the user must change, RunError for a run that broke down.
    """
    mesh = make_mesh(settings.mesh, settings.train.batch_size)
    tokenizer, loader = open_data(settings)
    frozen = load_frozen(settings, functools.partial(state_shardings, mesh))
    manager, state, shardings = open_state(settings, config, workdir, mesh, loader)
    place = batch_sharding(mesh)
    null = jax.device_put(null_caption(tokenizer, settings.data.max_length), NamedSharding(mesh, PartitionSpec()))
    compiled, flops = compile_step(settings, state, shardings, peek(loader, int(state.step), place), null, frozen)

    log, reporter = MetricsLog(workdir, int(state.step)), Reporter(settings, workdir, tokenizer, frozen)
    # Closed whatever happens: the manager's `close` waits for the save that is under way.
    with closing(manager), closing(loader), closing(log):
        every, guard, asked_to_stop = settings.train, FiniteGuard(workdir), StopSignal()
        first = int(state.step)
        window_start, window_steps = time.perf_counter(), 0
        for step in tqdm(range(first + 1, every.steps + 1), initial=first, total=every.steps, disable=None):
            batch = to_devices(next(loader), place)
            state, finite = compiled(state, batch, null, frozen)
            guard.watch(step, batch, finite)
            window_steps += 1
            end = step == every.steps
            last = end or asked_to_stop()
            if step % every.log_every == 0 or end:
                guard.check()  # waits for the step
                seconds = time.perf_counter() - window_start
                values = averages(state.metric_sums) | {"learning_rate": float(learning_rate_schedule(every)(step - 1))}
                values["broken_records"] = loader.num_broken
                log.write(step, values | speed(window_steps * every.batch_size, seconds, window_steps, flops))
                state = with_empty_metrics(state, shardings)
                window_start, window_steps = time.perf_counter(), 0
            if step % every.checkpoint_every == 0 or last:
                guard.check()
                checkpoints.save(manager, state, loader.get_state())
            if every.sample_every and step % every.sample_every == 0 or end:
                reporter(state, step)
                window_start, window_steps = time.perf_counter(), 0
            if last:
                break
    return state


def open_data(settings: Settings) -> tuple[Tokenizer, Loader]:
    """The tokenizer, and this process's share of the training batches."""
    data = settings.data
    tokenizer = load_tokenizer(data.tokenizer or None)
    if not settings.text.pretrained and tokenizer.vocab_size > settings.text.vocab_size:
        raise ValueError(f"text.vocab_size={settings.text.vocab_size}: the tokenizer has {tokenizer.vocab_size} ids")
    source = make_source(data, "train")
    if isinstance(source, CacheSource) and source.cache.vae != json.loads(json.dumps(settings.latent.config.to_dict())):
        raise ValueError(f"latent.vae={settings.latent.vae!r}: the cache in data.path={data.path!r} is another autoencoder's")
    return tokenizer, make_loader(
        source, batch_size=settings.train.batch_size, seed=data.seed, tokenizer=tokenizer,
        num_workers=data.num_workers, max_length=data.max_length, prefetch=data.prefetch,
        process_index=jax.process_index(), process_count=jax.process_count(), buckets=bucket_sizes(data),
    )


def open_state(
    settings: Settings, config: Mapping[str, Any], workdir: pathlib.Path, mesh: Mesh, loader: Loader
) -> tuple[CheckpointManager, TrainState, TrainState]:
    """(manager, state, the state's shardings): a new state, or the newest checkpoint of the same run, whose place in
    the data the loader then takes."""
    abstract = jax.eval_shape(lambda: init_state(settings))
    shardings = state_shardings(mesh, abstract)
    manager = checkpoints.open_manager(workdir, settings.train.keep_checkpoints)
    checkpoints.check_shapes(manager, workdir, abstract)
    checkpoints.claim_workdir(workdir, config)
    if manager.latest_step() is None:
        return manager, first_state(settings, shardings), shardings
    placed = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
    state, data_state = checkpoints.restore(manager, placed)
    loader.set_state(data_state)
    return manager, state, shardings


def peek(loader: Loader, step: int, place: NamedSharding) -> dict[str, jax.Array]:
    """The next batch, for its shapes; the loader stays where it was."""
    batch = to_devices(next(loader), place)
    loader.set_state({**loader.get_state(), "next_batch": step})
    return batch


def compile_step(
    settings: Settings, state: TrainState, shardings: TrainState, batch: Mapping[str, jax.Array],
    null: Mapping[str, jax.Array], frozen: Frozen = Frozen(),
) -> tuple[Callable, float]:
    """The step's program, and its floating-point operations over all devices.

    A batch of another shape (`data.buckets`) gets its own program when it first comes.
    """
    (place,) = {array.sharding for array in batch.values()}
    replicated = null["token_ids"].sharding
    start = time.perf_counter()
    jitted = jax.jit(
        make_train_step(settings), donate_argnums=0,
        in_shardings=(shardings, place, replicated, jax.tree.map(lambda leaf: leaf.sharding, frozen)),
        out_shardings=(shardings, replicated),
    )
    compiled = jitted.lower(state, batch, null, frozen).compile()
    flops = (compiled.cost_analysis() or {}).get("flops", 0) * settings.train.accumulation * jax.device_count()
    LOGGER.info(
        "%d parameters, compiled in %.1f s, mesh %s", sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        time.perf_counter() - start, dict(place.mesh.shape),
    )
    programs = {shapes_of(batch): compiled}

    def step(state: TrainState, batch: Mapping[str, jax.Array], *rest: Any) -> tuple[TrainState, jax.Array]:
        shapes = shapes_of(batch)
        if shapes not in programs:
            LOGGER.info("compiling for %s", shapes)
            programs[shapes] = jitted.lower(state, batch, *rest).compile()
        return programs[shapes](state, batch, *rest)

    return step, flops


def shapes_of(batch: Mapping[str, jax.Array]) -> tuple[tuple[int, ...], ...]:
    """The shapes of a batch's arrays, by name."""
    return tuple(batch[name].shape for name in sorted(batch))


def null_caption(tokenizer: Tokenizer, max_length: int) -> dict[str, np.ndarray]:
    """The empty caption's ids and mask, [1, L]: what the denoiser reads where the caption is dropped."""
    ids, mask = tokenizer.encode([""], max_length)
    return {"token_ids": ids, "token_mask": mask}


def to_devices(batch: Mapping[str, Any], sharding: NamedSharding) -> dict[str, jax.Array]:
    """This process's share of a global batch as global arrays."""
    arrays = {name: value for name, value in batch.items() if isinstance(value, np.ndarray)}
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in arrays.items()}


def with_empty_metrics(state: TrainState, shardings: TrainState) -> TrainState:
    """The state with its metric sums at 0."""
    return TrainState(**{**vars(state), "metric_sums": jax.device_put(zero_metrics(), shardings.metric_sums)})


class FiniteGuard:
    """Ends a run whose loss or gradient is not finite. The step itself has left the state as it was, so the answer may
    come one step late: the host never waits for the step that it has just started."""

    def __init__(self, workdir: pathlib.Path):
        self._workdir, self._watched = workdir, None

    def watch(self, step: int, batch: Mapping[str, jax.Array], finite: jax.Array) -> None:
        """Checks the step before, then remembers this one."""
        self.check()
        self._watched = step, batch, finite

    def check(self) -> None:
        """Waits for the remembered step. RunError, after a dump of its inputs, if it was not finite."""
        if self._watched is None or bool(self._watched[2]):
            return
        step, batch, _ = self._watched
        path = self._workdir / f"nonfinite_{step}.npz"
        np.savez(path, **{name: np.asarray(value) for name, value in batch.items()})
        raise RunError(
            f"step {step}: the loss or the gradient is not finite; the step's inputs are in {path}, the last good "
            "checkpoint is kept; lower train.learning_rate or train.clip_norm and run again"
        )


class StopSignal:
    """Turns SIGTERM and SIGINT into an orderly stop: called, it says whether one came."""

    def __init__(self):
        self._came = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, _):
        LOGGER.info("%s: saving, then stopping", signal.Signals(number).name)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        self._came = True

    def __call__(self) -> bool:
        return self._came


class Reporter:
    """Every `sample_every` steps: a grid of captioned samples of the EMA weights, and the curves."""

    def __init__(self, settings: Settings, workdir: pathlib.Path, tokenizer: Tokenizer, frozen: Frozen | None = None):
        self._settings, self._workdir = settings, workdir
        self._generator = Generator(settings, tokenizer, frozen=frozen)
        self._prompts = list(settings.sample.prompts) or default_prompts(settings.data)

    def __call__(self, state: TrainState, step: int) -> None:
        images = self._generator(state.ema, self._prompts, seed=self._settings.seed)
        folder = self._workdir / "samples"
        folder.mkdir(exist_ok=True)
        grid = pictures.caption_grid(images, self._prompts, columns=4, scale=None)
        grid.save(folder / f"{step:08d}.png")
        pictures.plot_curves(self._workdir / "metrics.jsonl", self._workdir / "curves.png")


def default_prompts(data: DataConfig, count: int = 16) -> list[str]:
    """Captions of the first training records, in the loader's own kind of words."""
    source = make_source(data, "train")
    return [source[i]["caption"] for i in range(min(count, len(source)))]
