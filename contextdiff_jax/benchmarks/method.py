"""The whole method, measured: its training step and sampling loop with and without the context, and
torch's training step.
"""

from __future__ import annotations

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from contextdiff_jax.benchmarks.measured import (
    Devices,
    Inputs,
    Stepper,
    check,
    check_change,
    compile_timed,
    randomised,
)
from contextdiff_jax.benchmarks.paired import Contestant
from contextdiff_jax.inference.opening import run_steps
from contextdiff_jax.inference.pipeline import method_of
from contextdiff_jax.inference.sampling import Text, make_sample
from contextdiff_jax.runs.model import build_model, model_graph
from contextdiff_jax.runtime.keys import make_key
from contextdiff_jax.settings import Settings
from contextdiff_jax.training.state import TrainState, init_state
from contextdiff_jax.training.step import draw, make_train_step

LOGGER = logging.getLogger(__name__)
WITH_CONTEXT, WITHOUT_CONTEXT = "method, with context", "method, without context"


def _variants(settings: Settings) -> dict[str, Settings]:
    """The whole method with its context, and the same without."""
    plain = dataclasses.replace(
        settings,
        context=dataclasses.replace(settings.context, kind="none", estimate="plugin"),
        model=dataclasses.replace(settings.model, context_head=False),
    )
    return ({} if settings.context.network.is_zero else {WITH_CONTEXT: settings}) | {
        WITHOUT_CONTEXT: plain
    }


def contestants_of_method(settings: Settings, program: str, compare: str) -> list[Contestant]:
    """The real training step (text encoder, average of the weights and metrics included) or
    sampling loop, the first with its context, if it has one, and torch's of that.
    """
    make = {"train": _train_method, "sample": _sample_method}[program]
    contestants = [make(variant, name) for name, variant in _variants(settings).items()]
    return contestants + (_torch_method(settings) if compare and program == "train" else [])


def _random_texts(settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    rng, shape = (
        np.random.default_rng(settings.seed),
        (settings.train.batch_size, settings.data.max_length),
    )
    return rng.integers(1, settings.text.vocab_size, shape).astype(np.int32), np.ones(shape, bool)


def training_inputs(settings: Settings) -> tuple[Inputs, Inputs]:
    """A batch of random pictures and texts, and the empty caption's stand-in."""
    ids, mask = _random_texts(settings)
    image = (
        np.random.default_rng(settings.seed)
        .integers(0, 256, (len(ids), *settings.shape))
        .astype(np.uint8)
    )
    batch = {"image": image, "token_ids": ids, "token_mask": mask}
    return batch, {"token_ids": ids[:1], "token_mask": mask[:1]}


def random_state(settings: Settings) -> TrainState:
    """Step 0 of `randomised` parameters: all else starts at 0. Nothing is compiled, where drawing
    the initialisation's parameters first would take as long as half a step's program.
    """
    shapes = jax.eval_shape(functools.partial(init_state, settings))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    params = randomised(state.params, settings.seed)
    return dataclasses.replace(
        state,
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        key=jax.random.key_data(make_key(settings.seed)),
    )


def _train_method(settings: Settings, name: str) -> Contestant:
    devices, (batch, null) = Devices(settings), training_inputs(settings)
    state = devices.parameters(random_state(settings))
    call = Stepper(
        make_train_step(settings, devices.mesh), state, rest=(devices.batch(batch), null)
    )
    return Contestant(name, call, call.compile_seconds)


def _sample_method(settings: Settings, name: str) -> Contestant:
    devices, (ids, mask) = Devices(settings), _random_texts(settings)
    sample = make_sample(settings.process, method_of(settings.sample))
    graph = model_graph(settings)
    x = np.random.default_rng(settings.seed).standard_normal(
        (len(ids), *settings.shape), np.float32
    )
    placed = devices.batch({"x": x, "ids": ids, "mask": mask})
    arguments = (
        devices.parameters(random_state(settings).params),
        placed["x"],
        Text(placed["ids"], placed["mask"], ids[:1], mask[:1]),
        run_steps(settings.process.schedule, settings.sample),
        np.float32(settings.sample.guidance),
        make_key(settings.seed),
    )
    with devices.tracing():
        run, seconds, _ = compile_timed(
            lambda params, *rest: sample(build_model(graph, params), *rest), *arguments
        )
    return Contestant(name, lambda: jax.block_until_ready(run(*arguments)), seconds)


def _torch_method(settings: Settings) -> list[Contestant]:
    """torch's whole training step, after a first one that must give the loss and the parameters of
    ours.
    """
    from contextdiff_jax.benchmarks.torch_method import (
        LAYOUTS,
        TorchMethod,
        lacking,
        method_parameters,
    )

    if missing := lacking(settings):
        LOGGER.info("the whole method has no torch version with %s: not compared", missing)
        return []
    # The first step of all, at the full learning rate.
    settings = dataclasses.replace(
        settings, train=dataclasses.replace(settings.train, warmup_steps=0, decay="constant")
    )
    batch, null = training_inputs(settings)
    state, graph = random_state(settings), model_graph(settings)
    drawn = draw(jax.random.fold_in(jax.random.wrap_key_data(state.key), 0), batch, settings)
    model = nnx.merge(graph, state.params)
    before = method_parameters(model)
    peers = {f"torch method {layout}": TorchMethod(model, settings, layout) for layout in LAYOUTS}
    state, _ = jax.jit(make_train_step(settings))(state, batch, null)
    loss, after = (
        float(state.metric_sums["loss"]),
        method_parameters(nnx.merge(graph, state.params)),
    )
    for name, peer in peers.items():
        theirs = np.array(peer.step(batch, null, drawn))
        check(f"{name}, loss", np.array(loss), theirs, "float32", of="loss")  # else it has no peer
        check_change(f"{name}, parameters", before, after, peer.parameters())
    return [
        Contestant(name, functools.partial(peer.step, batch, null, None))
        for name, peer in peers.items()
    ]
