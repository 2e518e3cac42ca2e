"""`train.optimizer`: its moves against the papers' formulas in float64; and a state that is taken
whole or not at all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import HERE

from contextdiff_jax.settings.train import TrainConfig
from contextdiff_jax.training import state as state_module
from contextdiff_jax.training.state import make_optimizer, take_if

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


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("good", [True, False])
def test_a_state_is_taken_whole_or_not_at_all(monkeypatch, platform, good):
    monkeypatch.setattr(state_module, "current_target", lambda: SimpleNamespace(platform=platform))
    old = {"x": jnp.arange(3.0), "step": jnp.int32(1)}

    @jax.jit
    def taken(good, old, divisor):
        new = {"x": old["x"] / divisor, "step": old["step"] + 1}
        return take_if(good, lambda: new, old)

    divisor = 2.0 if good else 0.0  # of the bad one nothing is seen
    found = taken(jnp.bool_(good), old, divisor)
    expected = {"x": [0, 0.5, 1], "step": 2} if good else {"x": [0, 1, 2], "step": 1}
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


# With users' compilation: that of the tests (conftest.py) copies nothing either way.
STEP = """
import re
import jax, jax.numpy as jnp, optax
from contextdiff_jax.settings.train import TrainConfig
from contextdiff_jax.training.state import apply_gradients, make_optimizer, take_if

config = TrainConfig()
params = {f"layer{i}": jnp.ones((64, 96)) for i in range(4)}

def step(state, x, number):
    params, ema, moments = state
    def loss(params):
        y = x
        for kernel in params.values():
            y = jnp.tanh(y @ kernel @ kernel.T)
        return jnp.sum(y**2)
    grads = jax.grad(loss)(params)
    good = jnp.isfinite(optax.tree.norm(grads))
    return take_if(
        good, lambda: apply_gradients(config, grads, params, ema, moments, number), state
    )

state = params, params, make_optimizer(config).init(params)
program = jax.jit(step, donate_argnums=0).lower(state, jnp.ones((8, 64)), 0).compile().as_text()
assert "f32[64,96]" in program
print(len(re.findall(r"= f32\\[64,96\\]\\S* copy\\(", program)))
"""


def test_a_step_on_a_cpu_copies_none_of_the_state():
    environment = os.environ | HERE | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", STEP], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "0\n", done.stdout + done.stderr[-2000:]
