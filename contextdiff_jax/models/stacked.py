"""Layers that are alike as one: an array holds a parameter of all of them, and a scan runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from contextdiff_jax.models.remat import POLICIES
from contextdiff_jax.models.undrawn import Undrawn
from contextdiff_jax.parallel.mesh import gathered


class Stacked(nnx.Module):
    """`count` modules that `make(rngs)` gives, one after the other.

    Their parameters have a leading axis of `count`. On a mesh each layer's are gathered when its
    turn comes (`parallel.mesh.gathered` leaves them as they lie). `remat`: what a layer keeps for
    the backward pass (models.remat); with `none` the gathered kernels of all layers are among it.
    `unroll`: writes the layers out, one by one.
    """

    remat = "none"
    unroll = False

    def __init__(
        self,
        make: Callable[[nnx.Rngs], nnx.Module],
        count: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        self.dtype = dtype
        graph, _ = nnx.split(nnx.eval_shape(lambda: make(Undrawn())))
        keys = jax.random.split(rngs.params(), count)
        states = jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key)), nnx.Param))(keys)
        self.layers = nnx.merge(graph, states)

    def __call__(self, carry: tuple, *rest: Any) -> tuple:
        """The last layer's output: `carry = layer(*carry, *rest)`, for each."""
        graph, states = nnx.split(self.layers)

        def layer(carry: tuple, state: nnx.State) -> tuple[tuple, None]:
            return nnx.merge(graph, gathered(state, self.dtype))(*carry, *rest), None

        policy = POLICIES[self.remat]
        layer = layer if policy is None else jax.checkpoint(layer, policy=policy)
        return jax.lax.scan(layer, carry, states, unroll=self.unroll)[0]
