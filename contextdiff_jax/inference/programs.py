"""Traced programs kept in a folder: the next process needn't build a network and trace it.

A file holds a program's StableHLO (`jax.export`), which is data, not a pickle. What it compiles to
is in JAX's compilation cache: the two together are the executable.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from jax import export

from contextdiff_jax.files import replacing
from contextdiff_jax.parallel.mesh import path_name

LOGGER = logging.getLogger(__name__)


def kept(
    folder: epath.PathLike, name: str, about: Any, make: Callable[[], Callable], *arguments: Any
) -> Callable:
    """`make()`, a function of arrays that can be jitted, as a program for `arguments` and those
    like them: read from `folder`, or traced and written there.

    `about`: all else that the program depends on, told apart by its `repr`. Another version of JAX
        or of this package, another
    number or kind of devices are another program.

    Raises ValueError for a file that isn't what was written.
    """
    leaves, tree = jax.tree.flatten(arguments)
    shapes = [
        (path_name(path), leaf.shape, str(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(arguments)
    ]
    devices = [device.device_kind for device in jax.devices()]
    key = repr(
        (
            jax.__version__,
            _sources(),
            jax.config.jax_default_matmul_precision,
            devices,
            about,
            shapes,
        )
    )
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


@functools.cache
def _sources() -> str:
    """A digest of this package's code."""
    digest = hashlib.sha256()
    for file in sorted(pathlib.Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
