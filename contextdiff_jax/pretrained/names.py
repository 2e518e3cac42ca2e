"""The declarative name map: what a parameter is called, and how its array lies, in torch.

A parameter's torch name is its path here, with a model's `Rules.renames` applied (regular
expressions, in order), and the leaf `weight` for our `kernel`, `scale` and `embedding`. Arrays
change layout: convolutions OIHW <-> HWIO, dense layers transposed, and those that torch stores as
1x1 convolutions (`Rules.pointwise`) (O, I, 1, 1) <-> (I, O). All changes are views, so that only
what is used is copied.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import PyTree

from contextdiff_jax.pretrained.casting import copy_finite
from contextdiff_jax.runtime import host
from contextdiff_jax.runtime.terminal import bar

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """One model's names in its files.

    `renames` are (pattern, replacement) on the dotted torch name, `pointwise` a pattern of our
    dotted paths, `aliases` renames of tensors in files of older writers, `unread` patterns of
    stored tensors that are no parameters of ours (buffers, the half of a model that isn't loaded),
    `copies` (name, copy): tensors that are one in the model, of which a file may hold only the
    copy. `stacked` (ours, theirs, first): dotted prefixes of layers that are one array here and
    there one tensor each, counted from `first`. `constants`: tensors that follow from the config.
    """

    renames: tuple[tuple[str, str], ...] = ()
    pointwise: str | None = None
    aliases: tuple[tuple[str, str], ...] = ()
    unread: tuple[str, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    stacked: tuple[tuple[str, str, int], ...] = ()
    constants: Mapping[str, Callable[[], np.ndarray]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor: the parameter that it is here (of stacked layers, `layer` of it), its shape
    there, and the layout change both ways.
    """

    path: tuple
    layer: int | None = None
    torch_shape: tuple[int, ...]
    from_torch: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


def renamed(name: str, renames: Iterable[tuple[str, str]]) -> str:
    """`name` after each rename, in order."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def name_map(module: nnx.Module, rules: Rules) -> dict[str, Entry]:
    """torch name -> entry, for every parameter of `module` (concrete or abstract)."""
    entries = {}
    for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        ours = ".".join(map(str, path))
        theirs = ".".join(map(str, (*path[:-1], _LEAVES.get(path[-1], path[-1]))))
        pointwise = rules.pointwise is not None and re.search(rules.pointwise, ours) is not None
        stack = next((each for each in rules.stacked if ours.startswith(each[0])), None)
        if stack is None:
            change = _layout(path[-1], tuple(param.shape), pointwise)
            entries[renamed(theirs, rules.renames)] = Entry(path=path, **change)
            continue
        count, *shape = param.shape
        change = _layout(path[-1], tuple(shape), pointwise)
        for layer in range(count):
            name = f"{stack[1]}{stack[2] + layer}.{theirs.removeprefix(stack[0])}"
            entries[renamed(name, rules.renames)] = Entry(path=path, layer=layer, **change)
    return entries


def _layout(leaf: str, shape: tuple[int, ...], pointwise: bool) -> dict[str, Any]:
    if len(shape) == 4:  # HWIO <-> OIHW
        return dict(
            torch_shape=(shape[3], shape[2], shape[0], shape[1]),
            from_torch=lambda w: w.transpose(2, 3, 1, 0),
            to_torch=lambda w: w.transpose(3, 2, 0, 1),
        )
    if leaf == "kernel" and pointwise:  # IO <-> OI11
        return dict(
            torch_shape=(*shape[::-1], 1, 1),
            from_torch=lambda w: w[:, :, 0, 0].T,
            to_torch=lambda w: w.T[:, :, None, None],
        )
    if leaf == "kernel":  # IO <-> OI
        return dict(torch_shape=shape[::-1], from_torch=np.transpose, to_torch=np.transpose)
    return dict(torch_shape=shape, from_torch=np.asarray, to_torch=np.asarray)


def state_from_torch(
    tensors: Mapping[str, Any],
    module: nnx.Module,
    rules: Rules,
    *,
    what: str,
    held: Callable[[np.dtype], DTypeLike] = lambda stored: stored,
    shardings: PyTree[Sharding] | None = None,
    progress: Callable[[Collection], Iterable] = iter,
) -> nnx.State:
    """The parameters of `module`, for `nnx.update(module, state)`, one tensor at a time.

    Args:
      tensors: torch names -> arrays in torch layout, or what has a `shape` and becomes an array by
          `np.asarray`.
      module: gives names and shapes; may be abstract (`nnx.eval_shape`).
      what: begins the error's line.
      held: a tensor's stored type -> its parameter's.
      shardings: where the parameters go, a tree like `nnx.state(module, nnx.Param)`; None: the
          default device.
      progress: wraps the loop over the tensors (tqdm).

    Raises:
      ValueError: one line with every missing, unknown and wrongly shaped tensor, or with the first
          that is not
        finite.
    """
    entries = name_map(module, rules)
    named = _named(tensors, rules)
    _check_constants(tensors, rules, what)
    _check(entries, {name: tuple(tensors[stored].shape) for name, stored in named.items()}, what)
    state = nnx.state(module, nnx.Param)
    params = dict(nnx.to_flat_state(state))
    places = {} if shardings is None else dict(nnx.to_flat_state(shardings))

    def layer(name: str) -> np.ndarray:
        tensor = tensors[named[name]]
        array = np.asarray(tensor)
        _check_finite(array, named[name], getattr(tensor, "path", what))
        return entries[name].from_torch(array)

    def read(path: tuple, names: list[str]) -> jax.Array:
        stacked = entries[names[0]].layer is not None
        array = np.stack([layer(name) for name in names]) if stacked else layer(names[0])
        return _placed(array, held(array.dtype), _sharding(places.get(path)))

    names = {}  # of each parameter's tensors, in order
    for name, entry in entries.items():
        names.setdefault(entry.path, []).append(name)
    # Reading, casting and turning about are numpy's, which leaves Python's lock meanwhile.
    with ThreadPoolExecutor(host.num_cores()) as pool:
        arrays = pool.map(read, *zip(*names.items(), strict=True))
        flat = {
            path: params[path].replace(array)
            for path, array in zip(progress(names), arrays, strict=True)
        }
    return nnx.from_flat_state(flat)


def _named(tensors: Collection[str], rules: Rules) -> dict[str, str]:
    """Today's name -> the stored one, of what is a parameter."""
    named = {
        renamed(name, rules.aliases): name
        for name in tensors
        if name not in rules.constants and not _matches(name, rules.unread)
    }
    for name, copy in rules.copies:
        if copy in tensors:
            named.setdefault(name, copy)
    return named


def state_to_torch(module: nnx.Module, rules: Rules) -> dict[str, np.ndarray]:
    """The inverse of `state_from_torch`: torch names -> contiguous arrays in torch layout."""
    params = {
        path: np.asarray(jax.device_get(leaf[...]))
        for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }
    entries = name_map(module, rules)

    def turned(entry: Entry) -> np.ndarray:
        array = params[entry.path]
        array = array if entry.layer is None else array[entry.layer]
        return np.ascontiguousarray(entry.to_torch(array))

    with ThreadPoolExecutor(host.num_cores()) as pool:  # copies, without Python's lock
        arrays = pool.map(turned, entries.values())
        tensors = dict(zip(bar(entries, "writing weights", "tensor"), arrays, strict=True))
    stored = next(iter(tensors.values())).dtype
    constants = {name: make().astype(stored) for name, make in rules.constants.items()}
    return tensors | constants


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _check(entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    problems = [f"{name}: missing" for name in sorted(entries.keys() - shapes.keys())]
    problems += [f"{name}: unknown" for name in sorted(shapes.keys() - entries.keys())]
    for name in sorted(entries.keys() & shapes.keys()):
        if shapes[name] != entries[name].torch_shape:
            problems.append(
                f"{name}: shape {shapes[name]}, the config asks for {entries[name].torch_shape}"
            )
    if problems:
        raise ValueError(f"{what}: {len(problems)} tensors do not fit: " + "; ".join(problems))


def _check_constants(tensors: Mapping[str, Any], rules: Rules, what: str) -> None:
    for name in rules.constants.keys() & tensors.keys():
        stored, own = np.asarray(tensors[name]), rules.constants[name]()
        near = 1e-5 if stored.dtype.itemsize > 2 else 1e-2  # what the shorter types round
        if stored.shape != own.shape or np.abs(stored.astype(np.float32) - own).max() > near:
            raise ValueError(f"{what}: {name}: isn't what its config says; not supported")


def _check_finite(array: np.ndarray, name: str, what: str | Path) -> None:
    if array.dtype.name not in _FLOATS:
        raise ValueError(
            f"{what}: {name}: holds {array.dtype}; weights must be one of {', '.join(_FLOATS)}"
        )
    if array.size and not _finite(array):
        raise ValueError(f"{what}: {name}: holds NaN or infinity")


def _finite(array: np.ndarray) -> bool:
    if array.dtype.itemsize != 2:
        return bool(np.isfinite(array).all())
    # numpy's isfinite converts the half types one by one; their exponents can be read as integers.
    exponent = 0x7C00 if array.dtype == np.float16 else 0x7F80  # all ones: NaN or infinity
    return int((array.view(np.uint16) & exponent).max()) != exponent


def _sharding(place: Any) -> Sharding | None:
    """The leaf of a tree of shardings, which nnx wraps as it does parameters."""
    return place.get_value() if isinstance(place, nnx.Variable) else place


def _placed(array: np.ndarray, dtype: DTypeLike, sharding: Sharding | None) -> jax.Array:
    """The array in `dtype` on its devices. On a CPU they take the memory of the one copy that is
    made here, all of them where it isn't split.
    """

    def part(index: tuple[slice, ...]) -> np.ndarray:
        values = array[index]
        target = host.pages(values.shape, dtype)
        copy_finite(values, target)
        return target

    if sharding is None or sharding.is_fully_replicated:
        return jax.device_put(part(()), sharding)
    return jax.make_array_from_callback(array.shape, sharding, part)
