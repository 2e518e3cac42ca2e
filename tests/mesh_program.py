"""Run by test_mesh.py in a process of 8 simulated devices: the losses of 10 steps, and a picture,
on each mesh.

    python tests/mesh_program.py OUT.json WORKDIR CONFIG.json 1x1x1x1 1x2x2x2/2 ...

A mesh is the sizes of data, fsdp, tensor, sequence, / the parts that a batch is taken in.

The first mesh to come initialises the model and saves its state after step 5 in WORKDIR; the
others take its start, and also do step 6 from what it saved. For one mesh: the losses alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import sys
from typing import Any

import jax

from contextdiff_jax.data import load_tokenizer, make_loader, make_source
from contextdiff_jax.inference.opening import of_run
from contextdiff_jax.parallel.mesh import Feed, MeshConfig, make_mesh, replicated, state_shardings
from contextdiff_jax.runs import checkpoints
from contextdiff_jax.settings import Settings, parse
from contextdiff_jax.training.loop import null_caption, to_devices
from contextdiff_jax.training.state import TrainState, init_state
from contextdiff_jax.training.step import make_train_step


def run(
    settings: Settings,
    name: str,
    workdir: pathlib.Path,
    starts: list[TrainState],
    losses_alone: bool,
) -> dict[str, Any]:
    """Trains on the mesh `name` of the first devices, from `starts[0]`, if it is there already:
    to compile an initialisation takes half as long as a step.
    """
    shape, _, parts = name.partition("/")
    sizes = dict(
        zip(("data", "fsdp", "tensor", "sequence"), map(int, shape.split("x")), strict=True)
    )
    mesh = make_mesh(MeshConfig(**sizes), 8, devices=jax.devices()[: math.prod(sizes.values())])
    train = dataclasses.replace(settings.train, accumulation=int(parts or 1))
    settings = dataclasses.replace(settings, train=train)
    abstract = jax.eval_shape(lambda: init_state(settings))
    shardings = state_shardings(mesh, abstract)
    feed = Feed(mesh, 8)
    tokenizer = load_tokenizer()
    loader = make_loader(
        make_source(settings.data), batch_size=8, tokenizer=tokenizer, max_length=12, rows=feed.rows
    )
    null = jax.device_put(null_caption(tokenizer, 12), replicated(mesh))
    if not starts:
        state = jax.jit(lambda: init_state(settings), out_shardings=shardings)()
        starts.append(jax.device_get(state))
    state = jax.device_put(starts[0], shardings)
    step = jax.jit(
        make_train_step(settings, mesh),
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
    )

    def next_loss(state):
        before = float(state.metric_sums["loss"])
        state, _ = step(state, to_devices(next(loader), feed), null)
        return state, float(state.metric_sums["loss"]) - before

    losses, resumed = [], checkpoints.newest_good(workdir) is not None
    for number in range(settings.train.steps):
        state, loss = next_loss(state)
        losses.append(loss)
        if number == 4 and not resumed and not losses_alone:
            manager = checkpoints.open_manager(workdir)
            with checkpoints.closing(manager, workdir):
                checkpoints.save(manager, state, loader.get_state())
    if resumed:
        other, place, _ = checkpoints.restore_newest(
            workdir, checkpoints.placed(abstract, shardings)
        )
        loader.set_state(place)
        resumed = next_loss(other)[1]
    loader.close()
    if losses_alone:
        return {"losses": losses}
    pipeline = of_run(settings, tokenizer, state.ema, mesh=mesh, programs=workdir / "programs")
    image = pipeline.text_to_image(["a large red circle"] * 8, seed=0)
    largest = max(jax.tree.leaves(state.opt_state), key=lambda leaf: leaf.size)
    return {
        "losses": losses,
        "resumed": resumed,
        "image": image.tolist(),
        "opt_share": largest.addressable_shards[0].data.size / largest.size,
    }


if __name__ == "__main__":
    starts: list[TrainState] = []
    out, workdir, config, *meshes = sys.argv[1:]
    settings, alone = parse(json.loads(pathlib.Path(config).read_text())), len(meshes) == 1
    results = {name: run(settings, name, pathlib.Path(workdir), starts, alone) for name in meshes}
    with open(out, "w") as file:
        json.dump(results, file)
