"""Whose turn it is on a device that several processes share.

They load and compile at the same time, for that is work of the host; who measures has the device
and the host alone. Processes that know of no common file are alone anyway.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
from collections.abc import Iterator
from typing import IO

FILE = "CONTEXTDIFF_TURNS"  # the environment variable that names the file which is locked


@functools.cache
def _file() -> IO | None:
    name = os.environ.get(FILE)
    return open(name, "a") if name else None  # noqa: SIM115  (locked as long as the process lives)


def begin() -> None:
    """From now on this process works beside others, and nobody measures."""
    if file := _file():
        fcntl.flock(file, fcntl.LOCK_SH)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait until all others have ended or wait for their turn too; then they wait for this one."""
    if (file := _file()) is None:
        yield
        return
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_SH)
