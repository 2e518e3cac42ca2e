"""Two objects at a budget that obeys whole captions: 384,000 pictures, 5 M parameters.

A cell took 6 minutes on an H100 that seven shared. Not run on a CPU: a quarter of a step's pictures
took half a second of a core.

    XLA_FLAGS=--xla_gpu_deterministic_ops=true \\
        python -m contextdiff_jax.experiment --plan=configs/experiments/shapes_gpu.py
"""

import dataclasses

from contextdiff_jax.configs.experiments import shapes_one
from contextdiff_jax.experiments.plan import Plan, changed

SEEN = "seen combinations, ddim, guidance best"
PARTS = {"seen, true context": f"{SEEN}, true context/exact", "seen, relation": f"{SEEN}/relation"}
BUDGET = {
    "data.num_objects": (2, 2),
    "data.num_workers": 1,
    "train.steps": 3000,
    "train.batch_size": 128,
    "train.checkpoint_every": 3000,
    "train.learning_rate": 2e-3,
    "train.warmup_steps": 100,
    "train.ema_decay": 0.999,
    "model.block_out_channels": (32, 64, 128),
    "model.down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "model.up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
}


def get_plan() -> Plan:
    """`shapes_one` with two objects, which take longer to tell apart: wider, with text at 8x8."""
    plan = shapes_one.get_plan()
    names = (
        "held-out, exact",
        "held-out, guidance 1",
        "seen, exact",
        "seen, FID",
        "bits/dim",
        "held-out, true context",
    )
    return dataclasses.replace(
        plan,
        title="Two objects, a larger budget",
        about=f"{plan.about} Run with `XLA_FLAGS=--xla_gpu_deterministic_ops=true`; "
        "no cell was run twice.",
        config=changed(plan.config, BUDGET),
        variants=shapes_one.VARIANTS | shapes_one.MIDDLE_GAIN,
        headline={name: plan.headline[name] for name in names} | PARTS,
        options=plan.options | {"samplers": {"ddim": 25}},
        more_seeds={},
    )
