"""Does a context help on a straight path, and with how few evaluations? One object, at 16x16.

Everything below was fixed before the first cell ran. About 8 minutes a cell on one core.

    taskset -c 0 python -m contextdiff_jax.experiment --plan=configs/experiments/flow_one.py
"""

from contextdiff_jax.configs.experiments import shapes_one
from contextdiff_jax.configs.shapes_flow import METHODS
from contextdiff_jax.experiments.plan import Plan

# All networks predict in the units of x0, with the same weight at every time: x0 itself, or M, the
# point that the velocity of the flow leads to, which is x0 without a context.
PLAIN, LINEAR = METHODS["plain"], METHODS["plugin"]
VARIANTS = {
    "plain": PLAIN,
    "car-flow": METHODS["car_flow"],
    "csfm": METHODS["csfm"],
    "plugin": {
        "context.kind": "cross_attention",
        "context.shift": "quadratic",
        "diffusion.prediction_type": "x0",
    },
    "linear-gain0.4": LINEAR,
    "velocity": METHODS["velocity"],
    "velocity-fixed": METHODS["velocity"] | {"context.fixed_target": True},
}

HELD_OUT, SEEN = "held-out combinations", "seen combinations"


def get_plan() -> Plan:
    """The model, the data and the number of steps of `shapes_one`, on the path `flow`."""
    before = shapes_one.get_plan()
    config = dict(before.config)
    config["diffusion"] = config["diffusion"] | {"schedule": "flow"}
    return Plan(
        title="One object, on a straight path",
        verdict=(
            "**No verdict here: `flow_muon` asks the same by an optimizer that learns it from "
            "fewer pictures, and is finished.** Of these 56 trainings four are finished, and "
            "seeds differ by more than the variants are likely to."
        ),
        about=(
            "Rectified flow, x_t = (1 - t) x0 + t (1 - t) r + t e. `plain` has no r; `car-flow` "
            "shifts both ends by the text; `csfm` begins at a Gaussian of the text; `plugin` and "
            "`linear-gain0.4` are ContextDiff with r of the estimate of x0; `velocity` needs no "
            "estimate of r (`velocity-fixed`: r is trained by x_t alone, not by the target). Equal "
            "steps, records and denoiser; 8 seeds each, compared seed by seed. Asked first: of the "
            "held-out captions, how many are drawn exactly by 8 evaluations of the network, at "
            "guidance 1 and at the best of 1, 2, 4 on 96 validation captions (chosen at 25 "
            "evaluations, Euler's method, as all but the column of DPM-Solver++). Then by 4 and "
            "25, FID, the flow's likelihood, and time. The same on the path of the first edition: "
            "shapes_one.md, `none`, `text-prior`, `linear-gain0.4`."
        ),
        kind="pictures",
        config=config,
        variants=VARIANTS,
        headline={
            "held-out, 8": f"{HELD_OUT}, 8, guidance best/exact",
            "held-out, 8, guidance 1": f"{HELD_OUT}, 8, guidance 1/exact",
            "held-out, 4": f"{HELD_OUT}, 4, guidance best/exact",
            "held-out, 4, guidance 1": f"{HELD_OUT}, 4, guidance 1/exact",
            "held-out, 25": f"{HELD_OUT}, 25, guidance best/exact",
            "held-out, 25, guidance 1": f"{HELD_OUT}, 25, guidance 1/exact",
            "held-out, 8 of dpmpp_2m": f"{HELD_OUT}, 8 of dpmpp_2m, guidance best/exact",
            "seen, 25": f"{SEEN}, 25, guidance best/exact",
            "seen, FID, 8": f"{SEEN}, 8, guidance best/fid",
            "seen, FID, 25": f"{SEEN}, 25, guidance best/fid",
            "bits/dim": f"bound/{SEEN}",
        },
        seeds=8,
        baselines=("plain", "linear-gain0.4"),
        options=dict(
            num=192,
            guidances=(1.0, 2.0, 4.0),
            validation=96,
            samplers={
                "25": ("ddim", 25),
                "8": ("ddim", 8),
                "4": ("ddim", 4),
                "8 of dpmpp_2m": ("dpmpp_2m", 8),
            },
            true_context=False,
            classifier=1000,
            bound=64,
            bound_timesteps=32,
        ),
    )
