"""The model that a run's settings describe: drawn, in structure alone, and of given parameters."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from contextdiff_jax.models.contextdiff import ContextDiffusion, Frozen
from contextdiff_jax.models.lora import add_lora, merge_lora
from contextdiff_jax.models.precision import Precision
from contextdiff_jax.models.remat import configure
from contextdiff_jax.models.undrawn import Undrawn
from contextdiff_jax.parallel.mesh import gathered
from contextdiff_jax.runtime.keys import make_key
from contextdiff_jax.settings import Settings


def precision_of(settings: Settings) -> Precision:
    """The networks' types of numbers, by `train.precision`."""
    compute = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[settings.train.precision]
    return Precision(compute=compute)


def make_model(settings: Settings, rngs: nnx.Rngs | None = None) -> ContextDiffusion:
    """The model with parameters drawn from `settings.seed`, or from `rngs`."""
    model = ContextDiffusion.create(
        settings.text,
        settings.model,
        settings.context,
        rngs=nnx.Rngs(make_key(settings.seed)) if rngs is None else rngs,
        precision=precision_of(settings),
    )
    train = settings.train
    configure(model, remat=train.remat, attention=train.attention, unroll=train.unroll)
    return model


def model_graph(settings: Settings) -> nnx.GraphDef:
    """The model's structure, without its parameters: `nnx.merge(model_graph(s), params)` is the
    model.
    """
    return nnx.split(nnx.eval_shape(lambda: make_model(settings, Undrawn())))[0]


def build_model(graph: nnx.GraphDef, params: PyTree, frozen: Frozen = Frozen()) -> ContextDiffusion:
    """The model of a state's parameters, LoRA's products in the layers that they change, with the
    frozen networks; on a mesh (`tracing_for`) all their parameters are gathered.
    """
    params = merge_lora(params)
    # Merged twice: updating in place would change the caller's variables.
    dtype = nnx.merge(graph, params).backbone.precision.compute
    # jaxlib can't read back what libtpu makes of frozen vectors that are gathered (--mode=aot).
    return nnx.merge(graph, gathered(params, dtype)).attach(gathered(frozen, vectors=False))


def init_params(settings: Settings, rngs: nnx.Rngs | None = None) -> nnx.State:
    """The parameters at step 0, LoRA's among them where a run trains those; see `make_model`."""
    params = nnx.state(make_model(settings, rngs), nnx.Param)
    if settings.train.trainable == "lora":
        params = add_lora(params, settings.train.lora_rank, make_key(settings.seed))
    return params
