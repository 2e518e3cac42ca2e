"""Does a context in both processes help composition? Two objects, at 16x16.

An eighth of the combinations is held out. About 11 minutes a cell on one quiet core.

    taskset -c 0 python -m contextdiff_jax.experiment --plan=configs/experiments/shapes.py
"""

import dataclasses

from contextdiff_jax.configs.experiments import shapes_one
from contextdiff_jax.experiments.plan import Plan, changed

# After 80,000 pictures hardly any caption is obeyed as a whole: its parts say more.
PARTS = {
    f"held-out, {name}": f"held-out combinations, ddim, guidance 1/{name}"
    for name in ("colour", "shape", "size", "relation", "count")
} | {"seen, colour": "seen combinations, ddim, guidance 1/colour"}


def get_plan() -> Plan:
    """`shapes_one` with two objects, which take longer to tell apart: 80,000 pictures."""
    plan = shapes_one.get_plan()
    variants = shapes_one.VARIANTS | shapes_one.MIDDLE_GAIN
    config = changed(
        plan.config, {"data.num_objects": (2, 2), "train.steps": 5000, "train.batch_size": 16}
    )
    kept = ("held-out, exact", *PARTS, "bits/dim", "held-out, true context")
    headline = {name: (plan.headline | PARTS)[name] for name in kept}
    return dataclasses.replace(
        plan,
        title="Two objects",
        config=config,
        variants=variants,
        more_seeds={},
        headline=headline,
    )
