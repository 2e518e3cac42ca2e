"""A run's model with a larger or smaller context, or none: other weights, the same programs."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from contextdiff_jax.inference.pipeline import Pipeline
from contextdiff_jax.parallel.mesh import path_name

# r = g raw / rms, g = max_gain tanh(gamma); and the last layer of the head that estimates r.
_GAMMA = re.compile(r"^context/gamma$")
_ESTIMATE = re.compile(r"(^|/)context_head/(conv|proj_out)/(kernel|bias)$")
_NEAR_ONE = 1 - 1e-6  # the largest tanh(gamma) that float32 can undo


def largest_gain(pipeline: Pipeline) -> float:
    """Return the largest `factor` of `with_gain`, at least 1; 0 for a model without a context."""
    if pipeline.opened.process.shift == "none":
        return 0.0
    leaves = jax.tree_util.tree_leaves_with_path(pipeline.opened.weights[0])
    sizes = [abs(jnp.tanh(leaf)).max() for path, leaf in leaves if _GAMMA.match(path_name(path))]
    largest = float(max(sizes, default=0.0))
    return max(_NEAR_ONE / largest, 1.0) if largest else 0.0


def with_gain(pipeline: Pipeline, factor: float) -> Pipeline:
    """Return the same model with r, and its estimate, `factor` times as large, in the forward and
    in the reverse process; 0 is plain diffusion. Compiled programs are shared.

    Raises ValueError, one line, for a factor that `context.max_gain` doesn't allow.
    """
    largest = largest_gain(pipeline)
    if not 0 <= factor <= largest:
        raise ValueError(
            f"context gain={factor:g}: must lie in 0..{largest:.3g}, where this model's context "
            "reaches context.max_gain"
            if largest
            else f"context gain={factor:g}: this model has no context"
        )
    if factor == 1:
        return pipeline

    def scale(path: tuple, leaf: PyTree) -> PyTree:
        name = path_name(path)
        if _GAMMA.match(name):
            return jnp.arctanh(factor * jnp.tanh(leaf)).astype(leaf.dtype)
        return factor * leaf if _ESTIMATE.search(name) else leaf

    params = jax.tree_util.tree_map_with_path(scale, pipeline.opened.weights[0])
    return pipeline.with_params(params)
