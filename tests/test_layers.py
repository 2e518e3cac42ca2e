"""The formulations that were chosen for their speed, with their gradients, against torch's plain
ones in float64.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from contextdiff_jax.models.attention import attention, tiled_attention
from contextdiff_jax.models.layers import gelu, linear
from contextdiff_jax.models.remat import POLICIES

RNG = np.random.default_rng(0)


def compare(ours, theirs, *arrays, tolerance=1e-5):
    """The outputs and the gradients, by each argument, of a weighted sum of them."""
    tensors = [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in arrays]
    expected = theirs(*tensors)
    weights = RNG.standard_normal(expected.shape)
    (expected * torch.tensor(weights)).sum().backward()
    out, pullback = jax.vjp(ours, *(jnp.asarray(array, jnp.float32) for array in arrays))
    pairs = [
        (out, expected.detach()),
        *zip(pullback(jnp.asarray(weights, jnp.float32)), (t.grad for t in tensors), strict=True),
    ]
    for found, wanted in pairs:
        np.testing.assert_allclose(
            found, wanted.numpy(), atol=tolerance * float(wanted.abs().max())
        )


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("features", [(6, 10), (10, 6), (8, 8)], ids=["widens", "narrows", "keeps"])
def test_a_linear_layer_and_its_gradients(shape, features):
    layer = linear(*features, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    graph, _ = nnx.split(layer)

    def ours(x, kernel, bias):
        return nnx.merge(graph, nnx.State({"kernel": nnx.Param(kernel), "bias": nnx.Param(bias)}))(
            x
        )

    arrays = (RNG.standard_normal(s) for s in ((*shape, features[0]), features, features[1:]))
    compare(ours, lambda x, kernel, bias: x @ kernel + bias, *arrays)


@pytest.mark.parametrize("keys", [7, 3])
def test_attention_and_its_gradients_with_a_mask_and_a_bias(keys):
    mask = np.array([[True] * keys, [True] * (keys - 2) + [False] * 2])
    bias = RNG.standard_normal((2, 5, keys))

    def theirs(q, k, v):
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        hidden = torch.tensor(bias).masked_fill(~torch.tensor(mask)[:, None, None], float("-inf"))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, hidden).transpose(1, 2)

    ours = functools.partial(attention, mask=jnp.asarray(mask), bias=jnp.asarray(bias))
    compare(ours, theirs, *(3 * RNG.standard_normal((2, n, 2, 4)) for n in (5, keys, keys)))


def test_attention_of_large_logits_is_finite_and_picks_one_key():
    q, v = (jnp.asarray(RNG.standard_normal((1, 3, 1, 4)), jnp.float32) for _ in range(2))
    # Every query is nearest to its own key; exp of 5000 overflows.
    q = 100 * q / jnp.linalg.norm(q, axis=-1, keepdims=True)
    out, pullback = jax.vjp(attention, q, q, v)
    np.testing.assert_allclose(out, v, rtol=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in pullback(v))


# Fewer than a tile, one, and no whole number of them.
@pytest.mark.parametrize("queries", [5, 128, 301])
def test_tiled_attention_and_its_gradients(queries):
    def theirs(*qkv):
        q, k, v = (y.transpose(1, 2) for y in qkv)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.7).transpose(1, 2)

    arrays = (RNG.standard_normal((2, n, 3, 4)) for n in (queries, 7, 7))
    compare(functools.partial(tiled_attention, scale=0.7), theirs, *arrays)


@pytest.mark.parametrize("policy", ["products", "kernels"])
def test_a_rematerialised_block_keeps_no_logits_of_tiled_attention(policy):
    shapes = [jax.ShapeDtypeStruct((1, n, 1, 4), jnp.float32) for n in (256, 200, 200)]
    call = jax.checkpoint(tiled_attention, policy=POLICIES[policy])
    kept = jax.eval_shape(lambda *qkv: jax.vjp(call, *qkv)[1], *shapes)
    assert 0 < max(leaf.size for leaf in jax.tree.leaves(kept)) < 128 * 200


def test_gelu_is_the_exact_one():
    compare(gelu, torch.nn.functional.gelu, np.linspace(-12, 12, 1001))


def test_a_rematerialised_layer_keeps_its_gradients():
    """A rule of one's own for the gradient must do under jax.checkpoint, as train.remat uses it."""
    layer = linear(6, 4, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    x = jnp.asarray(RNG.standard_normal((3, 6)), jnp.float32)

    def loss(state):
        return (nnx.merge(graph, state)(x) ** 2).sum()

    for policy in (None, jax.checkpoint_policies.dots_saveable):
        again = jax.grad(jax.checkpoint(loss, policy=policy))(state)
        chex.assert_trees_all_equal(again, jax.grad(loss)(state))


def test_two_layers_alike_have_equal_graphs():
    """Or what nnx.jit compiled for one would be compiled again for the other."""
    first, second = (
        nnx.split(linear(6, 4, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)))[0]
        for _ in range(2)
    )
    assert first == second and hash(first) == hash(second)
