"""`train.optimizer`: its moves against the papers' formulas in float64."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from contextdiff_jax.settings.train import TrainConfig
from contextdiff_jax.training.state import make_optimizer

RATE, B1, B2, DECAY = 0.1, 0.8, 0.9, 0.3
STEPS = 3
SHAPES = {
    "linear": {"kernel": (6, 10), "bias": (10,)},
    "conv": {"kernel": (3, 3, 2, 4)},
    "stacks": {"0": {"layers": {"to_q": {"kernel": (2, 8, 5)}}}},
    "tokens": {"embedding": (7, 3)},
    "gain": (),
}


def tree(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: np.asarray(rng.standard_normal(shape), np.float32),
        SHAPES,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def moved(optimizer: str):
    """The parameters before and after `STEPS` steps, and the gradients."""
    config = TrainConfig(
        optimizer=optimizer,
        learning_rate=RATE,
        warmup_steps=0,
        decay="constant",
        b1=B1,
        b2=B2,
        weight_decay=DECAY,
        clip_norm=0.0,
    )
    params, gradients = tree(0), [tree(1 + step) for step in range(STEPS)]
    rule, after = make_optimizer(config), params
    state = rule.init(params)
    for gradient in gradients:
        updates, state = rule.update(gradient, state, after)
        after = jax.tree.map(np.add, after, updates)
    return params, gradients, after


def adamw(x, gradients):
    """Loshchilov and Hutter (2019), Algorithm 2."""
    x, m, v = np.float64(x), 0.0, 0.0
    for n, g in enumerate(map(np.float64, gradients), 1):
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
        x = x - RATE * (m / (1 - B1**n) / (np.sqrt(v / (1 - B2**n)) + 1e-8) + DECAY * x)
    return x


def muon(x, gradients):
    """Of a matrix: Jordan (2024), steps of Newton and Schulz on the gradients' momentum with
    Nesterov's look ahead; its size by Liu et al. (2025). Boissin et al. (2025) begin with each row
    over the root of the sum of its products with all, and take four.
    """
    x, m, beta = np.float64(x), 0.0, 0.95
    for g in map(np.float64, gradients):
        m = g + beta * m
        y = g + beta * m
        y = y.T if y.shape[0] > y.shape[1] else y
        y = y / np.sqrt(np.abs(y @ y.T).sum(1, keepdims=True))
        for _ in range(4):
            square = y @ y.T
            y = 3.4445 * y - 4.7750 * square @ y + 2.0315 * square @ square @ y
        y = y if y.shape == x.shape else y.T
        x = x - RATE * (0.2 * np.sqrt(max(x.shape)) * y + DECAY * x)
    return x


def agree(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def test_adamw():
    before, gradients, after = moved("adamw")
    jax.tree.map(lambda x, found, *own: agree(found, adamw(x, own)), before, after, *gradients)


@pytest.mark.parametrize(
    "path",
    [("linear", "kernel"), ("conv", "kernel"), ("stacks", "0", "layers", "to_q", "kernel")],
)
def test_muon_moves_each_kernel_by_an_orthogonal_matrix(path):
    before, gradients, after = moved("muon")
    x, found, *own = (_leaf(each, path) for each in (before, after, *gradients))
    if path[0] == "stacks":  # each layer's by itself
        for layer in range(len(x)):
            agree(found[layer], muon(x[layer], [g[layer] for g in own]))
    else:  # a convolution reads all places of its window
        rows = [y.reshape(-1, y.shape[-1]) for y in (x, *own)]
        agree(found.reshape(rows[0].shape), muon(rows[0], rows[1:]))


@pytest.mark.parametrize("path", [("linear", "bias"), ("tokens", "embedding"), ("gain",)])
def test_muon_leaves_the_rest_to_adamw(path):
    before, gradients, after = moved("muon")
    x, found, *own = (_leaf(each, path) for each in (before, after, *gradients))
    agree(found, adamw(x, own))


def _leaf(tree, path):
    for name in path:
        tree = tree[name]
    return tree
