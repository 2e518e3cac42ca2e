"""The commands' common parts: flags, errors in one line with exit status 2."""

from __future__ import annotations

import ctypes
import glob
import json
import logging
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from contextdiff_jax.keys import LARGEST

flags.disclaim_key_flags()  # --help of a command shows what it defines by the functions below
CONFIG = None
# Fields of configs that name files or folders.
PATHS = (
    "data.path",
    "data.metadata",
    "data.heldout_metadata",
    "data.index_folder",
    "data.tokenizer",
    "train.init_from",
    "context.clip",
    "text.pretrained",
    "model.pretrained",
    "latent.vae",
    "video.path",
    "video.model",
    "edit.clip",
    "edit.pickscore",
    "edit.lpips",
)
# Endings of the pictures that are written by a name of the user's.
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pdf")
STARTED = time.perf_counter()  # every command's first import is this module's


class RunError(RuntimeError):
    """A run that can't go on; its text is the one line for the person at the terminal."""


def define_config() -> None:
    """Defines --config=FILE with overrides --config.a.b=c. Read it with `read_config` in the
    command.
    """
    global CONFIG
    CONFIG = config_flags.DEFINE_config_file(
        "config", None, "Config file; a field is set by --config.a.b=c."
    )


def read_config() -> dict[str, Any]:
    """The config with its overrides, as plain JSON-able values; `~` in its paths is the home."""
    if CONFIG is None or CONFIG.value is None:
        raise ValueError("--config: missing; name a config file, as in --config=configs/shapes.py")
    config = json.loads(json.dumps(CONFIG.value.to_dict()))
    for name in PATHS:
        section, field = name.split(".")
        values = config.get(section)
        if isinstance(values, dict) and isinstance(values.get(field), str):
            values[field] = expand(values[field], name)
    return config


def expand(path: str, name: str) -> str:
    """`path` with `~` and `~user` as the home folder, which the shell leaves alone in --flag=~/x.

    Raises ValueError, naming the field `name` if it isn't empty, where there is no such user.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        where = f"{name}={path}: " if name else ""
        raise ValueError(f"{where}there is no such user; write ./{path} for such a name")
    return expanded


class _Path(flags.ArgumentParser):
    """A path, with `~` as the home folder."""

    def parse(self, argument: str) -> str:
        return expand(argument, "")

    def flag_type(self) -> str:
        return "path"


class _Finite(flags.FloatParser):
    """A number: neither nan nor inf, which absl's bounds let through."""

    def convert(self, argument: Any) -> float:
        value = super().convert(argument)
        if not math.isfinite(value):
            raise ValueError("must be a finite number")
        return value


def define_path(name: str, default: str | None, help: str) -> flags.FlagHolder:
    """A flag that names a file or a folder."""
    return flags.DEFINE(_Path(), name, default, help)


def define_paths(name: str, help: str) -> flags.FlagHolder:
    """A flag that names a file or a folder, and may be given many times."""
    return flags.DEFINE_multi(_Path(), flags.ArgumentSerializer(), name, [], help)


def define_float(
    name: str, default: float | None, help: str, lower: float | None = None
) -> flags.FlagHolder:
    """A flag that is a finite number, of at least `lower`."""
    return flags.DEFINE(_Finite(lower_bound=lower), name, default, help)


def define_seed(help: str) -> flags.FlagHolder:
    """--seed, a whole number of 64 bits."""
    return flags.DEFINE_integer("seed", 0, help, lower_bound=0, upper_bound=LARGEST)


def output_folder(flag: str, value: str | None, file: str = "") -> pathlib.Path:
    """The folder that `--flag=value` names, once it is known that files can be written there.

    To be called before the work whose results it is for. Makes nothing. `file`: what the flag says
    if that is a file in the folder. Raises ValueError, naming the flag, for a file in the folder's
    place, a bucket, and a place that can't be written.
    """
    if not value:
        raise ValueError(f"--{flag}: missing; name the folder to write to")
    path, given = pathlib.Path(value), f"--{flag}={file or value}"
    if "://" in given:
        raise ValueError(f"{given}: is remote; this command writes to local folders only")
    there = next(p for p in (path, *path.absolute().parents) if p.exists() or p.is_symlink())
    if not there.is_dir():
        what = "is a file" if there == path and not file else f"lies below {there}, a file"
        raise ValueError(f"{given}: {what}; name another folder")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"{given}: can't be written ({error.strerror})") from None
    return path


def output_file(flag: str, value: str, suffixes: Sequence[str] = ()) -> pathlib.Path:
    """The file that `--flag=value` names, once it can be written there.

    Its name must end in one of `suffixes` (none: anything will do); its folder is checked as by
    `output_folder`.
    """
    path = pathlib.Path(value or "")
    if not value:
        raise ValueError(f"--{flag}: missing; name a file")
    if not path.name or path.is_dir() or value.endswith("/"):
        raise ValueError(f"--{flag}={value}: is a folder; name a file")
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"--{flag}={value}: must end in one of {', '.join(suffixes)}")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"--{flag}={value}: can't be written (it is read-only)")
    output_folder(flag, str(path.parent), value)
    return path


def is_remote(path: pathlib.Path) -> bool:
    """Whether it is a bucket's, such as gs://BUCKET/run (an `epath.Path`), which has no working
    directory.
    """
    return "://" in str(path)


def num_cores() -> int:
    """The cores that this process may use: XLA's threads are as many."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_device_a_core(batch_size: int) -> None:
    """Gives JAX one device per core of a CPU, if they can share a batch evenly.

    This is the fastest (docs/performance.md). To be called before JAX looks for devices.
    JAX_NUM_CPU_DEVICES and XLA_FLAGS have the last word.
    """
    import jax

    told = (
        "JAX_NUM_CPU_DEVICES" in os.environ
        or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    )
    if not told and batch_size % num_cores() == 0:
        jax.config.update("jax_num_cpu_devices", num_cores())


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


def keep_freed_memory() -> None:
    """Keeps freed memory in the process, in one heap, on a host without an accelerator.

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
    # malloc.h: M_MMAP_MAX none, M_TRIM_THRESHOLD never, M_ARENA_MAX one.
    for option, value in ((-4, 0), (-1, -1), (-8, 1)):
        libc.mallopt(option, value)


def run(main: Callable[[], None]) -> None:
    """Parses flags and calls `main`. What the user can put right is one line on stderr and exit
    status 2.
    """
    keep_freed_memory()

    def parse(argv):
        home = "--config=~"  # an argument that no shell expands, nor the flag's own parser
        argv = [
            f"--config={expand(a.partition('=')[2], '--config')}" if a.startswith(home) else a
            for a in argv
        ]
        try:
            left = flags.FLAGS(argv)
        # ml_collections' error for an override of an unknown field
        except AttributeError as error:
            raise flags.Error(f"--config: unknown field: {_innermost(error)}") from error
        # the same, for an unknown section
        except KeyError as error:
            raise flags.Error(f"--config: unknown section: {_innermost(error)}") from error
        if left[1:]:
            raise flags.Error(f"{left[1]!r}: unexpected argument; options start with --")
        return left

    def guarded(_):
        # Ours at INFO; the libraries' own (Orbax logs dozens of lines a save) at WARNING.
        absl_logging.set_verbosity(absl_logging.WARNING)
        logging.getLogger("contextdiff_jax").setLevel(logging.INFO)
        try:
            main()
        except (ValueError, RunError, OSError) as error:
            _fail(error)

    try:
        app.run(guarded, argv=sys.argv, flags_parser=parse)
    except (flags.Error, ValueError, KeyError, TypeError, OSError) as error:
        _fail(error)


def _innermost(error: Exception) -> str:
    """The text of an exception that may wrap others in its first argument, without the quotes that
    KeyError adds.
    """
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    return str(error.args[0] if error.args else error).replace("\n", "; ")


def _fail(error: Exception) -> None:
    if os.environ.get("CONTEXTDIFF_TRACEBACK"):
        raise error
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)
