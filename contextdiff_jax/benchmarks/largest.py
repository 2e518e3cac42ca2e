"""The largest batch that a training step of ours and of torch's has memory for, and its pace."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
from flax import nnx

from contextdiff_jax.benchmarks.loading import Result
from contextdiff_jax.benchmarks.measured import compile_timed, program_bytes
from contextdiff_jax.benchmarks.network import (
    make_adamw,
    make_inputs,
    random_network,
    training_step,
)
from contextdiff_jax.settings import Settings

_CALLS = 4  # that are timed, after one more


def _seconds(call) -> float:
    call()
    start = time.perf_counter()
    for _ in range(_CALLS):
        call()
    return (time.perf_counter() - start) / _CALLS


def _ours(settings: Settings, limit: int, most: int) -> dict[str, Any]:
    """Batches are doubled as long as the compiler says that the program fits."""
    network = random_network(settings)
    graph, params = nnx.split(network)
    optimizer = make_adamw(settings.train)
    opt_state = jax.jit(optimizer.init)(params)
    step, best, batch = training_step(graph, optimizer), None, 1
    while batch <= most:
        inputs = jax.device_put(make_inputs(settings, batch))
        program, _, _ = compile_timed(step, params, opt_state, inputs, donate=(0, 1))
        if program_bytes(program) > limit:
            break
        best, batch = (program, inputs, batch), batch * 2
    if best is None:
        return {"name": network.name, "batch": 0}
    program, inputs, batch = best
    state = [params, opt_state]

    def call():
        *state[:], loss = program(*state, inputs)
        jax.block_until_ready(loss)

    found = {"batch": batch, "images_per_second": batch / _seconds(call)}
    return {"name": network.name, **found, "bytes": program_bytes(program)}


def _torchs(settings: Settings, most: int) -> dict[str, Any]:
    """Batches are doubled until torch says that its memory is out."""
    import torch

    from contextdiff_jax.benchmarks.torch_peer import TorchNetwork, layouts

    layout = layouts(settings.model)[0]
    peer = TorchNetwork(random_network(settings), settings, layout)
    found, batch = {"name": f"torch {layout}", "batch": 0}, 1
    while batch <= most:
        try:
            call = functools.partial(peer.step, peer.tensors(make_inputs(settings, batch)))
            found |= {"batch": batch, "images_per_second": batch / _seconds(call)}
            found["bytes"] = peer.peak_bytes(call)
        except torch.OutOfMemoryError:
            break
        batch *= 2
    return found


def run(settings: Settings, side: str, most: int = 4096) -> Result:
    """One row of `side`: ours, or torch's (each in a process of its own: it has the memory alone).

    Raises ValueError where the device doesn't say how much memory it has.
    """
    if side == "torch":
        row = _torchs(settings, most)
    else:
        limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
        if limit is None:
            raise ValueError("--mode=largest: this device doesn't say how much memory it has")
        row = _ours(settings, limit, most)
    rate = row.get("images_per_second", 0.0)
    return Result(f"{row['name']}: batch {row['batch']}, {rate:.1f} images/s", [row])
