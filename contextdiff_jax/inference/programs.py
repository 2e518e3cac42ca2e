"""Traced programs kept in a folder: the next process needn't build a network and trace it.

A file holds a program's StableHLO (`jax.export`), which is data, not a pickle. What it compiles to
is in JAX's compilation cache: the two together are the executable.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import pathlib
import re
from collections.abc import Callable
from typing import Any

import flax
import jax
import jaxlib
from etils import epath
from jax import export

from contextdiff_jax.parallel.mesh import path_name
from contextdiff_jax.runtime.files import replacing

LOGGER = logging.getLogger(__name__)
# Of JAX's settings, those that change what is traced.
_SETTINGS = (
    "jax_enable_x64",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
)


def kept(
    folder: epath.PathLike, name: str, about: Any, make: Callable[[], Callable], *arguments: Any
) -> Callable:
    """`make()`, a function of arrays that can be jitted, as a program for `arguments` and those
    like them: read from `folder`, or traced and written there.

    `about`: all else that the program depends on, told apart by its `repr`. What the arguments hold
    beside arrays counts (the configs of networks), and versions, JAX's settings and the devices.

    Raises ValueError for a file that isn't what was written.
    """
    leaves, tree = jax.tree.flatten(arguments)
    shapes = [
        (path_name(path), leaf.shape, str(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(arguments)
    ]
    # Two networks of the same shapes may differ in what their modules hold: heads, scales.
    key = repr((_environment(), about, str(tree), shapes))
    key = re.sub(r" at 0x[0-9a-f]+", "", key)  # an object's address is another in each process
    file = epath.Path(folder) / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.stablehlo"
    if file.exists():
        try:
            program = export.deserialize(bytearray(file.read_bytes()))
        except Exception as error:  # flatbuffers and MLIR raise what they like
            raise ValueError(f"{file}: can't be read as a program ({error}); delete it") from error
    else:
        function = make()
        program = export.export(
            jax.jit(lambda *leaves: function(*jax.tree.unflatten(tree, leaves)))
        )(*leaves)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as unfinished:
                unfinished.write_bytes(program.serialize())
        except OSError as error:  # somebody else's run, a full disk: no reason not to make pictures
            LOGGER.warning(
                "%s: can't be written (%s); the next call traces the program again", file, error
            )
    call = jax.jit(program.call)
    return lambda *arguments: call(*jax.tree.leaves(arguments))


def _environment() -> tuple:
    """The facts that every program depends on: the code, JAX's settings, the devices."""
    devices = jax.devices()
    return (
        [module.__version__ for module in (jax, jaxlib, flax)],
        _sources(),
        [getattr(jax.config, name) for name in _SETTINGS],
        [device.device_kind for device in devices],
        devices[0].client.platform_version,
    )


@functools.cache
def _sources() -> str:
    """A digest of this package's code."""
    digest, root = hashlib.sha256(), pathlib.Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        code = file.read_bytes()
        digest.update(f"{file.relative_to(root)} {len(code)} ".encode() + code)
    return digest.hexdigest()
