"""Programs with their state on all devices, to be measured, and what must agree before a ratio is
given.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from contextdiff_jax.parallel.mesh import (
    Feed,
    is_stacked,
    make_mesh,
    state_shardings,
    tracing_for,
)
from contextdiff_jax.runtime.errors import RunError
from contextdiff_jax.runtime.host import num_cores
from contextdiff_jax.settings import Settings
from contextdiff_jax.training.operations import count_operations

# Largest differences, of the largest value: of an output as in the parity tests. Of a tensor's
# change by a step, in root mean square: AdamW's first change is the learning rate times the
# gradient's sign, so that rounding may turn one near 0 about. In bfloat16, whose rounding is 2^-8,
# it does, so that parameters aren't compared, and of all else the root mean square is: a random
# network multiplies rounding, guidance multiplies it again. Two unrelated samples differ by 1.4.
TOLERANCES = {"output": 2e-5, "loss": 1e-5, "parameters": 0.02, "samples": 1e-4}
BFLOAT16_TOLERANCES = {"output": 5e-2, "loss": 2e-2, "parameters": None, "samples": 0.25}
Inputs = dict[str, np.ndarray]


def tolerances(precision: str) -> dict[str, float | None]:
    """Those of `train.precision`; None: not compared."""
    return {"float32": TOLERANCES, "bfloat16": BFLOAT16_TOLERANCES}[precision]


def _largest(x: np.ndarray) -> float:
    return np.abs(x).max()


def _root_mean_square(x: np.ndarray) -> float:
    return np.sqrt(np.mean(np.square(x, dtype=np.float64)))


SIZES = {"float32": _largest, "bfloat16": _root_mean_square}


def randomised(params: nnx.State, seed: int) -> nnx.State:
    """Parameters of about unit gain, none at 0."""

    def drawn(number, path, leaf):
        noise = np.random.default_rng((seed, number)).standard_normal(leaf.shape, np.float32)
        shape = leaf.shape[is_stacked("/".join(map(str, path))) :]  # of one layer
        value = (
            noise / np.sqrt(np.prod(shape[:-1]))
            if len(shape) > 1
            else (path[-1] == "scale") + 0.1 * noise
        )
        return leaf.replace(jnp.asarray(value, jnp.float32))

    leaves = list(nnx.to_flat_state(params))
    with concurrent.futures.ThreadPoolExecutor(num_cores()) as pool:  # billions of numbers
        values = pool.map(drawn, range(len(leaves)), *zip(*leaves, strict=True))
        return nnx.from_flat_state(
            [(path, value) for (path, _), value in zip(leaves, values, strict=True)]
        )


def check(what: str, ours: np.ndarray, theirs: np.ndarray, precision: str, *, of: str) -> None:
    """Raises RunError if the difference is over the tolerance named `of`, or anything is not
    finite.
    """
    size, tolerance = SIZES[precision], tolerances(precision)[of]
    error = size(np.asarray(ours, np.float32) - theirs) / size(theirs)
    if not error <= tolerance:
        name = size.__name__.strip("_").replace("_", " ")
        found = f"differ by {error:.2g} of the {name} value, allowed {tolerance}"
        raise RunError(f"--compare: {what}: ours and torch's {found}: no ratio")


def check_change(
    what: str,
    before: Mapping[str, np.ndarray],
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
) -> None:
    """Raises RunError, naming the worst tensor, unless a step changed each parameter alike.

    A value's last place is left out: where nothing reads a parameter (a last layer's queries of the
    text) the change is its decay alone, a few of those or none.
    """

    def error(name: str, value: np.ndarray) -> float:
        off = np.maximum(np.abs(ours[name] - value) - np.spacing(np.abs(value)), 0)
        change = np.maximum(np.linalg.norm(value - before[name]), np.finfo(value.dtype).tiny)
        return np.linalg.norm(off) / change

    errors = {name: error(name, value) for name, value in theirs.items()}
    # NaN is off too.
    off = {name: error for name, error in errors.items() if not error <= TOLERANCES["parameters"]}
    if off:
        name = max(off, key=off.get)
        allowed = f"allowed {TOLERANCES['parameters']}"
        raise RunError(
            f"--compare: {what}: {name}: the step's changes differ by {off[name]:.2g}, {allowed}: "
            "no ratio"
        )


def compile_timed(
    function: Callable, *arguments: Any, donate: tuple[int, ...] = ()
) -> tuple[Callable, float, float]:
    """The program, the seconds that it took to compile, and its floating-point operations."""
    start = time.perf_counter()
    traced = jax.jit(function, donate_argnums=donate).trace(*arguments)
    compiled = traced.lower().compile()
    return compiled, time.perf_counter() - start, float(count_operations(traced))


def program_bytes(program: jax.stages.Compiled) -> int:
    """What a program takes on its device by the compiler: arguments, results, temporaries."""
    memory = program.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


class Devices:
    """All of them, as the config's mesh lays them out: a step of ours runs on each with its share
    of the batch.
    """

    def __init__(self, settings: Settings):
        self.rules = settings.mesh.rules
        self.mesh = make_mesh(settings.mesh, settings.train.batch_size)

    def parameters(self, tree: Any) -> Any:
        return jax.device_put(tree, state_shardings(self.mesh, tree, self.rules))

    def described(self, shapes: Any) -> Any:
        """Parameters that aren't there yet: their shapes with where they will lie."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            state_shardings(self.mesh, shapes, self.rules),
        )

    def batch(self, inputs: Inputs) -> dict[str, Array]:
        return {
            k: jax.device_put(v, Feed(self.mesh, len(v), self.rules).sharding(v.shape))
            for k, v in inputs.items()
        }

    def tracing(self) -> contextlib.AbstractContextManager:
        return tracing_for(self.mesh, self.rules)


class Stepper:
    """A training step's program with its state, of which shapes are enough to compile it: a call is
    a step, its result the loss.
    """

    def __init__(self, step: Callable, *state: Any, rest: tuple):
        self._rest, self.state = rest, state
        self.program, self.compile_seconds, self.flops = compile_timed(
            step, *state, *rest, donate=tuple(range(len(state)))
        )

    def __call__(self) -> Array:
        *self.state, result = self.program(*self.state, *self._rest)
        return jax.block_until_ready(result)
