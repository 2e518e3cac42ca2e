"""The training state: one pytree holds everything that a resumed run needs, except the place in the
data.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float32, Int, PRNGKeyArray, PyTree

from contextdiff_jax.parallel.mesh import current_target
from contextdiff_jax.runs.averages import newest_share, power_of_length
from contextdiff_jax.runs.model import init_params
from contextdiff_jax.runtime.keys import make_key
from contextdiff_jax.settings import Settings, TrainConfig
from contextdiff_jax.training.muon import muon
from contextdiff_jax.training.trainable import split_trainable

State = TypeVar("State", bound=PyTree)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters, their moving average, the optimizer's state, the random key, and the sums of
    metrics since the last logged step (in the state so that a resumed run's log equals an
    uninterrupted one's).
    """

    step: Int[Array, ""]
    params: PyTree
    ema: PyTree
    opt_state: optax.OptState
    key: PRNGKeyArray
    metric_sums: dict[str, Array]


METRICS = ("count", "loss", "denoise_loss", "context_loss", "prior_kl", "context_gain", "grad_norm")


def zero_metrics() -> dict[str, Float32[np.ndarray, "..."]]:
    """Empty sums, on the host: the loop puts them where the state lies. The quartile entries are
    sums over samples by t's quartile, the others over (finite) steps. `nonfinite` counts the steps
    that were skipped.
    """
    shapes = dict.fromkeys((*METRICS, "nonfinite"), ())
    shapes |= {"quartile_loss": (4,), "quartile_count": (4,)}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up, then `config.decay` to 0 at the last step."""
    rest = max(config.steps - config.warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(config.learning_rate),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, rest),
    }[config.decay]
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """`config.optimizer` on clipped gradients; its last link keeps the averages of
    `config.power_ema`.
    """
    optimizer = {"adamw": optax.adamw, "muon": muon}[config.optimizer](
        learning_rate_schedule(config), b1=config.b1, b2=config.b2, weight_decay=config.weight_decay
    )
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    if config.power_ema:
        optimizer = optax.chain(optimizer, power_averages(config.power_ema))
    return optimizer


class PowerAverages(NamedTuple):
    """Averages of the trained parameters after `updates` of them, one a length; at first zeros."""

    updates: Int[Array, ""]
    averages: tuple[PyTree, ...]


def power_averages(lengths: Sequence[float]) -> optax.GradientTransformation:
    """The last link of an optimizer, which leaves the updates as they are and averages what they
    make of the parameters: (1) of runs/averages.py.
    """
    powers = [power_of_length(length) for length in lengths]

    def init(params: PyTree) -> PowerAverages:
        zeros = tuple(jax.tree.map(jnp.zeros_like, params) for _ in powers)
        return PowerAverages(jnp.zeros((), jnp.int32), zeros)

    def update(updates: PyTree, state: PowerAverages, params: PyTree):
        newest, count = optax.apply_updates(params, updates), state.updates + 1

        def averaged(power: float, average: PyTree) -> PyTree:
            share = newest_share(power, count.astype(jnp.float32), jnp)
            # The difference: two factors, rounded, don't sum to 1, and thousands of steps add up.
            return jax.tree.map(lambda old, new: old + share * (new - old), average, newest)

        averages = tuple(map(averaged, powers, state.averages))
        return updates, PowerAverages(count, averages)

    return optax.GradientTransformation(init, update)


def find_power_averages(opt_state: optax.OptState) -> PowerAverages:
    """The averages in the state of an optimizer that has them."""
    return opt_state[-1]


def moving_average(params: PyTree, ema: PyTree, step: Int[Array, ""], decay: float) -> PyTree:
    """The average after `params`. It starts as a plain one, so that the first steps' random weights
    are soon forgotten.
    """
    return optax.incremental_update(params, ema, 1 - jnp.minimum(decay, (1 + step) / (10 + step)))


def apply_gradients(
    config: TrainConfig,
    grads: PyTree,
    params: PyTree,
    ema: PyTree,
    opt_state: optax.OptState,
    step: Int[Array, ""],
) -> tuple[PyTree, PyTree, optax.OptState]:
    """(parameters, their average, the optimizer's state) after step number `step`, from 0 on."""
    updates, opt_state = make_optimizer(config).update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, moving_average(params, ema, step, config.ema_decay), opt_state


def take_if(good: Bool[Array, ""], new: Callable[[], State], old: State) -> State:
    """`new()` where `good`, else `old`.

    On a CPU by a branch. If values were chosen one by one there, XLA would make the moments once
    for the state and once more for the update, and copy the state first, for that reads the old
    ones (docs/performance.md). Elsewhere one kernel makes all of it, and a GPU's host would wait
    for the branch.
    """
    if current_target().platform == "cpu":
        return jax.lax.cond(good, new, lambda: old)
    return jax.tree.map(functools.partial(jnp.where, good), new(), old)


def with_empty_metrics(state: TrainState, shardings: TrainState) -> TrainState:
    """The state with its metric sums at 0; the steps that were skipped are counted through the
    whole run.
    """
    sums = state.metric_sums
    empty = jax.tree.map(lambda sum: np.zeros(sum.shape, sum.dtype), sums)
    zeros = jax.device_put(empty, shardings.metric_sums)
    kept = {name: sums[name] for name in sums if name == "nonfinite"}
    return dataclasses.replace(state, metric_sums=zeros | kept)


def init_state(settings: Settings) -> TrainState:
    """Step 0. Pure: jit it with output shardings, or `jax.eval_shape` it."""
    params = init_params(settings)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=make_optimizer(settings.train).init(
            split_trainable(params, settings.train.trainable)[0]
        ),
        key=jax.random.key_data(make_key(settings.seed)),
        metric_sums=jax.tree.map(jnp.asarray, zero_metrics()),
    )
