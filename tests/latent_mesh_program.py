"""Run by test_latent.py in a process of 8 simulated devices: the loss of a first step with frozen
networks, on each mesh, as one JSON object.

    python tests/latent_mesh_program.py FOLDER 1x1x1 2x4x1 1x4x2     data, fsdp, tensor
"""

from __future__ import annotations

import json
import math
import sys

import jax
import numpy as np
from latent_runs import batch_of, config_of

from contextdiff_jax.parallel.mesh import Feed, MeshConfig, make_mesh, replicated, state_shardings
from contextdiff_jax.runs.frozen import load_frozen
from contextdiff_jax.settings import parse
from contextdiff_jax.training.state import init_state
from contextdiff_jax.training.step import make_train_step


def first_loss(folder: str, name: str) -> float:
    """The loss of the first step on the mesh `name`."""
    settings = parse(config_of(folder))
    batch = {k: np.concatenate([v] * 4) for k, v in batch_of(settings).items()}
    null = {k: v[:1] for k, v in batch.items() if k != "image"}
    data, fsdp, tensor = map(int, name.split("x"))
    devices = jax.devices()[: math.prod((data, fsdp, tensor))]
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), 8, devices=devices)
    shardings = state_shardings(mesh, jax.eval_shape(lambda: init_state(settings)))
    state = jax.jit(lambda: init_state(settings), out_shardings=shardings)()
    frozen = load_frozen(settings, lambda abstract: state_shardings(mesh, abstract))
    null = jax.device_put(null, replicated(mesh))
    state, _ = jax.jit(make_train_step(settings, mesh))(
        state, Feed(mesh, 8).put(batch), null, frozen
    )
    return float(state.metric_sums["loss"])


if __name__ == "__main__":
    print(json.dumps({name: first_loss(sys.argv[1], name) for name in sys.argv[2:]}))
