"""Training, from settings to a trained run in a folder. Read it from top to bottom."""

from __future__ import annotations

import logging
import pathlib
import signal
import time
from typing import Any, Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from contextdiff_jax import pictures
from contextdiff_jax.cli import RunError
from contextdiff_jax.data import DataConfig, Tokenizer, load_tokenizer, make_loader, make_source
from contextdiff_jax.generation import Generator
from contextdiff_jax.parallel.mesh import batch_sharding, make_mesh, state_shardings
from contextdiff_jax.settings import Settings
from contextdiff_jax.training import checkpoints
from contextdiff_jax.training.log import MetricsLog, averages, is_finite, speed
from contextdiff_jax.training.state import TrainState, init_state, learning_rate_schedule, zero_metrics
from contextdiff_jax.training.step import make_train_step

LOGGER = logging.getLogger(__name__)
ARRAYS = ("image", "token_ids", "token_mask")


def train(settings: Settings, config: Mapping[str, Any], workdir: pathlib.Path) -> TrainState:
    """Trains to `settings.train.steps`, resuming what `workdir` holds; `config` is what config.json records.

    Raises ValueError for what the user must change, RunError for a run that broke down.
    """
    # Mesh, data
    mesh = make_mesh(settings.mesh, settings.train.batch_size)
    tokenizer = load_tokenizer(settings.data.tokenizer or None)
    if tokenizer.vocab_size > settings.text.vocab_size:
        raise ValueError(f"text.vocab_size={settings.text.vocab_size}: the tokenizer has {tokenizer.vocab_size} ids")
    source = make_source(settings.data, "train")
    loader = make_loader(
        source, batch_size=settings.train.batch_size, seed=settings.data.seed, tokenizer=tokenizer,
        num_workers=settings.data.num_workers, max_length=settings.data.max_length, prefetch=settings.data.prefetch,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )

    # State: new, or the newest checkpoint of the same run
    abstract = jax.eval_shape(lambda: init_state(settings))
    shardings = state_shardings(mesh, abstract)
    manager = checkpoints.open_manager(workdir, settings.train.keep_checkpoints)
    checkpoints.check_shapes(manager, workdir, abstract)
    checkpoints.claim_workdir(workdir, config)
    if manager.latest_step() is None:
        state = jax.jit(lambda: init_state(settings), out_shardings=shardings)()
    else:
        placed = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
        state, data_state = checkpoints.restore(manager, placed)
        loader.set_state(data_state)

    # Compile the step
    place, replicated = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    null = jax.device_put(null_caption(tokenizer, settings.data.max_length), replicated)
    step_fn = jax.jit(
        make_train_step(settings), donate_argnums=0,
        in_shardings=(shardings, place, replicated), out_shardings=shardings,
    )
    batch = to_devices(next(loader), place)
    loader.set_state({**loader.get_state(), "next_batch": int(state.step)})  # that one was for its shapes
    start = time.perf_counter()
    compiled = step_fn.lower(state, batch, null).compile()
    flops = (compiled.cost_analysis() or {}).get("flops", 0) * settings.train.accumulation * jax.device_count()
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    LOGGER.info("%d parameters, compiled in %.1f s, mesh %s", num_parameters, time.perf_counter() - start, mesh.shape)

    # Loop
    log = MetricsLog(workdir, int(state.step))
    reporter = Reporter(settings, workdir, tokenizer)
    first, asked_to_stop = int(state.step), StopSignal()
    window_start, window_steps = time.perf_counter(), 0
    for step in tqdm(range(first + 1, settings.train.steps + 1), initial=first, total=settings.train.steps, disable=None):
        batch = to_devices(next(loader), place)
        state = compiled(state, batch, null)
        window_steps += 1
        last = step == settings.train.steps or asked_to_stop()
        if step % settings.train.log_every == 0 or step == settings.train.steps:
            values = averages(state.metric_sums)  # waits for the step
            seconds = time.perf_counter() - window_start
            values["learning_rate"] = float(learning_rate_schedule(settings.train)(step - 1))
            values |= speed(window_steps * settings.train.batch_size, seconds, window_steps, flops)
            if not is_finite(values):
                raise RunError(dump(workdir, step, batch))
            log.write(step, values)
            state = with_empty_metrics(state, shardings)
            window_start, window_steps = time.perf_counter(), 0
        if step % settings.train.checkpoint_every == 0 or last:
            checkpoints.save(manager, state, loader.get_state())
        if settings.train.sample_every and step % settings.train.sample_every == 0 or step == settings.train.steps:
            reporter(state, step)
            window_start, window_steps = time.perf_counter(), 0
        if last:
            break
    manager.wait_until_finished()
    manager.close()
    loader.close()
    log.close()
    return state


def null_caption(tokenizer: Tokenizer, max_length: int) -> dict[str, np.ndarray]:
    """The empty caption's ids and mask, [1, L]: what the denoiser reads where the caption is dropped."""
    ids, mask = tokenizer.encode([""], max_length)
    return {"token_ids": ids, "token_mask": mask}


def to_devices(batch: Mapping[str, Any], sharding: NamedSharding) -> dict[str, jax.Array]:
    """This process's share of a global batch as global arrays."""
    return {name: jax.make_array_from_process_local_data(sharding, batch[name]) for name in ARRAYS}


def with_empty_metrics(state: TrainState, shardings: TrainState) -> TrainState:
    """The state with its metric sums at 0."""
    return TrainState(**{**vars(state), "metric_sums": jax.device_put(zero_metrics(), shardings.metric_sums)})


def dump(workdir: pathlib.Path, step: int, batch: Mapping[str, jax.Array]) -> str:
    """Saves the batch at which a non-finite value was seen; the message says where."""
    path = workdir / f"nonfinite_{step}.npz"
    np.savez(path, **{name: np.asarray(value) for name, value in batch.items()})
    return (
        f"step {step}: the loss or a gradient since the last logged step is not finite; this step's inputs are in "
        f"{path}, the last good checkpoint is kept; lower train.learning_rate or train.clip_norm and run again"
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

    def __init__(self, settings: Settings, workdir: pathlib.Path, tokenizer: Tokenizer):
        self._settings, self._workdir = settings, workdir
        self._generator = Generator(settings, tokenizer)
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
