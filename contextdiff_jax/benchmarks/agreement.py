"""One training step on the accelerator and on the CPU beside it, in float32: do they agree?"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from flax import nnx

from contextdiff_jax.benchmarks.loading import Result
from contextdiff_jax.benchmarks.method import random_state, training_inputs
from contextdiff_jax.settings import Settings
from contextdiff_jax.training.step import make_train_step

# Of the largest value: an accelerator sums in another order. AdamW's first change is the gradient's
# sign, so that rounding may turn one near 0 about: of parameters the share that moved the same way.
LOSS_TOLERANCE, SAME_SIGN = 1e-4, 0.98


def run(settings: Settings) -> Result:
    """One row: both losses, the share of the parameters that moved the same way, and `agrees`.

    Raises ValueError for a config that doesn't compute in float32.
    """
    if settings.train.precision != "float32":
        raise ValueError(
            f"train.precision={settings.train.precision!r}: must be float32 for --mode=agree"
        )
    train = dataclasses.replace(settings.train, warmup_steps=0, decay="constant")
    settings = dataclasses.replace(settings, train=train)
    batch, null = training_inputs(settings)
    state = random_state(settings)
    before = jax.tree.leaves(state.params)
    losses, moves = [], []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            placed = jax.device_put((state, batch, null), device)
            after, _ = jax.jit(make_train_step(settings))(*placed)
        losses.append(float(after.metric_sums["loss"]))
        changes = zip(jax.tree.leaves(nnx.to_pure_dict(after.params)), before, strict=True)
        moves.append(np.concatenate([np.sign(np.ravel(a) - np.ravel(b)) for a, b in changes]))
    moved = (moves[0] != 0) | (moves[1] != 0)
    same = float((moves[0] == moves[1])[moved].mean())
    error = abs(losses[0] - losses[1]) / abs(losses[1])
    row = {
        "device": jax.devices()[0].device_kind,
        "loss": losses[0],
        "cpu_loss": losses[1],
        "loss_error": error,
        "parameters_moved_alike": same,
        "agrees": bool(error <= LOSS_TOLERANCE and same >= SAME_SIGN),
    }
    text = (
        f"a training step on {row['device']} and on the CPU: losses {losses[0]:.6g} and "
        f"{losses[1]:.6g} ({error:.1e} apart), {same:.2%} of the parameters moved the same way: "
        f"{'they agree' if row['agrees'] else 'THEY DIFFER'}"
    )
    return Result(text, [row])
