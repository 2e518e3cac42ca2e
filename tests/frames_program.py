"""Prints, as JSON, how far a tuning step's gradient, an inversion and an edit with the frames over
8 devices are from those on one, and which share of one device's operations each of the 8 has.

    python tests/frames_program.py unet|mmdit
"""

import json
import sys

import jax
import numpy as np
from edit_settings import edit_settings
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from contextdiff_jax.editing.attention import align
from contextdiff_jax.editing.stages import make_stages
from contextdiff_jax.editing.tuning import trainable, tuning_loss
from contextdiff_jax.editing.video_model import open_editor
from contextdiff_jax.parallel.mesh import AXES, FRAME_RULES, tracing_for


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

    stages = make_stages(nnx.graphdef(editor.model), editor.process, settings)
    texts = editor.encode_text([settings.video.prompt, *settings.video.edit_prompts])
    count, length = editor.count_tokens, editor.text_length
    words = align(settings.video.prompt, settings.video.edit_prompts, count, length, settings.edit)

    def run(params, x0):
        def loss_fn(params):
            model = nnx.merge(graph, params, frozen)
            return tuning_loss(
                model, editor.process, x0, text, null, jax.random.key(0), settings.base.train, 0
            )

        state = nnx.state(nnx.merge(graph, params, frozen))
        path = stages.inversion(state, x0, text)
        clips, _ = stages.editing(state, path, texts, null, words)
        return *jax.value_and_grad(loss_fn)(params), path, clips

    def compiled(devices, place):
        mesh = Mesh(np.array(devices).reshape(1, 1, -1, 1), AXES)
        x = jax.device_put(x0, NamedSharding(mesh, place))
        given = jax.device_put(params, NamedSharding(mesh, P()))
        with tracing_for(mesh, FRAME_RULES):
            program = jax.jit(run).lower(given, x).compile()
        return program(given, x), program.cost_analysis()["flops"]

    one, whole = compiled(jax.devices()[:1], P())
    many, share = compiled(jax.devices(), P(None, "sequence"))
    errors = [
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(a)).max())
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
                "share": share / whole,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
