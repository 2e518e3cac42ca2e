"""One-shot tuning (Wu et al., 2023): the video networks learn the clip, through the shifted
process.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from contextdiff_jax import diffusion
from contextdiff_jax.diffusion.process import MOTIONS, Process
from contextdiff_jax.editing.settings import EditSettings
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.models.denoising import related
from contextdiff_jax.models.video import VideoDiffusion
from contextdiff_jax.parallel.mesh import replicated
from contextdiff_jax.parallel.processes import PeerWatch
from contextdiff_jax.pretrained.folder_files import read_json
from contextdiff_jax.runs.resuming import resume
from contextdiff_jax.runs.workdir import FREE_FIELDS as RUNS_FREE_FIELDS
from contextdiff_jax.runs.workdir import claim_workdir
from contextdiff_jax.runtime.errors import RunError
from contextdiff_jax.runtime.keys import make_key
from contextdiff_jax.settings import TrainConfig
from contextdiff_jax.training.objective import drop, errors
from contextdiff_jax.training.run_steps import Task, run_steps
from contextdiff_jax.training.state import apply_gradients, make_optimizer, take_if
from contextdiff_jax.training.weights_and_biases import check_wandb

LOGGER = logging.getLogger(__name__)
# What a workdir's tuning does not depend on: other edits of the same clip go on from it.
# The clip and the model are told by what they hold (`TUNED_ON`), not by their names.
TUNED_ON = "tuned_on"
FREE_FIELDS = (
    *RUNS_FREE_FIELDS,
    "edit.",
    "video.edit_prompts",
    "video.fps",
    "video.path",
    "video.model",
    f"{TUNED_ON}.",
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TuneState:
    """Tuned parameters, their moving average, the optimizer's state and the random key."""

    step: Int[Array, ""]
    params: PyTree
    ema: PyTree
    opt_state: optax.OptState
    key: PRNGKeyArray


def trainable(which: str) -> Callable[[tuple, Any], bool]:
    """The NNX filter of the parameters that are tuned: `all`, or `temporal` layers, the pictures'
    queries and the context.
    """

    def chosen(path: tuple, _: Any) -> bool:
        queries = "to_q" in path and "text" not in path  # a transformer's text has its own
        return which == "all" or path[0] == "context" or "temporal" in path or queries

    return nnx.All(nnx.Param, chosen)


def init_tuning(params: PyTree, train: TrainConfig, key: PRNGKeyArray) -> TuneState:
    """Step 0, in float32 whatever the folder's weights are in: the squares of gradients, and what
    AdamW adds to them, are 0 in float16.
    """
    params = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    return TuneState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=make_optimizer(train).init(params),
        key=jax.random.key_data(key),
    )


def tuning_loss(
    model: VideoDiffusion,
    process: Process,
    x0: Float[Array, "1 F H W C"],
    text: Captions,
    null: Captions,
    key: PRNGKeyArray,
    train: TrainConfig,
    window: int,
) -> Float[Array, ""]:
    """The mean squared error of the clip (of random windows of it) at `train.batch_size` times.

    As `training.step.loss_fn`: of the network's text a share is dropped; r reads the true caption,
    or as `process.caption` says what the network does.
    """
    B, F, schedule = train.batch_size, x0.shape[1], process.schedule
    keys = dict(
        zip(("timestep", "noise", "dropout", "window"), jax.random.split(key, 4), strict=True)
    )
    if window and window < F:
        starts = jax.random.randint(keys["window"], (B,), 0, F - window + 1)
        x0 = jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(x0[0], start, window))(starts)
    else:
        x0 = jnp.broadcast_to(x0, (B, *x0.shape[1:]))
    t = schedule.time_of_share(diffusion.sample_shares(keys["timestep"], B, "stratified"))
    noise = jax.random.normal(keys["noise"], x0.shape)
    dropped = jax.random.bernoulli(keys["dropout"], train.caption_dropout, (B,))
    captions = jax.tree.map(lambda a: jnp.broadcast_to(a, (B, *a.shape[1:])), text)
    hide = functools.partial(drop, dropped, null)
    shifted_by = related(process.caption, captions, hide)

    def relate(t):
        return model.context(x0, shifted_by.tokens, shifted_by.mask, schedule.network_time(t))

    moves = model.context.image.config.moves and process.prediction_type in MOTIONS
    r, rate = diffusion.with_rate(relate, t) if moves else (relate(t), None)
    read = hide(captions)
    error, context_error = errors(
        lambda x_t, t: model.predict(x_t, t, read),
        process,
        x0,
        r,
        t,
        noise,
        rate,
    )
    return error.mean() + context_error


def make_tuning_step(
    graph: nnx.GraphDef, process: Process, train: TrainConfig, window: int
) -> Callable[..., tuple[TuneState, Float[Array, ""]]]:
    """`step(state, frozen, x0, text, null) -> (state, loss)`, to be jitted. Where the loss or the
    gradient is not finite the state comes back as it was.
    """

    def step(
        state: TuneState, frozen: PyTree, x0: Array, text: Captions, null: Captions
    ) -> tuple[TuneState, Array]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def loss_fn(params):
            return tuning_loss(
                nnx.merge(graph, params, frozen), process, x0, text, null, key, train, window
            )

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.global_norm(grads))

        def updated() -> TuneState:
            params, ema, opt_state = apply_gradients(
                train, grads, state.params, state.ema, state.opt_state, state.step
            )
            return TuneState(state.step + 1, params, ema, opt_state, state.key)

        return take_if(finite, updated, state), jnp.where(finite, loss, jnp.nan)

    return step


def begin_tuning(
    graph: nnx.GraphDef, params: PyTree, process: Process, settings: EditSettings, mesh: Mesh
) -> tuple[TuneState, Callable[..., tuple[TuneState, Float[Array, ""]]]]:
    """Step 0 and the jitted step, which takes the state's memory, on the devices of `mesh`.

    The state is placed there from the start: a first step with it elsewhere would be compiled
    apart.
    """
    everywhere, train = replicated(mesh), settings.base.train
    state = jax.device_put(init_tuning(params, train, make_key(settings.base.seed)), everywhere)
    step = make_tuning_step(graph, process, train, settings.video.window)
    return state, jax.jit(step, donate_argnums=0, out_shardings=everywhere)


def check_workdir(workdir: pathlib.Path, config: Mapping[str, Any], settings: EditSettings) -> None:
    """Raises ValueError if `workdir` holds another tuning.

    That is one by another config, on another clip, or from another model than config["tuned_on"]
    has digests of.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    claim_workdir(workdir, config, FREE_FIELDS, write=False)
    then, video = read_json(path, "an edit's config").get(TUNED_ON), settings.video
    reasons = {
        "clip": f"was tuned on another clip than video.path={video.path} is now",
        "model": f"was tuned from another model than video.model={video.model} is now",
    }
    for name, reason in reasons.items():
        if not isinstance(then, Mapping) or name not in then:
            reason = f"its config.json doesn't say of which {name} its tuning is"
        elif then[name] == config[TUNED_ON][name]:
            continue
        raise ValueError(f"--workdir={workdir}: {reason}; choose another workdir")


def tune_quickly(
    model: VideoDiffusion,
    process: Process,
    x0: Float[Array, "1 F H W C"],
    text: Captions,
    null: Captions,
    settings: EditSettings,
    seed: int,
    run: Callable[..., Any],
) -> VideoDiffusion:
    """Tunes as `tune` does, in one program that `run(name, function, *arguments)` compiles, for all
    seeds.

    Nothing is written.
    """
    train = settings.base.train
    check_wandb(settings.base.log)
    graph, params, frozen = nnx.split(model, trainable(settings.video.tune), ...)
    step, key = make_tuning_step(graph, process, train, settings.video.window), make_key(seed)

    def steps(key, params, *rest):
        state = init_tuning(params, train, key)
        return jax.lax.fori_loop(0, train.steps, lambda _, state: step(state, *rest)[0], state).ema

    return nnx.merge(graph, run("tuning", steps, key, params, frozen, x0, text, null), frozen)


class Tuning(Task[TuneState]):
    """The tuning on one clip, for `run_steps`."""

    batch_size = 1

    def __init__(
        self,
        step: Callable[[TuneState], tuple[TuneState, Array]],
        gain: Callable[[PyTree], Float[ArrayLike, ""]],
    ):
        self._step, self._gain = step, gain
        self._loss, self._latest = None, 0

    def advance(self, state: TuneState, step: int, watch: PeerWatch) -> TuneState:
        state, self._loss = self._step(state)
        self._latest = step  # the state of a step without a finite loss is the one before it
        return state

    def check(self, state: TuneState) -> None:
        if not np.isfinite(self._loss):
            raise RunError(
                f"step {self._latest}: the loss is not finite; lower train.learning_rate and run "
                "again"
            )

    def summary(self, state: TuneState, step: int) -> tuple[dict[str, float], TuneState]:
        gain = float(self._gain(state.params))
        return {"loss": float(self._loss), "context_gain": gain}, state


def tune(
    model: VideoDiffusion,
    process: Process,
    x0: Float[Array, "1 F H W C"],
    text: Captions,
    null: Captions,
    settings: EditSettings,
    config: Mapping[str, Any],
    workdir: pathlib.Path,
    mesh: Mesh,
) -> VideoDiffusion:
    """The model tuned on x0 for `train.steps`, with what is in `workdir` as the start, on the
    devices of `mesh`, on which x0 lies.

    Raises ValueError for a workdir of another tuning, RunError for a loss that is not finite or a
    stop by a signal.
    """
    train = settings.base.train
    graph, params, frozen = nnx.split(model, trainable(settings.video.tune), ...)
    state, step_fn = begin_tuning(graph, params, process, settings, mesh)
    shardings = jax.tree.map(lambda a: a.sharding, state)
    manager, saved, _ = resume(
        workdir, config, state, shardings, train.keep_checkpoints, free=FREE_FIELDS
    )
    state = state if saved is None else saved
    first = int(state.step)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    LOGGER.info("tuning %d parameters, from step %d to %d", count, first, train.steps)
    task = Tuning(
        lambda state: step_fn(state, frozen, x0, text, null),
        lambda params: nnx.merge(graph, params, frozen).context.gain,
    )
    state = run_steps(
        task, state, train, workdir, manager, label="tuning", wandb=settings.base.log.wandb
    )
    if int(state.step) < train.steps:
        raise RunError(f"stopped at step {int(state.step)} of {train.steps}; run again to go on")
    return nnx.merge(graph, state.ema, frozen)
