"""A toy whose answer is known: 25 points in the plane, the exact Bayes denoiser and a learned one.

Under a minute a cell.

    taskset -c 0 python -m contextdiff_jax.experiment --plan=configs/experiments/toy.py
"""

import dataclasses

from contextdiff_jax.experiments.plan import Plan
from contextdiff_jax.experiments.toy_config import ToyConfig


def get_plan() -> Plan:
    """`exact-*`: a given context, no network. The others: denoiser and context learned together."""
    exact = {"denoiser": "exact"}
    means = {"estimate": "posterior_mean"}
    return Plan(
        title="A toy in the plane",
        about="",
        kind="toy",
        config=dataclasses.asdict(ToyConfig()),
        variants={
            "none": {"shift": "none"},
            "text-prior": {"kind": "text", "shift": "prior"},
            "linear": {"kind": "linear"},
            "affine": {"kind": "affine"},
            "bilinear": {"kind": "bilinear"},
            "plugin": {"kind": "mlp"},
            "posterior_mean": {"kind": "mlp"} | means,
            "affine-gain4": {"kind": "affine", "max_gain": 4.0},
            "linear-gain0.4": {"kind": "linear", "max_gain": 0.4},
            "plugin-time": {"kind": "mlp", "time_dependent": True},
            "posterior_mean-head": {"kind": "mlp", "head_width": 128} | means,
            "exact-none": exact | {"shift": "none"},
            "exact-text-prior": exact | {"kind": "text", "shift": "prior"},
            "exact-linear": exact | {"kind": "linear"},
            "exact-plugin": exact | {"kind": "sine"},
            "exact-posterior_mean": exact | {"kind": "sine"} | means,
        },
        headline={
            "TV, DDIM": "ddim/tv",
            "TV, DDPM": "ddpm/tv",
            "TV of true draws": "floor/tv",
            "off the points, DDIM": "ddim/off",
            "KL, bits/dim": "bits/kl",
        },
        seeds=5,
        options=dict(num=1000, bound=40, samplers={"ddim": 100, "ddpm": 100}),
    )
