"""The precision of a network: one decision, handed from the network down to its layers."""

from __future__ import annotations

import dataclasses
from typing import TypedDict

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


class Policy(TypedDict):
    """The keywords that blocks hand down to their layers as `**policy`."""

    dtype: DTypeLike
    param_dtype: DTypeLike
    rngs: nnx.Rngs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """The types of a network's numbers. Statistics of normalisations and softmax are float32.

    Attributes:
      params: of the stored parameters.
      compute: of products and activations.
      output: of what a UNet or an autoencoder returns.
    """

    params: DTypeLike = jnp.float32
    compute: DTypeLike = jnp.float32
    output: DTypeLike = jnp.float32

    def policy(self, rngs: nnx.Rngs) -> Policy:
        """The keywords that a layer is built with, under Flax's names."""
        return {"dtype": self.compute, "param_dtype": self.params, "rngs": rngs}
