"""The floating-point operations of a traced program: what its matrix products and convolutions
multiply and add, over all devices.

XLA's own count has a loop's body once, whatever its number of turns: of stacked layers it sees one,
of attention in tiles one tile. And its count of a GPU's program leaves out the calls of cuDNN and
cuBLAS. So they are counted before XLA, in the program as JAX has traced it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters import partial_eval
from jax.stages import Traced


def count_operations(traced: Traced) -> int:
    """Twice the multiplications, those of what is computed again in the backward pass too.

    A kernel's padding counts (attention on a TPU), a convolution's doesn't. A loop whose number of
    turns isn't known before it runs is counted once.
    """
    return _count(traced.jaxpr.jaxpr)


def _count(jaxpr: Jaxpr) -> int:
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # gradients nobody reads
    return sum(_COUNTS.get(eqn.primitive.name, _count_inside)(eqn) for eqn in used.eqns)


def _count_inside(eqn: JaxprEqn) -> int:
    """Those of the programs that the equation runs, each once."""
    return sum(
        _count(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)
        for value in eqn.params.values()
        for inner in (value if isinstance(value, tuple | list) else (value,))
        if isinstance(inner, ClosedJaxpr | Jaxpr)
    )


def _of_product(eqn: JaxprEqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    inner = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    return 2 * inner * math.prod(eqn.outvars[0].aval.shape)


def _of_convolution(eqn: JaxprEqn) -> int:
    params, (x, kernel) = eqn.params, (var.aval.shape for var in eqn.invars)
    out, numbers = eqn.outvars[0].aval.shape, eqn.params["dimension_numbers"]
    pairs = 1  # of a place in the output and one in the kernel that meet at a value of x
    for i, (low, _) in enumerate(params["padding"]):
        spread = params["lhs_dilation"][i]
        places = np.arange(out[numbers.out_spec[2 + i]]) * params["window_strides"][i]
        offsets = np.arange(kernel[numbers.rhs_spec[2 + i]]) * params["rhs_dilation"][i]
        met = places[:, None] + offsets - low
        end = (x[numbers.lhs_spec[2 + i]] - 1) * spread
        pairs *= int(((met >= 0) & (met <= end) & (met % spread == 0)).sum())
    examples, features = (out[numbers.out_spec[i]] for i in range(2))
    return 2 * pairs * examples * features * kernel[numbers.rhs_spec[1]]


def _of_devices(eqn: JaxprEqn) -> int:
    """All devices' that have a part of the result of their own."""
    axes = {
        axis
        for spec in eqn.params["out_specs"]
        for entry in spec
        if entry is not None
        for axis in (entry if isinstance(entry, tuple) else (entry,))
    }
    return math.prod(eqn.params["mesh"].shape[axis] for axis in axes) * _count_inside(eqn)


def _of_kernel(eqn: JaxprEqn) -> int:
    known = [size for size in eqn.params["grid_mapping"].grid if isinstance(size, int)]
    return math.prod(known) * _count_inside(eqn)


# What isn't here counts what is inside it once.
_COUNTS: dict[str, Callable[[JaxprEqn], int]] = {
    "dot_general": _of_product,
    "conv_general_dilated": _of_convolution,
    "scan": lambda eqn: eqn.params["length"] * _count_inside(eqn),
    "cond": lambda eqn: max(_count(branch.jaxpr) for branch in eqn.params["branches"]),
    "shard_map": _of_devices,
    "pallas_call": _of_kernel,
}
