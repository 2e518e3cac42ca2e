"""Rematerialisation: what a block of a network keeps for its backward pass, and what is computed
again there.

Activations of a UNet's blocks, not its parameters, fill a chip: at Stable Diffusion's size 17 GiB
at 8 pictures a chip. The convolutions' and products' outputs cost the most to compute again; what
lies between them (normalisations, activations, the attention's weights) costs a reading of memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from flax import nnx

from contextdiff_jax.models.flash import RESIDUALS

_KERNELS = jax.checkpoint_policies.save_only_these_names(RESIDUALS)


def _products(primitive: jax.extend.core.Primitive, *_, **params) -> bool:
    """Outputs of convolutions and of products with parameters (which have no batch dimensions; q
    k^T has).
    """
    if primitive.name == "dot_general":
        return not any(params["dimension_numbers"][1])
    return primitive.name == "conv_general_dilated"


# train.remat: what of a block's inside is kept beside its inputs. `none`: everything, nothing is
# computed again.
POLICIES: dict[str, Callable | None] = {
    "none": None,
    "products": jax.checkpoint_policies.save_from_both_policies(_products, _KERNELS),
    "kernels": _KERNELS,
    "blocks": jax.checkpoint_policies.nothing_saveable,
}


def recomputed(method: Callable, module: nnx.Module, *arguments, policy: Callable | None = None):
    """method(module, *arguments), whose activations the backward pass computes anew, but for what
    `policy` keeps. Not `nnx.remat`, which writes the parameters back: inside a scan they belong to
    another trace.
    """
    graph, state = nnx.split(module)
    return jax.checkpoint(
        lambda state, *rest: method(nnx.merge(graph, state), *rest), policy=policy
    )(state, *arguments)


def from_arguments(function: Callable) -> Callable:
    """An element-wise `function`, of which the backward pass keeps nothing but the arguments.

    Between the two scans over stacked layers XLA can't compute anything again by itself: every
    intermediate result is written for each layer, and read. Of GELU's tanh form there are six, as
    wide as the MLP inside.
    """
    return jax.checkpoint(function, prevent_cse=False)  # written out, XLA may do as it likes


def rematerialised(call: Callable) -> Callable:
    """A block's `__call__(self, *arrays)` that keeps what the policy named `self.remat` says."""

    @functools.wraps(call)
    def wrapped(self: nnx.Module, *arrays):
        policy = POLICIES[self.remat]
        return (
            call(self, *arrays)
            if policy is None
            else recomputed(call, self, *arrays, policy=policy)
        )

    return wrapped


def configure(network: nnx.Module, *, remat: str, attention: str, unroll: bool = False) -> None:
    """Chooses what the blocks inside keep, what computes their self-attention, and whether layers
    that are alike are written out.
    """
    for _, module in nnx.iter_modules(network):
        if hasattr(module, "remat"):
            module.remat = remat
        if hasattr(module, "self_attention"):
            module.self_attention = attention
        if hasattr(module, "unroll"):
            module.unroll = unroll
