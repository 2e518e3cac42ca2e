"""What is said of the device itself: what it is, and the most that it does."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp

from contextdiff_jax.benchmarks import paired
from contextdiff_jax.benchmarks.loading import Result
from contextdiff_jax.evaluation.report import machine


def run() -> Result:
    """One row: the machine, versions, memory, matrix products of both types, and a copy."""
    device = jax.devices()[0]
    row = machine() | {
        "platform": device.platform,
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "float32_flops_per_second": paired.matmul_peak(),
        "bfloat16_flops_per_second": paired.matmul_peak(dtype=jnp.bfloat16),
        "bytes_per_second": paired.memory_bandwidth(),
        "torch": _torch(),
    }
    memory = row["memory_bytes"]
    lines = [
        f"{row['devices']}, {row['cpu']}; jax {row['jax']}, torch {row['torch']}",
        f"memory {memory / 2**30:.1f} GiB" if memory else "memory: the host's",
        f"matrix products: {row['float32_flops_per_second'] / 1e12:.2f} TFLOP/s in float32"
        f"{' (TF32)' * (device.platform == 'gpu')}, "
        f"{row['bfloat16_flops_per_second'] / 1e12:.2f} in bfloat16; "
        f"a copy {row['bytes_per_second'] / 1e9:.0f} GB/s",
    ]
    return Result("\n".join(lines), [row])


def _torch() -> str:
    """Its version, and CUDA's or that it has none; what is missing is said."""
    if importlib.util.find_spec("torch") is None:
        return "not installed"
    import torch

    return f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
