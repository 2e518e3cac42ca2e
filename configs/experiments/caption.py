"""Whose caption does r read where guidance drops the denoiser's? One object, at 16x16.

About 6 minutes a cell on one core. The cells of `true` are those of shapes_one.py.

    taskset -c 0 python -m contextdiff_jax.experiment --plan=configs/experiments/caption.py
"""

import dataclasses

from contextdiff_jax.configs.experiments import shapes_one
from contextdiff_jax.experiments.plan import Plan

TRUE = ("linear-gain0.4", "plugin")


def get_plan() -> Plan:
    """shapes_one's two contexts of most interest, each with both choices of `context.caption`."""
    plan = shapes_one.get_plan()
    variants = {}
    for name in TRUE:
        variants[name] = plan.variants[name]
        variants[f"{name}-dropped"] = plan.variants[name] | {"context.caption": "dropped"}
    return dataclasses.replace(
        plan,
        title="Whose caption r reads without the denoiser's",
        verdict=(
            "**No difference was seen in three pairs of each.** With `plugin`, `dropped` obeys "
            "3 points more of the held-out captions [-4, 9] and 3 fewer without guidance [-8, "
            "3]; with `linear-gain0.4` 2 fewer [-27, 23], for its pairs lie far apart on both "
            "sides. The default stays `true`."
        ),
        about=(
            "With `true` r reads the true caption where training hides it from the denoiser, so "
            "the denoiser without a caption sees the caption through x_t. With `dropped` r reads "
            "the empty caption there. All else is shapes_one's."
        ),
        variants=variants,
        seeds=3,
        more_seeds={},
        baselines=TRUE,
    )
