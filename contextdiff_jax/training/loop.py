"""Training, from settings to a trained run in a folder. Read it from top to bottom."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered
from orbax.checkpoint import CheckpointManager
from tqdm import tqdm

from contextdiff_jax.data import (
    CacheSource,
    DataConfig,
    Loader,
    RandomAccessSource,
    Tokenizer,
    bucket_sizes,
    make_loader,
    make_source,
)
from contextdiff_jax.data.identity import identity, shared_settings
from contextdiff_jax.inference.opening import of_run
from contextdiff_jax.inference.pipeline import NotFiniteError
from contextdiff_jax.models.contextdiff import Frozen
from contextdiff_jax.parallel.mesh import Feed, make_mesh, replicated, state_shardings
from contextdiff_jax.parallel.processes import PeerWatch, StopSignal, agree, is_first
from contextdiff_jax.runs import checkpoints
from contextdiff_jax.runs.frozen import load_frozen
from contextdiff_jax.runs.tokenizer import open_tokenizer
from contextdiff_jax.runs.workdir import claim_workdir
from contextdiff_jax.runtime import host, pictures
from contextdiff_jax.runtime.files import replacing
from contextdiff_jax.settings import Settings
from contextdiff_jax.training.first_state import first_state
from contextdiff_jax.training.log import MetricsLog, averages, speed
from contextdiff_jax.training.nonfinite import FiniteGuard
from contextdiff_jax.training.state import (
    TrainState,
    init_state,
    learning_rate_schedule,
    zero_metrics,
)
from contextdiff_jax.training.step import make_train_step

LOGGER = logging.getLogger(__name__)


def train(settings: Settings, config: Mapping[str, Any], workdir: pathlib.Path) -> TrainState:
    """Trains to `settings.train.steps`, resuming what `workdir` holds; `config` is what config.json
    records.

    Raises ValueError for what the user must change, RunError for a run that broke down.
    """
    every = settings.train
    mesh = make_mesh(settings.mesh, every.batch_size, every.accumulation)
    feed = Feed(mesh, every.batch_size, settings.mesh.rules)
    tokenizer, loader = open_data(settings, feed)
    frozen = load_frozen(
        settings, functools.partial(state_shardings, mesh, rules=settings.mesh.rules)
    )
    manager, state, shardings = open_state(settings, config, workdir, mesh, loader)
    first = int(state.step)
    if first >= every.steps:
        LOGGER.info("trained to step %d already", first)
        manager.close()
        return state
    null = jax.device_put(null_caption(tokenizer, settings.data.max_length), replicated(mesh))
    compiled, flops = compile_step(
        settings, state, shardings, peek(loader, first, feed), null, frozen
    )

    log, reporter = MetricsLog(workdir, first), Reporter(settings, workdir, tokenizer, mesh, frozen)
    guard = FiniteGuard(settings, config, workdir, state)
    # Closed whatever happens: the manager's `close` waits for the save that is under way.
    with (
        closing(StopSignal()) as asked_to_stop,
        PeerWatch(every.peer_timeout) as watch,
        closing(loader),
        closing(log),
        checkpoints.closing(manager, workdir),
    ):
        window_start, window_steps = time.perf_counter(), 0
        steps = range(first + 1, every.steps + 1)
        for step in tqdm(
            steps, initial=first, total=every.steps, disable=None if is_first() else True
        ):
            watch(f"reading the batch of step {step}")
            batch = to_devices(next(loader), feed)
            watch(f"in step {step}")
            state, nonfinite = compiled(state, batch, null, frozen)
            guard.watch(step, state, batch, nonfinite)
            if step == first + 1:
                jax.block_until_ready(nonfinite)
                LOGGER.info(
                    "first step done %.1f s after the command's start",
                    time.perf_counter() - host.STARTED,
                )
            window_steps += 1
            end = step == every.steps
            last = end or asked_to_stop(step)
            if step % every.log_every == 0 or end:
                guard.check(state)  # waits for the step
                seconds = time.perf_counter() - window_start
                values = averages(state.metric_sums) | {
                    "learning_rate": float(learning_rate_schedule(every)(step - 1))
                }
                values["broken_records"] = loader.num_broken
                values["cut_captions"] = loader.num_cut
                log.write(
                    step,
                    values | speed(window_steps * every.batch_size, seconds, window_steps, flops),
                )
                state = with_empty_metrics(state, shardings)
                window_start, window_steps = time.perf_counter(), 0
            if step % every.checkpoint_every == 0 or last:
                guard.check(state)
                watch(f"saving step {step}")
                checkpoints.save(manager, state, loader.get_state(), log.last)
            due = every.sample_every and step % every.sample_every == 0
            if end or (due and not last):  # told to stop, there may be no time for pictures
                watch(f"sampling after step {step}")
                reporter(state, step)
                window_start, window_steps = time.perf_counter(), 0
            if last:
                break
        watch("finishing the last save")
    return state


def open_data(settings: Settings, feed: Feed) -> tuple[Tokenizer, Loader]:
    """The tokenizer, and this process's share of the training batches, which all processes take
    from the same records.
    """

    def facts(opened: tuple[Tokenizer, RandomAccessSource, Loader]) -> dict[str, Any]:
        tokenizer, source, loader = opened
        ids, _ = tokenizer.encode([source[0]["caption"]], settings.data.max_length)
        records = identity(source, bucket_sizes(settings.data))
        words = {"ids of the first caption": ids.tolist()}
        return shared_settings(settings.data) | loader.get_state() | records | words

    tokenizer, _, loader = agree("data", lambda: _open_data(settings, feed), facts)
    return tokenizer, loader


def _open_data(settings: Settings, feed: Feed) -> tuple[Tokenizer, RandomAccessSource, Loader]:
    data = settings.data
    tokenizer = open_tokenizer(settings)
    source = make_source(data, "train")
    if isinstance(source, CacheSource) and source.cache.vae != json.loads(
        json.dumps(settings.latent.config.to_dict())
    ):
        raise ValueError(
            f"latent.vae={settings.latent.vae!r}: the cache in data.path={data.path!r} is another "
            "autoencoder's"
        )
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
    checkpoints.set_damaged_aside(workdir)
    keep = settings.train
    manager = checkpoints.open_manager(
        workdir, keep.keep_checkpoints, best=keep.keep_best, metric=keep.best_metric
    )
    checkpoints.check_shapes(manager, workdir, abstract)
    claim_workdir(workdir, config, write=is_first())
    if manager.latest_step() is None:
        return manager, first_state(settings, shardings), shardings
    state, data_state = checkpoints.restore(manager, checkpoints.placed(abstract, shardings))
    loader.set_state(data_state)
    return manager, state, shardings


def peek(loader: Loader, step: int, feed: Feed) -> dict[str, jax.Array]:
    """The next batch, for its shapes; the loader stays where it was."""
    batch = to_devices(next(loader), feed)
    loader.set_state({**loader.get_state(), "next_batch": step})
    return batch


def jit_step(
    settings: Settings,
    shardings: TrainState,
    batch: Mapping[str, jax.Array],
    null: Mapping[str, jax.Array],
    frozen: Frozen,
) -> Callable:
    """The jitted step, its state donated. Arrays, or their shapes with shardings
    (`jax.ShapeDtypeStruct`), will do.
    """
    whole = null["token_ids"].sharding
    return jax.jit(
        make_train_step(settings, whole.mesh),
        donate_argnums=0,
        in_shardings=(
            shardings,
            *(jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (batch, null, frozen)),
        ),
        out_shardings=(shardings, whole),
    )


def compile_step(
    settings: Settings,
    state: TrainState,
    shardings: TrainState,
    batch: Mapping[str, jax.Array],
    null: Mapping[str, jax.Array],
    frozen: Frozen = Frozen(),
) -> tuple[Callable, float]:
    """The step's program, and its floating-point operations over all devices.

    A batch of another shape (`data.buckets`) gets its own program when it first comes.
    """
    whole = null["token_ids"].sharding
    start = time.perf_counter()
    jitted = jit_step(settings, shardings, batch, null, frozen)
    lowered = jitted.lower(state, batch, null, frozen)
    compiled = lowered.compile()
    flops = count_flops(lowered, compiled, whole.mesh) * settings.train.accumulation
    LOGGER.info(
        "%d parameters, compiled in %.1f s, mesh %s",
        sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        time.perf_counter() - start,
        dict(whole.mesh.shape),
    )
    programs = {shapes_of(batch): compiled}

    def step(
        state: TrainState, batch: Mapping[str, jax.Array], *rest: Any
    ) -> tuple[TrainState, jax.Array]:
        shapes = shapes_of(batch)
        if shapes not in programs:
            LOGGER.info("compiling for %s", shapes)
            programs[shapes] = jitted.lower(state, batch, *rest).compile()
        return programs[shapes](state, batch, *rest)

    return step, flops


def count_flops(lowered: Lowered, compiled: Compiled, mesh: Mesh) -> float:
    """The program's floating-point operations over all devices, a loop's body counted once."""
    # XLA's count of a GPU's program leaves out the calls of cuDNN and cuBLAS: 1.6 of 98 GFLOP on an
    # H100. Elsewhere the compiled program is counted at once, while the one before compilation
    # takes seconds.
    if mesh.devices.flat[0].platform == "gpu":
        return (lowered.cost_analysis() or {}).get("flops", 0)
    return (compiled.cost_analysis() or {}).get("flops", 0) * mesh.size


def shapes_of(batch: Mapping[str, jax.Array]) -> tuple[tuple[int, ...], ...]:
    """The shapes of a batch's arrays, by name."""
    return tuple(batch[name].shape for name in sorted(batch))


def null_caption(tokenizer: Tokenizer, max_length: int) -> dict[str, np.ndarray]:
    """The empty caption's ids and mask, [1, L]: what the denoiser reads where the caption is
    dropped.
    """
    ids, mask = tokenizer.encode([""], max_length)
    return {"token_ids": ids, "token_mask": mask}


def to_devices(batch: Mapping[str, Any], feed: Feed) -> dict[str, jax.Array]:
    """This process's share of a global batch as global arrays; captions stay behind."""
    return feed.put({name: value for name, value in batch.items() if isinstance(value, np.ndarray)})


def with_empty_metrics(state: TrainState, shardings: TrainState) -> TrainState:
    """The state with its metric sums at 0; non-finite steps are counted through the whole run."""
    zeros = jax.device_put(jax.device_get(zero_metrics()), shardings.metric_sums)
    return dataclasses.replace(
        state, metric_sums=zeros | {"nonfinite": state.metric_sums["nonfinite"]}
    )


class Reporter:
    """Every `sample_every` steps, and at the end: a grid of captioned samples of the EMA weights,
    unless `sample_every` is 0, and the curves.
    """

    def __init__(
        self,
        settings: Settings,
        workdir: pathlib.Path,
        tokenizer: Tokenizer,
        mesh: Mesh,
        frozen: Frozen,
    ):
        self._settings, self._workdir = settings, workdir
        self._pipeline = None
        if settings.train.sample_every:
            self._pipeline = of_run(settings, tokenizer, None, frozen=frozen, mesh=mesh)
            self._prompts = list(settings.sample.prompts) or default_prompts(settings.data)

    def __call__(self, state: TrainState, step: int) -> None:
        images = None
        if self._pipeline is not None:
            pipeline = self._pipeline.with_params(state.ema)
            try:
                images = pipeline.text_to_image(self._prompts, seed=self._settings.seed)
            except NotFiniteError as error:  # no reason to end the training
                LOGGER.warning("no samples of step %d: %s", step, error)
        if not is_first():
            return
        if images is not None:
            grid = pictures.caption_grid(images, self._prompts, columns=4, scale=None)
            with checkpoints.writing(self._workdir, f"samples/{step:08d}.png"):
                (self._workdir / "samples").mkdir(exist_ok=True)
                with replacing(self._workdir / "samples" / f"{step:08d}.png") as path:
                    with path.open("wb") as file:
                        grid.save(file, format="PNG")
        # Drawn from and to local files, wherever the workdir is.
        with (
            checkpoints.writing(self._workdir, "curves.png"),
            tempfile.TemporaryDirectory() as scratch,
        ):
            local = pathlib.Path(scratch)
            (local / "metrics.jsonl").write_text((self._workdir / "metrics.jsonl").read_text())
            pictures.plot_curves(local / "metrics.jsonl", local / "curves.png")
            for drawn in local.glob("curves.png"):
                with replacing(self._workdir / "curves.png") as file:
                    file.write_bytes(drawn.read_bytes())


def default_prompts(data: DataConfig, count: int = 16) -> list[str]:
    """Captions of the first training records, in the loader's own kind of words."""
    source = make_source(data, "train")
    return [source[i]["caption"] for i in range(min(count, len(source)))]
