"""How good are pictures by each solver, by the number of evaluations? Trained models at 16x16.

About 40 minutes a cell on one core.

    taskset -c 0 python -m contextdiff_jax.experiment --plan=configs/experiments/solvers.py
"""

from contextdiff_jax.configs.experiments import flow_one, shapes_one
from contextdiff_jax.experiments.plan import Plan

NUMBERS = (4, 8, 12, 25)
# Heun's method evaluates 2 S - 1 times in S steps.
HEUN = {f"heun, {2 * steps - 1}": ("heun", steps) for steps in (2, 4, 6, 13)}
SAMPLERS = {
    "ddim, 50": ("ddim", 50),
    **{
        f"{name}, {number}": (name, number)
        for name in ("ddim", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "unipc")
        for number in NUMBERS
    },
    **HEUN,
    **{f"dpmpp_2m_sde, {number}": ("dpmpp_2m_sde", number) for number in (8, 12, 25)},
    **{f"ddpm, {number}": ("ddpm", number) for number in (8, 12, 25)},
}
# As flow_one's of the same names; the last one is the first edition's best.
VARIANTS = {
    "flow": flow_one.PLAIN | {"diffusion.schedule": "flow"},
    "flow-context": flow_one.LINEAR | {"diffusion.schedule": "flow"},
    "cosine-context": shapes_one.VARIANTS["linear"] | {"context.max_gain": 0.4},
}


def get_plan() -> Plan:
    """The model, the data and the number of steps of `shapes_one`; guidance 2, one seed."""
    before = shapes_one.get_plan()
    return Plan(
        title="Solvers on trained models",
        verdict=(
            "**8 to 12 evaluations of a better solver give what 50 steps of DDIM give, with a "
            "context as without.** On the plain straight path 8 of DPM-Solver++(3M) have FID "
            "9.5 and obey 37% of the held-out captions, 50 of DDIM 9.4 and 33%. With the "
            "context on it, 8 of DPM-Solver++(2M, SDE) have 10.6 and 53%, 50 of DDIM 10.7 and "
            "41%. With the context on the first edition's path, 8 of DPM-Solver++(3M) have 9.5 "
            "and 43%, 12 of its SDE form 8.7 and 48%, 50 of DDIM 9.3 and 45%. One training "
            "each, 128 captions a split: a share is known to ±4 points."
        ),
        about=(
            "One training each; 128 captions a split, guidance 2, times `trailing`. Asked: with "
            "how many evaluations of the network does each solver draw as many held-out captions "
            "exactly as DDIM does in 50, and with what FID (of a classifier's features)."
        ),
        kind="pictures",
        config=before.config,
        variants=VARIANTS,
        headline={
            "held-out, exact, ddim 50": "held-out combinations, ddim, 50, guidance best/exact",
            "held-out, exact, unipc 12": "held-out combinations, unipc, 12, guidance best/exact",
            "held-out, exact, ddim 12": "held-out combinations, ddim, 12, guidance best/exact",
        },
        curves={
            "held-out, exact": "held-out combinations, {}, guidance best/exact",
            "seen, FID": "seen combinations, {}, guidance best/fid",
        },
        seeds=1,
        baselines=(),
        options=dict(
            num=128,
            guidances=(2.0,),
            scales=("best",),
            validation=8,
            samplers=SAMPLERS,
            true_context=False,
            classifier=1000,
            bound=0,
            bound_timesteps=0,
        ),
    )
