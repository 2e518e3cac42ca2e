"""The denoising network alone, of any kind: random weights, a batch, its part of a training step
and of a sampling loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from contextdiff_jax import diffusion
from contextdiff_jax.benchmarks.measured import Inputs, randomised
from contextdiff_jax.diffusion.samplers import Denoised
from contextdiff_jax.models.backbones import Backbone, build_backbone
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.models.remat import configure
from contextdiff_jax.models.undrawn import Undrawn
from contextdiff_jax.pretrained.conversion import backbone_model
from contextdiff_jax.pretrained.names import state_to_torch
from contextdiff_jax.runs.model import precision_of
from contextdiff_jax.settings import Settings, TrainConfig


def random_network(settings: Settings) -> Backbone:
    """The config's network, without a context head, with random weights of about unit gain and none
    at 0: a new network's output and most of its gradients are 0, which would compare nothing.
    """
    config, train = dataclasses.replace(settings.model, context_head=False), settings.train
    options = dict(rngs=Undrawn(), precision=precision_of(settings))
    graph, shapes = nnx.split(nnx.eval_shape(lambda: build_backbone(config, **options)))
    network = nnx.merge(graph, randomised(shapes, settings.seed))
    configure(network, remat=train.remat, attention=train.attention, unroll=train.unroll)
    return network


def make_inputs(settings: Settings, batch: int) -> Inputs:
    """A batch of what networks read, float32 but for the times `t`, and the loss's `target`."""
    rng, model = np.random.default_rng(settings.seed), settings.model
    shapes = {
        "x": settings.shape,
        "text": (settings.data.max_length, model.text_width),
        "target": (*settings.shape[:2], model.out_channels),
    }
    if model.pooled_features is not None:
        shapes["pooled"] = (model.pooled_features,)
    inputs = {
        name: rng.standard_normal((batch, *shape), np.float32) for name, shape in shapes.items()
    }
    return inputs | {"t": np.arange(batch) * 1000 // batch}


def predict(network: Backbone, x: Array, t: Array, inputs: Mapping[str, Array]) -> Array:
    """The network's output, of all tokens of the text."""
    text = inputs["text"]
    captions = Captions(text, jnp.ones(text.shape[:2], bool), inputs.get("pooled"))
    return network.predict(x, t, captions, None, x.shape[1:3])


def to_torch(network: Backbone) -> dict[str, np.ndarray]:
    """All of diffusers' tensors by its names."""
    config = network.config
    return state_to_torch(network, backbone_model(config).rules(config))


def make_adamw(train: TrainConfig) -> optax.GradientTransformation:
    """AdamW by the numbers of a config, as torch's side has it."""
    return optax.adamw(train.learning_rate, train.b1, train.b2, weight_decay=train.weight_decay)


def training_step(graph: nnx.GraphDef, optimizer: optax.GradientTransformation) -> Callable:
    """`step(params, opt_state, inputs) -> (params, opt_state, loss)`: the denoiser's part of a
    training step.
    """

    def loss_fn(params, inputs):
        output = predict(nnx.merge(graph, params), inputs["x"], inputs["t"], inputs)
        return jnp.mean((output - inputs["target"]) ** 2)

    def step(params, opt_state, inputs):
        loss, grads = jax.value_and_grad(loss_fn)(params, inputs)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def sampling_loop(graph: nnx.GraphDef, settings: Settings) -> Callable:
    """`sample(params, inputs) -> x0`: DDIM with guidance, both branches in one batch; `inputs` but
    x are 2 B long, those without the caption first.
    """
    process, sample = settings.diffusion, settings.sample
    schedule = process.make_schedule()
    timesteps = sample.times(schedule)

    def run(params, inputs):
        network = nnx.merge(graph, params)

        def branches(x, t, s):
            output = predict(network, *schedule.network_input(x, t), inputs)
            x0 = diffusion.predict_x0(schedule, output, x, t, process.prediction_type, shift="none")
            return Denoised(x0, jnp.zeros_like(x), jnp.zeros_like(x))

        denoise = diffusion.classifier_free(
            branches,
            sample.guidance,
            join=lambda a, b: jnp.concatenate([a, b]),
            split=lambda both: jnp.split(both, 2)[::-1],
        )
        return diffusion.ddim_sample(denoise, inputs["x"], schedule, timesteps, shift="none")

    return run
