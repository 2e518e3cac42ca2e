"""Prints, as JSON, how far a tuning step's gradient and an inversion with the frames over 8 devices
are from those on one.

    python tests/frames_program.py unet|mmdit
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from edit_settings import edit_settings
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from contextdiff_jax.editing.inversion import invert
from contextdiff_jax.editing.tuning import trainable, tuning_loss
from contextdiff_jax.editing.video_model import open_editor


def main(kind: str) -> None:
    """Both, of a tiny model of that kind with every branch awake, on eight frames."""
    # of the kind of context whose parameters all have a gradient
    changes = {"edit.steps": 2, "train.batch_size": 1, "context.kind": "cross_attention"}
    settings = edit_settings(kind, **changes)
    editor = open_editor(settings)
    rng = np.random.default_rng(0)
    for leaf in jax.tree.leaves(
        nnx.state(editor.model, nnx.Param), is_leaf=lambda v: isinstance(v, nnx.Variable)
    ):
        leaf.set_value(
            leaf.get_value() + 0.1 * rng.standard_normal(leaf.get_value().shape).astype(np.float32)
        )
    x0 = editor.encode(rng.integers(0, 256, (8, 8, 8, 3)).astype(np.uint8))
    text, null = editor.encode_text([settings.video.prompt]), editor.encode_text([""])
    graph, params, frozen = nnx.split(editor.model, trainable("temporal"), ...)

    def run(params, x0):
        def loss_fn(params):
            model = nnx.merge(graph, params, frozen)
            return tuning_loss(
                model, editor.process, x0, text, null, jax.random.key(0), settings.base.train, 0
            )

        path = invert(
            nnx.merge(graph, params, frozen),
            editor.process,
            x0,
            text,
            settings.video,
            settings.edit,
        )
        return *jax.value_and_grad(loss_fn)(params), path

    mesh = Mesh(np.array(jax.devices()), ("sequence",))
    sharded = jax.device_put(x0, NamedSharding(mesh, P(None, "sequence")))
    one, many = jax.jit(run)(params, x0), jax.jit(run)(params, sharded)
    errors = [
        float(jnp.abs(a - b).max() / jnp.abs(a).max())
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True)
    ]
    split = len(many[2].sharding.device_set)
    print(
        json.dumps(
            {
                "devices": jax.device_count(),
                "error": max(errors),
                "values": len(errors),
                "output_devices": split,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
