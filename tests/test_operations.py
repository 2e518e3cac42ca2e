"""The count of a program's floating-point operations: XLA's where it is right, and what it leaves
out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mmdit_dict
from flax import nnx
from jax import lax

from contextdiff_jax.models.backbones import build_backbone
from contextdiff_jax.models.flash import splash_attention
from contextdiff_jax.models.layers import matmul
from contextdiff_jax.models.undrawn import Undrawn
from contextdiff_jax.parallel.mesh import MeshConfig, make_mesh, tracing_for
from contextdiff_jax.settings import parse
from contextdiff_jax.training.operations import count_operations


def counted(function, *arguments):
    return count_operations(jax.jit(function).trace(*arguments))


def of_xla(function, *arguments):
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("stride", "padding", "groups"), [(1, (1, 1), 1), (2, (0, 1), 1), (1, (1, 1), 2)]
)
def test_a_convolution_and_its_gradients_are_counted_as_xla_does(stride, padding, groups):
    x, kernel = jnp.ones((2, 9, 8, 6)), jnp.ones((3, 3, 6 // groups, 10))

    def convolve(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            [padding] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    gradients = jax.grad(lambda *a: convolve(*a).sum(), argnums=(0, 1))
    assert counted(convolve, x, kernel) == of_xla(convolve, x, kernel) > 0
    assert counted(gradients, x, kernel) == of_xla(gradients, x, kernel) > 0


def test_a_gradient_that_nobody_reads_is_not_counted():
    """Of two products the gradient by the kernel needs three more, not four: none by x."""
    x, kernel = jnp.ones((4, 8)), jnp.ones((8, 8))
    gradient = jax.grad(lambda kernel: matmul(matmul(x, kernel), kernel).sum())
    assert counted(gradient, kernel) == (1 + 3) * 2 * 4 * 8 * 8


def test_a_loop_is_counted_by_its_turns_and_a_branch_once():
    x, kernels = jnp.ones((4, 8)), jnp.ones((5, 8, 8))
    one = 2 * 4 * 8 * 8

    def scanned(x, kernels):
        return lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels)[0]

    def branched(x, kernels):
        return lax.cond(x[0, 0] > 0, lambda: scanned(x, kernels), lambda: x @ kernels[0])

    assert counted(scanned, x, kernels) == counted(branched, x, kernels) == 5 * one


def test_all_devices_parts_are_counted_however_attention_runs():
    """8,192 x 4 x 128 numbers: the kernel's own loops over blocks, on a mesh of any size."""
    mesh, q = make_mesh(MeshConfig()), jnp.ones((jax.device_count(), 512, 1, 128))

    def attend(q):
        with tracing_for(mesh):
            return splash_attention(q, q, q, 1.0)

    assert counted(attend, q) == len(q) * 4 * 512 * 512 * 128


def test_layers_in_one_array_are_all_counted():
    settings = parse(mmdit_dict())
    graph, params = nnx.split(
        nnx.eval_shape(lambda: build_backbone(settings.model, rngs=Undrawn()))
    )
    x, text = np.ones((2, 16, 16, 3), np.float32), np.ones((2, 5, 16), np.float32)

    def count(unroll):
        def run(params):
            network = nnx.merge(graph, params)
            for stack in network.stacks:
                stack.unroll = unroll
            return network(x, 1.0, text, text[:, 0])

        return counted(run, params), of_xla(run, params)

    ours, looped = count(False)
    assert ours == count(True)[0] and looped < 0.8 * ours
