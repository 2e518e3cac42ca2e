"""python -m contextdiff_jax.train --replay=DUMP: does a dumped step again, and says where it stops
being finite.
"""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from contextdiff_jax.parallel.mesh import make_mesh, path_name, state_shardings
from contextdiff_jax.pretrained.folder_files import read_json
from contextdiff_jax.runs import checkpoints
from contextdiff_jax.runs.model import build_model, model_graph
from contextdiff_jax.runs.tokenizer import open_tokenizer
from contextdiff_jax.settings import parse
from contextdiff_jax.training.cached_text import frozen_for_training
from contextdiff_jax.training.loop import null_caption
from contextdiff_jax.training.state import init_state
from contextdiff_jax.training.step import draw, loss_fn


def first_nonfinite(**trees: PyTree) -> str:
    """'gradient unet/conv_in/kernel: 3 of 216 values' of the first leaf that isn't finite, or
    'none'.
    """
    for kind, tree in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            # On the host: each shape would be a program of its own.
            bad = np.count_nonzero(~np.isfinite(jax.device_get(leaf)))
            if bad:
                return f"{kind} {path_name(path)}: {bad} of {leaf.size} values"
    return "none"


def replay(dump: pathlib.Path) -> str:
    """Does the step of the folder DUMP (nonfinite.py) again on the devices that are here; returns
    what came out.

    Raises ValueError for a folder that is no dump.
    """
    if not (dump / "batch.npz").exists():
        raise ValueError(f"--replay={dump}: holds no dumped step (no batch.npz)")
    config = read_json(dump / "config.json", "the run's config")
    settings = parse(config | {"mesh": {"data": -1}})
    abstract = jax.eval_shape(lambda: init_state(settings))
    placed = checkpoints.placed(abstract, state_shardings(make_mesh(settings.mesh), abstract))
    state, _, step = checkpoints.restore_newest(dump, placed)
    with (dump / "batch.npz").open("rb") as file:
        batch = {name: jnp.asarray(value) for name, value in np.load(file).items()}
    null = null_caption(open_tokenizer(settings), settings.data.max_length)
    graph, process = model_graph(settings), settings.process
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step - 1)
    batch = draw(key, batch, settings)

    @jax.jit
    def run(params, frozen):
        (loss, metrics), gradient = jax.value_and_grad(
            lambda params: loss_fn(
                build_model(graph, params, frozen), batch, null, process, settings
            ),
            has_aux=True,
        )(params)
        return loss, metrics, gradient, optax.global_norm(gradient)

    loss, metrics, gradient, norm = run(state.params, frozen_for_training(settings))
    bad = first_nonfinite(batch=batch, parameter=state.params, metric=metrics, gradient=gradient)
    return (
        f"step {step}: loss {float(loss):.6g}, gradient norm {float(norm):.6g}\n"
        f"first that is not finite: {bad}"
    )
