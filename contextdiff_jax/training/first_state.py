"""Sources of a new run's parameters.

They are the seed, a pretrained network (`model.pretrained`) and another run (`train.init_from`, or
the teacher that it is distilled from).
"""

from __future__ import annotations

import logging
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

from contextdiff_jax.models.lora import LORA
from contextdiff_jax.pretrained import folder as folders
from contextdiff_jax.pretrained.conversion import backbone_model
from contextdiff_jax.pretrained.kinds import Options
from contextdiff_jax.runs.reading import load_run
from contextdiff_jax.runtime.hub import find
from contextdiff_jax.settings import Settings
from contextdiff_jax.training.export import context_state
from contextdiff_jax.training.state import TrainState, init_state

LOGGER = logging.getLogger(__name__)


def first_state(settings: Settings, shardings: TrainState) -> TrainState:
    """Step 0, laid out as `shardings` says.

    Raises ValueError for a folder or a run that can't be read or holds other networks than the
    config.
    """
    state = jax.jit(lambda: init_state(settings), out_shardings=shardings)()
    params = state.params
    if settings.pretrained:
        params = _with_network(params, settings, shardings.params)
    if settings.train.init_from:
        params = _with_run(params, settings.train.init_from, "train.init_from")
    elif settings.distill.teacher:
        params = _with_run(params, settings.distill.teacher, "distill.teacher", head=False)
    if params is state.params:
        return state
    return TrainState(**{**vars(state), "params": params, "ema": jax.tree.map(jnp.copy, params)})


def _with_network(params: nnx.State, settings: Settings, shardings: nnx.State) -> nnx.State:
    """`params` with the folder's network, in float32, and with the context that an exported run's
    folder holds.
    """
    folder = pathlib.Path(find(settings.pretrained))
    model = backbone_model(settings.model)
    name = model.build.name
    options = Options(param_dtype=jnp.float32, shardings=lambda _: shardings[name])
    network = folders.load(model, folder / name, options)
    source = f"model.pretrained={settings.pretrained!r}"
    params = _replaced(params, nnx.State({name: nnx.state(network, nnx.Param)}), source)
    context = context_state(folder)
    return params if context is None else _replaced(params, context, source)


def _with_run(params: nnx.State, workdir: str, field: str, head: bool = True) -> nnx.State:
    """`params` with the EMA weights of the run's newest checkpoint, its LoRA merged, and with its
    context head if asked for; what it lacks (a context, a context head, LoRA) stays as it is.
    """
    run = load_run(workdir)
    LOGGER.info("starts from step %d of %s", run.step, workdir)
    flat = nnx.to_flat_state(run.params)
    given = nnx.from_flat_state([each for each in flat if head or "context_head" not in each[0]])
    return _replaced(params, given, f"{field}={workdir!r}")


def _replaced(params: nnx.State, given: nnx.State, source: str) -> nnx.State:
    old, new = dict(nnx.to_flat_state(params)), dict(nnx.to_flat_state(given))
    kinds = {path[0] for path in new if "context_head" not in path}
    for path in sorted(old.keys() | new.keys(), key=str):
        shapes = [tuple(tree[path].shape) if path in tree else None for tree in (new, old)]
        optional = path[0] == LORA or "context_head" in path or path[0] not in kinds
        if shapes[0] != shapes[1] and not (shapes[0] is None and optional):
            name = "/".join(map(str, path))
            there, here = (shape or "absent" for shape in shapes)
            raise ValueError(f"{source}: holds another model: {name}: {there} there, {here} here")
    for path, leaf in new.items():
        value = jax.device_put(leaf.get_value(), old[path].get_value().sharding)
        old[path] = old[path].replace(value.astype(jnp.float32))
    return nnx.from_flat_state(old.items())
