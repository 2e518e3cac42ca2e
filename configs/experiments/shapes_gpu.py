"""Two objects at a budget that obeys captions as a whole: 384,000 pictures for a network of 5 M parameters.

A cell took 6 minutes on an H100 that seven shared; it is about two hours of a CPU core.

    XLA_FLAGS=--xla_gpu_deterministic_ops=true python -m contextdiff_jax.experiment --plan=configs/experiments/shapes_gpu.py
"""

import dataclasses

from configs.experiments import shapes_one
from contextdiff_jax.experiments.plan import Plan

PARTS = {
    f"held-out, {name}": f"held-out combinations, ddim, guidance best/{name}" for name in ("colour", "shape", "relation")
}


def get_plan() -> Plan:
    """`shapes_one` with two objects, wider, and with the caption at 8x8, too: which object is which takes longer to learn."""
    plan = shapes_one.get_plan()
    config = {name: dict(section) if isinstance(section, dict) else section for name, section in plan.config.items()}
    config["data"] |= {"num_objects": (2, 2), "num_workers": 1}
    config["train"] |= {
        "steps": 3000, "batch_size": 128, "learning_rate": 2e-3, "warmup_steps": 100, "checkpoint_every": 3000, "ema_decay": 0.999
    }
    config["model"] |= {
        "block_out_channels": (32, 64, 128),
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    }
    names = ("held-out, exact", "held-out, guidance 1", "seen, exact", "seen, FID", "bits/dim", "held-out, true context")
    return dataclasses.replace(
        plan,
        title="Two objects, a larger budget",
        about=f"{plan.about} Run with `XLA_FLAGS=--xla_gpu_deterministic_ops=true`; no cell was run twice.",
        config=config,
        variants=shapes_one.VARIANTS | shapes_one.MIDDLE_GAIN,
        headline={name: plan.headline[name] for name in names} | PARTS,
        options=plan.options | {"samplers": {"ddim": 25}},
        more_seeds={},
    )
