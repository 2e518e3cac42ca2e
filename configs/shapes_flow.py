"""`shapes_16` on the straight path, rectified flow, by the method of your choice.

    python -m contextdiff_jax.train --config=configs/shapes_flow.py --workdir=runs/flow
    python -m contextdiff_jax.train --config=configs/shapes_flow.py:csfm --workdir=runs/csfm

`velocity` (the default), `posterior_mean` and `plugin` are ContextDiff, by what the reverse process
knows of r; `plain` has none; `car_flow` and `csfm` are other people's (docs/mathematics.md). The
network predicts in the units of x0, which weighs the times as `configs/shapes_16.py` does.
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import shapes_16
from contextdiff_jax.runtime.fields import check_choice

X0, M = {"diffusion.prediction_type": "x0"}, {"diffusion.prediction_type": "data"}
LINEAR = {"context.kind": "linear", "context.max_gain": 0.4}
METHODS = {
    "velocity": M | LINEAR | {"context.estimate": "velocity"},
    "posterior_mean": M | LINEAR | {"context.estimate": "posterior_mean"},
    "plugin": X0 | LINEAR,
    "plain": X0 | {"context.kind": "none", "context.shift": "none"},
    "car_flow": X0
    | {"context.kind": "two_ends", "context.shift": "constant", "context.max_gain": 1.0},
    # The authors' weights are 5 and 1 beside an error of the velocity; ours, of x0, is a tenth.
    "csfm": M
    | {
        "context.kind": "gaussian_source",
        "context.shift": "prior",
        "context.max_gain": 1.0,
        "context.estimate": "velocity",
        "context.variance_kl": 0.5,
        "context.alignment": 0.1,
    },
}


def get_config(method: str = "velocity") -> ConfigDict:
    """shapes_16 on `flow`, by one of METHODS."""
    check_choice("configs/shapes_flow.py:METHOD", method, METHODS)
    config = shapes_16.get_config()
    config.update_from_flattened_dict({"diffusion.schedule": "flow"} | METHODS[method])
    return config
