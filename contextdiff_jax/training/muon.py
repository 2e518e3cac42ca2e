"""Muon (Jordan, 2024), whose matrices the devices share.

A kernel moves by the orthogonal matrix next to its gradients' momentum. The products that make it
take the same time for any batch: done by each device for itself, 40% of the quickstart's step. So
matrices of one shape are one batch, of which each device has its share.
"""

from __future__ import annotations

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from contextdiff_jax.parallel.mesh import current_target, is_stacked, path_name

MOMENTUM = 0.95
STEPS = 4  # with rows scaled first as good as five without (Boissin et al., 2025)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: steep at 0, so that small values grow fast
ADAMW_RMS = 0.2  # root mean square of AdamW's moves at a learning rate of 1, about


def muon(
    learning_rate: optax.Schedule, *, b1: float, b2: float, weight_decay: float
) -> optax.GradientTransformation:
    """Kernels by Muon at the size of AdamW's moves (Liu et al., 2025), so that the learning rate
    means the same for both; all else by AdamW, whose `b1` and `b2` are.
    """
    kernels = optax.chain(
        optax.trace(MOMENTUM, nesterov=True),
        optax.stateless(lambda updates, params: orthogonal(updates)),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    rest = optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay)
    return optax.partition({"kernels": kernels, "rest": rest}, _labels)


def _labels(params: PyTree) -> PyTree:
    def one(path, leaf) -> str:
        return "kernels" if path_name(path).endswith("/kernel") else "rest"

    return jax.tree_util.tree_map_with_path(one, params)


def orthogonal(kernels: PyTree) -> PyTree:
    """The orthogonal matrix next to each kernel's, its entries' root mean square `ADAMW_RMS`.

    A kernel is the matrix of all that an output reads; one of stacked layers is as many matrices.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(kernels)
    groups = collections.defaultdict(list)  # (number of the kernel, its matrices) by their shape
    for number, (path, kernel) in enumerate(leaves):
        layers = len(kernel) if is_stacked(path_name(path)) else 1
        matrices = kernel.reshape(layers, -1, kernel.shape[-1])
        groups[tuple(sorted(matrices.shape[1:]))].append((number, matrices))
    moves = [kernel for _, kernel in leaves]
    for members in groups.values():
        batch = jnp.concatenate([_wide(matrices) for _, matrices in members])
        ends = np.cumsum([len(matrices) for _, matrices in members])[:-1]
        for (number, matrices), move in zip(
            members, jnp.split(_orthogonal(batch), ends), strict=True
        ):
            move = move if move.shape == matrices.shape else move.mT
            moves[number] = move.reshape(moves[number].shape)
    return jax.tree.unflatten(treedef, moves)


def _wide(x: Float[Array, "K M N"]) -> Float[Array, "K A B"]:
    """Matrices with their shorter side first: that of the products."""
    return x.mT if x.shape[1] > x.shape[2] else x


def _orthogonal(x: Float[Array, "K M N"]) -> Float[Array, "K M N"]:
    """`orthogonal` of matrices with no more rows than columns, a share on each device."""
    count, mesh = len(x), current_target().mesh
    if mesh is not None:
        x = jnp.pad(x, ((0, -count % mesh.size), (0, 0), (0, 0)))
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(mesh.axis_names)))
    a, b, c = COEFFICIENTS
    square = x @ x.mT
    scale = jax.lax.rsqrt(jnp.maximum(jnp.abs(square).sum(-1, keepdims=True), 1e-30))
    x, square = x * scale, square * scale * scale.mT
    for step in range(STEPS):
        square = x @ x.mT if step else square
        x = a * x + (b * square + c * square @ square) @ x
    return x[:count] * (ADAMW_RMS * math.sqrt(x.shape[-1]))
