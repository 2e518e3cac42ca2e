"""One mesh for 1 device and for many, and how every array gets its place on it. Read it from top to
bottom:

    a parameter's path --PARAMETER_AXES--> logical names of its dimensions --rules (config)--> mesh
    axes

`unet/mid_block/resnets/0/conv1/kernel` [3, 3, 1280, 1280] is (-, -, width, channels), which the
default rules put over (-, -, fsdp, tensor). The table reads the end of a path, so the moving
average and the optimizer's moments, which are trees of parameters, lie as their parameters do. A
dimension that its mesh axes don't divide is replicated.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import PyTree

from contextdiff_jax.runtime.fields import check_choice

# Outermost first: the innermost axes get the nearest devices, for they talk most.
AXES = ("data", "fsdp", "sequence", "tensor")

# Logical name -> mesh axes (several: joined by commas; none: ''). The config's `mesh.rules`
# replaces single entries.
RULES = {
    "batch": "data,fsdp",  # examples
    # a picture's rows: the compiler adds the exchange of borders that `layers.convolve` needs
    "rows": "sequence",
    # a parameter's side on the residual stream, which all devices' activations hold whole
    "width": "fsdp",
    "heads": "tensor",  # attention's inside
    "hidden": "tensor",  # a feed-forward's inside
    "channels": "tensor",  # a residual block's inside, between its two convolutions
    "vocab": "",
}

# Those of an edit: a clip's frames are the examples, one after the other.
FRAME_RULES = RULES | {"batch": "data,fsdp,sequence", "rows": ""}

# (pattern in the path, logical names of the last dimensions); the first that matches counts,
# dimensions before are replicated. What enters a block's inside is split there by columns, what
# leaves it by rows: one sum a block.
PARAMETER_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"^(step|key|metric_sums)\b", ()),  # the training state's small change
    (r"\bto_[qkv]/kernel$", ("width", "heads")),
    (r"\bto_[qkv]/bias$", ("heads",)),
    (r"\bto_out/kernel$", ("heads", "width")),
    (r"\b(ff/proj_in|linear_1|fc1)/kernel$", ("width", "hidden")),
    (r"\b(ff/proj_in|linear_1|fc1)/bias$", ("hidden",)),
    (r"\b(ff/proj_out|linear_2|fc2)/kernel$", ("hidden", "width")),
    (r"\b(conv1|time_emb_proj|(down|up)samplers/\d+/conv)/kernel$", ("width", "channels")),
    (r"\b(conv1|time_emb_proj|(down|up)samplers/\d+/conv)/bias$", ("channels",)),
    (r"\bresnets/\d+/norm2/(scale|bias)$", ("channels",)),
    (r"\bconv2/kernel$", ("channels", "width")),
    (r"\bembedding$", ("vocab", "width")),
    (r"", ("width", "width")),  # all others: the first of the last two dimensions that can be split
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis (one may be -1, the rest) and what differs from `RULES`."""

    data: int = -1  # devices along the axis that splits the batch
    fsdp: int = 1  # ... that splits the batch, parameters, moments and average
    tensor: int = 1  # ... that splits heads and hidden widths
    sequence: int = 1  # ... that splits a picture's rows, or a clip's frames
    # logical name of a dimension: mesh axes, which differ from the table's
    rules: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        sizes = {axis: getattr(self, axis) for axis in AXES}
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(
                    f"mesh.{axis}={size}: must be positive, or -1 for the rest of the devices"
                )
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"mesh={sizes}: only one axis may be -1")
        for name, axes in self.rules.items():
            check_choice("mesh.rules", name, RULES)
            for axis in _split(axes):
                if axis not in AXES:
                    raise ValueError(
                        f"mesh.rules.{name}={axes!r}: unknown axis {axis!r}; "
                        f"some of {', '.join(AXES)}"
                    )


def make_mesh(
    config: MeshConfig,
    batch_size: int | None = None,
    accumulation: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """The mesh over `devices` (all that there are; or a described topology's, to compile without
    them).

    Raises ValueError if the axes do not multiply to the number of devices, or they can't share a
    batch equally.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    known = math.prod(size for size in sizes.values() if size > 0)
    sizes = {axis: len(devices) // known if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"mesh={sizes}: must multiply to the number of devices, {len(devices)}")
    axes = _split((RULES | dict(config.rules))["batch"])
    ways = math.prod(sizes[axis] for axis in axes)
    if batch_size is not None and batch_size % (ways * accumulation):
        product = " x ".join(
            [f"mesh.{axis}" for axis in axes] + ["train.accumulation"] * (accumulation > 1)
        )
        raise ValueError(
            f"train.batch_size={batch_size}: "
            f"must be a multiple of {product} = {ways * accumulation}"
        )
    return Mesh(_arrange(list(devices), sizes), AXES)


def _arrange(devices: list, sizes: dict[str, int]) -> np.ndarray:
    """The devices as an array of the mesh's shape: neighbours on the chip network are neighbours on
    the inner axes, and slices, which only the data-centre network joins, lie along `data` (or
    `fsdp`).
    """
    shape = tuple(sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        outer = next((axis for axis in ("data", "fsdp") if sizes[axis] % slices == 0), None)
        if outer is None:
            raise ValueError(
                f"mesh={sizes}: data or fsdp must be a multiple of the number of slices, {slices}"
            )
        across = tuple(slices if axis == outer else 1 for axis in AXES)
        inside = tuple(size // count for size, count in zip(shape, across, strict=True))
        return mesh_utils.create_hybrid_device_mesh(
            inside, across, devices, allow_split_physical_axes=True
        )
    if devices[0].platform == "tpu":
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return np.asarray(devices).reshape(shape)


def path_name(path: Sequence[Any]) -> str:
    """'unet/conv_in/kernel' of a pytree's path; the `.value` of an NNX variable has no name."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def logical_axes(name: str, dimensions: int) -> tuple[str | None, ...]:
    """The logical names of the parameter's last dimensions. A first one that counts layers has
    none: all devices run all layers.
    """
    axes = next(axes for pattern, axes in PARAMETER_AXES if re.search(pattern, name))
    own = dimensions - is_stacked(name)
    return axes[-own:] if own else ()


def is_stacked(name: str) -> bool:
    """Whether the parameter is of several layers, one after the other (models.stacked)."""
    return re.search(r"\bstacks/\d+/layers/", name) is not None


def place(
    mesh: Mesh, shape: Sequence[int], names: Sequence[str | None], rules: Mapping[str, str] = RULES
) -> NamedSharding:
    """The sharding of an array whose last dimensions have the logical `names`.

    A mesh axis splits one dimension of an array, the first that asks for it and that it divides.
    """
    rules = RULES | dict(rules)
    names = (None,) * (len(shape) - len(names)) + tuple(names)[max(len(names) - len(shape), 0) :]
    free = {axis for axis, size in mesh.shape.items() if size > 1}
    spec = []
    for size, name in zip(shape, names, strict=True):
        axes = tuple(axis for axis in _split(rules.get(name, "")) if axis in free)
        while size % math.prod(mesh.shape[axis] for axis in axes):
            axes = axes[:-1]
        free -= set(axes)
        spec.append(axes or None)
    return NamedSharding(mesh, P(*spec))


def replicate(tree: PyTree) -> PyTree:
    """Arrays that every process has whole (numpy's, or replicated over the devices of all), on each
    of this one's.
    """
    sharding = replicated(local_mesh())
    # Through the host: no array of a job's mesh can be used beside one on the devices of a single
    # process.
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), sharding), tree)


def state_shardings(mesh: Mesh, abstract: PyTree, rules: Mapping[str, str] = RULES) -> PyTree:
    """The place of each array of a tree of parameters, or of a whole training state. Needs only
    shapes.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: place(
            mesh, leaf.shape, logical_axes(path_name(path), len(leaf.shape)), rules
        ),
        abstract,
    )


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices that a program is traced for: what a kernel needs that XLA's partitioner can't
    split by itself.
    """

    mesh: Mesh | None = None
    rules: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def platform(self) -> str:
        """The mesh's platform, which for a described topology isn't this machine's. Without a mesh
        the only device's: several devices without one are answered with `unknown`, for nothing says
        how they share the work.
        """
        if self.mesh is not None:
            return self.mesh.devices.flat[0].platform
        return jax.default_backend() if jax.device_count() == 1 else "unknown"

    def splits(self, name: str) -> bool:
        """Whether devices share what has this logical name: a picture's `rows`, the `batch`."""
        if self.mesh is None:
            return False
        return any(self.mesh.shape[axis] > 1 for axis in _split((RULES | dict(self.rules))[name]))


_TARGET: contextvars.ContextVar[Target] = contextvars.ContextVar("target")


@contextlib.contextmanager
def tracing_for(mesh: Mesh | None, rules: Mapping[str, str] = RULES) -> Iterator[None]:
    """Makes what is traced inside a program for this mesh."""
    token = _TARGET.set(Target(mesh, rules))
    try:
        yield
    finally:
        _TARGET.reset(token)


def current_target() -> Target:
    """The target of the innermost `tracing_for`."""
    return _TARGET.get(Target())


def laid(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """An activation where its logical `names` put it on the current target; its gradient too.

    Without it XLA's partitioner may take a gradient's place, split by features, for that of the
    activations which it is made of, and gather those of all devices.
    """
    target = current_target()
    if target.mesh is None or target.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, place(target.mesh, x.shape, names, target.rules))


def gathered(params: PyTree, dtype: DTypeLike | None = None, *, vectors: bool = True) -> PyTree:
    """Parameters as the network reads them on the current target: whole along the axes that split
    the batch, and kernels in `dtype`, that of the products, so that half the bytes are sent where
    it is bfloat16. None: in the types that they have. Without `vectors` biases and scales, which
    are a thousandth of it, stay as they lie.

    Left to itself XLA's partitioner also multiplies the rows of a kernel that a device holds with
    everybody's examples, and sends activations. That each parameter is gathered before its use is
    what FSDP means. Those of stacked layers stay as they lie: their scan gathers a layer's.
    """
    target = current_target()
    if target.mesh is None:
        return params
    rules = RULES | dict(target.rules)
    split = _split(rules["batch"])
    kept = {
        name: ",".join(axis for axis in _split(axes) if axis not in split)
        for name, axes in rules.items()
    }

    def one(path, leaf: jax.Array) -> jax.Array:
        name = path_name(path)
        if is_stacked(name) or not (vectors or leaf.ndim > 1):
            return leaf
        used = leaf.astype(dtype or leaf.dtype) if name.endswith("/kernel") else leaf
        return _gather(
            used,
            *(
                place(target.mesh, leaf.shape, logical_axes(name, leaf.ndim), each)
                for each in (rules, kept)
            ),
        )

    return jax.tree_util.tree_map_with_path(one, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, split: NamedSharding, whole: NamedSharding) -> jax.Array:
    """x, first where it lies, so that what is sent is this and not what it was made of. Its
    gradient goes back split: JAX's own rule asks for it whole, which is a sum of all of it for
    everybody.
    """
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, split), whole)


_gather.defvjp(
    lambda x, split, whole: (_gather(x, split, whole), None),
    lambda split, whole, _, gradient: (jax.lax.with_sharding_constraint(gradient, split),),
)


def local_mesh() -> Mesh:
    """A mesh of this process's devices alone, all along `data`: for what each process does with its
    own share.
    """
    return make_mesh(MeshConfig(), devices=jax.local_devices())


def replicated(mesh: Mesh) -> NamedSharding:
    """The place of what every device holds whole."""
    return NamedSharding(mesh, P())


@dataclasses.dataclass(frozen=True)
class Feed:
    """The way of a global batch of `batch_size` examples onto the mesh, from what each process has
    read.
    """

    mesh: Mesh
    batch_size: int
    rules: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """The examples of each batch that this process's devices hold: what it has to read.
        Processes that share examples (by tensor or sequence parallelism) read them all.
        """
        owned = place(self.mesh, (self.batch_size,), ("batch",), self.rules)
        indices = owned.addressable_devices_indices_map((self.batch_size,)).values()
        return np.unique(np.concatenate([np.arange(self.batch_size)[index] for index in indices]))

    def sharding(self, shape: Sequence[int]) -> NamedSharding:
        """The place of an array [B, ...]; a picture's, [B, H, W, C], is split by rows too."""
        rows = "rows" if len(shape) == 4 else None
        return place(self.mesh, shape, ("batch", rows, None, None)[: len(shape)], self.rules)

    def put(self, local: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Global arrays from this process's examples, `rows` of the global batch."""

        def spread(array: np.ndarray) -> jax.Array:
            shape = (self.batch_size, *array.shape[1:])

            def part(index):
                wanted = np.arange(self.batch_size)[index[0]]
                return array[(np.searchsorted(self.rows, wanted), *index[1:])]

            # Meant, though JAX's transfer guard takes it for an implicit transfer. For 8 devices it
            # takes a fifth of the time of their `device_put`s.
            with jax.transfer_guard_host_to_device("allow"):
                return jax.make_array_from_callback(shape, self.sharding(shape), part)

        return {name: spread(np.asarray(array)) for name, array in local.items()}


def _split(axes: str) -> tuple[str, ...]:
    return tuple(axis.strip() for axis in axes.split(",") if axis.strip())
