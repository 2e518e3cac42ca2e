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
            "**No verdict yet:** one pair of six, too few to tell the two apart. In it `dropped` "
            "obeys 54% of the held-out captions against 48%, and 50% against 45% without guidance."
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
