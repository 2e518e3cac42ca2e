"""How good is the estimate of the context, and does a better one obey the captions better?

On the runs of shapes_one.

    taskset -c 0 python -m contextdiff_jax.experiment --plan=configs/experiments/estimates.py
"""

import dataclasses

from contextdiff_jax.configs.experiments import shapes_one
from contextdiff_jax.experiments.plan import Plan

GUIDANCES, FACTORS = (1.0, 2.0), (1.25,)


def get_plan() -> Plan:
    """r_hat as it is, and times its regression coefficient at each t. Trains missing runs only."""
    plan = shapes_one.get_plan()
    variants = ("linear", "linear-gain0.4", "affine", "affine-gain4")
    changes = [(scale, "regressed") for scale in GUIDANCES] + [
        (1.0, f"times {factor}") for factor in FACTORS
    ]
    return dataclasses.replace(
        plan,
        title="The estimate of the context",
        about=(
            "The runs of [shapes_one](shapes_one.md). Coefficient: <r_hat, r> / <r_hat, r_hat> on "
            "noised training pictures, the factor by which r_hat is best multiplied in the mean "
            "square; 1 at every t if it is E[r | x_t]. Regressed: held-out captions obeyed exactly "
            "when r_hat is multiplied by it in every DDIM step, minus those obeyed without."
        ),
        kind="estimates",
        variants={name: plan.variants[name] for name in variants},
        headline={
            f"guidance {scale:g}, {change}": f"guidance {scale:g}/{change}, minus as it is"
            for scale, change in changes
        }
        | {f"guidance {scale:g}": f"guidance {scale:g}/as it is" for scale in GUIDANCES}
        | {f"coefficient at {t}": f"coefficient/{t}" for t in (999, 919, 839, 679)},
        more_seeds={"linear": 8, "linear-gain0.4": 8, "affine": 1, "affine-gain4": 1},
        baselines=(),
        options=dict(
            of="configs/experiments/shapes_one.py",
            num=192,
            records=256,
            steps=25,
            guidances=GUIDANCES,
            factors=FACTORS,
        ),
    )
