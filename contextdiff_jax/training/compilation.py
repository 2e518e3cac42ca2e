"""Programs of the training step: jitted, compiled for each shape of a batch, and counted."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from contextdiff_jax.models.contextdiff import Frozen
from contextdiff_jax.settings import Settings, TrainConfig
from contextdiff_jax.training.operations import count_operations
from contextdiff_jax.training.state import TrainState
from contextdiff_jax.training.step import make_train_step

LOGGER = logging.getLogger(__name__)


def jit_step(
    settings: Settings,
    shardings: TrainState,
    batch: Mapping[str, jax.Array],
    null: Mapping[str, jax.Array],
    frozen: Frozen,
) -> Callable:
    """The jitted step, its state donated. Arrays, or their shapes with shardings
    (`jax.ShapeDtypeStruct`), will do.
    """
    whole = null["token_ids"].sharding
    return jax.jit(
        make_train_step(settings, whole.mesh),
        compiler_options=compiler_options(settings.train, whole.mesh),
        donate_argnums=0,
        in_shardings=(
            shardings,
            *(jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (batch, null, frozen)),
        ),
        out_shardings=(shardings, whole),
    )


def compiler_options(train: TrainConfig, mesh: Mesh) -> dict[str, str] | None:
    """What the config asks of the compiler for the mesh's platform; None: nothing.

    A TPU's compiler works in 16 MiB of the on-chip memory and fetches into the rest what is read
    later. A transformer's wide products go faster in more.
    """
    if not train.tpu_scoped_memory or mesh.devices.flat[0].platform != "tpu":
        return None
    return {"xla_tpu_scoped_vmem_limit_kib": str(train.tpu_scoped_memory)}


def compile_step(
    settings: Settings,
    state: TrainState,
    shardings: TrainState,
    batch: Mapping[str, jax.Array],
    null: Mapping[str, jax.Array],
    frozen: Frozen = Frozen(),
) -> tuple[Callable, int]:
    """The step's program, and its floating-point operations (`count_operations`).

    A batch of another shape (`data.buckets`) gets its own program when it first comes.
    """
    whole = null["token_ids"].sharding
    start = time.perf_counter()
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    LOGGER.info("compiling the step of a model of %s parameters", f"{count:,}")
    jitted = jit_step(settings, shardings, batch, null, frozen)
    traced = jitted.trace(state, batch, null, frozen)
    compiled = traced.lower().compile()
    axes = [f"{axis} {size}" for axis, size in whole.mesh.shape.items() if size > 1]
    where = f"the mesh {', '.join(axes)}" if axes else "one device"
    LOGGER.info("compiled in %.1f s for %s", time.perf_counter() - start, where)
    programs = {shapes_of(batch): compiled}

    def step(
        state: TrainState, batch: Mapping[str, jax.Array], *rest: Any
    ) -> tuple[TrainState, jax.Array]:
        shapes = shapes_of(batch)
        if shapes not in programs:
            LOGGER.info("compiling for %s", shapes)
            programs[shapes] = jitted.lower(state, batch, *rest).compile()
        return programs[shapes](state, batch, *rest)

    return step, count_operations(traced)


def shapes_of(batch: Mapping[str, jax.Array]) -> tuple[tuple[int, ...], ...]:
    """The shapes of a batch's arrays, by name."""
    return tuple(batch[name].shape for name in sorted(batch))
