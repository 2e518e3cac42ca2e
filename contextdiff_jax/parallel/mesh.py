"""One mesh for 1 device and for many: the batch is split over `data` and `fsdp`, parameters over `fsdp`."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; one may be -1, the rest. `tensor` and `sequence` are 1 so far."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self):
        sizes = [getattr(self, axis) for axis in AXES]
        for axis, size in zip(AXES, sizes, strict=True):
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{axis}={size}: must be positive, or -1 for the rest of the devices")
        if sizes.count(-1) > 1:
            raise ValueError(f"mesh={sizes}: only one axis may be -1")
        for axis in ("tensor", "sequence"):
            if getattr(self, axis) != 1:
                raise ValueError(f"mesh.{axis}={getattr(self, axis)}: only 1 is supported; use mesh.data, mesh.fsdp")


def make_mesh(config: MeshConfig, batch_size: int | None = None) -> Mesh:
    """The mesh over all devices.

    Raises ValueError if the axes do not multiply to the number of devices, or the batch can't be divided over
    `data` x `fsdp`.
    """
    devices = jax.devices()
    sizes = {axis: getattr(config, axis) for axis in AXES}
    known = math.prod(size for size in sizes.values() if size > 0)
    sizes = {axis: len(devices) // known if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"mesh={sizes}: must multiply to the number of devices, {len(devices)}")
    ways = sizes["data"] * sizes["fsdp"]
    if batch_size is not None and batch_size % ways:
        raise ValueError(f"train.batch_size={batch_size}: must be a multiple of mesh.data x mesh.fsdp = {ways}")
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), AXES)


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """The batch axis, after `leading` unsharded axes, over `data` and `fsdp`."""
    return NamedSharding(mesh, P(*(None,) * leading, BATCH_AXES))


def state_shardings(mesh: Mesh, abstract: PyTree) -> PyTree:
    """Each array's largest axis that `fsdp` divides, over `fsdp`; replicated where none does."""
    size = mesh.shape["fsdp"]

    def sharding(leaf):
        axes = [axis for axis in range(leaf.ndim) if leaf.shape[axis] % size == 0]
        if size == 1 or not axes:
            return NamedSharding(mesh, P())
        axis = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, P(*(None,) * axis, "fsdp"))

    return jax.tree.map(sharding, abstract)
