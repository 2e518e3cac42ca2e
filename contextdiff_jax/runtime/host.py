"""The machine that a process runs on, and how JAX is set up for it: cores, memory, caches."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import glob
import math
import mmap
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import DTypeLike

STARTED = time.perf_counter()  # every command's first import of the package is this module's


@contextlib.contextmanager
def hidden(package: str) -> Iterator[None]:
    """Inside it `package`, unless it is imported already, is as if it were not installed: for an
    import of what takes `package` where it can, and does without it where it can't.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # Python's own sign: an import raises ModuleNotFoundError
    try:
        yield
    finally:
        del sys.modules[package]


def is_remote(path: pathlib.Path) -> bool:
    """Whether it is a bucket's, such as gs://BUCKET/run (an `epath.Path`), which has no working
    directory.
    """
    return "://" in str(path)


def num_cores() -> int:
    """The cores that this process may use: XLA's threads are as many."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_device_a_core(batch_size: int) -> None:
    """On a CPU JAX shall have a device a core, the fastest (docs/performance.md), where they can
    share a batch evenly. To be called before JAX looks for devices. JAX_NUM_CPU_DEVICES and
    XLA_FLAGS have the last word.
    """
    import jax

    told = (
        "JAX_NUM_CPU_DEVICES" in os.environ
        or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    )
    if not told and batch_size % num_cores() == 0:
        jax.config.update("jax_num_cpu_devices", num_cores())


def leave_memory() -> None:
    """Another library computes on the same GPU: JAX shall take memory as it needs it, not three
    quarters at once. To be called before JAX looks for devices.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def set_compilation_cache(workdir: pathlib.Path) -> str:
    """Compiled programs are kept in DIR/compiled/N-cores, unless JAX_COMPILATION_CACHE_DIR says
    where.

    By cores, because a CPU program is split for the threads of the process that compiled it, which
    JAX's key leaves out: what was compiled on one core runs its element-wise parts on one core
    everywhere.
    """
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = (
            (workdir if is_remote(workdir) else workdir.absolute())
            / "compiled"
            / f"{num_cores()}-cores"
        )
        jax.config.update("jax_compilation_cache_dir", str(folder))
    return jax.config.jax_compilation_cache_dir


def user_cache() -> pathlib.Path:
    """The user's folder of what is computed once and isn't part of a run: compiled programs."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "contextdiff_jax"


def pages(shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
    """An array of zeros on memory pages of its own.

    JAX's CPU devices take such memory as it is; they copy what doesn't begin at a multiple of 64.
    """
    import numpy as np

    dtype, count = np.dtype(dtype), math.prod(shape)
    # mmap's default, memory that children share, takes the kernel half as long again to hand out.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, max(count * dtype.itemsize, 1), private)
    return np.frombuffer(memory, dtype, count).reshape(shape)


def suit_processor(cpuinfo: str | None = None) -> None:
    """XLA's options for this processor, which it reads when it first computes. A user's XLA_FLAGS
    have the last word.

    On an Intel processor with AVX-512 LLVM is told to use all 512 bits, which by itself it holds
    for too hot there: training ran at 0.85 of torch's pace, without at 0.79. An AMD Zen 4 has
    AVX-512 too; its training steps take as long either way (docs/performance.md).

    Args:
      cpuinfo: what Linux says of the processor; None: /proc/cpuinfo, where there is one.
    """
    if cpuinfo is None:
        file = pathlib.Path("/proc/cpuinfo")
        cpuinfo = file.read_text(errors="replace") if file.exists() else ""
    own = os.environ.get("XLA_FLAGS", "")
    wide = "GenuineIntel" in cpuinfo and "avx512f" in cpuinfo.split()
    if wide and "xla_cpu_prefer_vector_width" not in own:
        os.environ["XLA_FLAGS"] = f"--xla_cpu_prefer_vector_width=512 {own}".strip()


def keep_freed_memory() -> None:
    """On a host without an accelerator: memory that was freed stays the process's, in one heap.

    XLA's CPU backend takes a program's temporaries anew at each call, hundreds of MiB that glibc
    otherwise gives back to the kernel after it: their page faults were a sixth of a training step
    (docs/performance.md). To be called before threads start.
    """
    if sys.platform != "linux" or any(
        map(glob.glob, ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*"))
    ):
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # musl
        return
    for option, value in (
        (-4, 0),
        (-1, -1),
        (-8, 1),
    ):  # malloc.h: M_MMAP_MAX none, M_TRIM_THRESHOLD never, M_ARENA_MAX one
        libc.mallopt(option, value)


def collect_garbage_seldom() -> None:
    """Python's collector looks less often through what is alive. Tracing a network makes a million
    objects that stay: walking over them again and again was two fifths of tracing's time.
    """
    gc.set_threshold(100_000, 50, 50)
