"""The commands' common parts: flags, errors in one line with exit status 2."""

from __future__ import annotations

import json
import logging
import math
import os
import pathlib
import pkgutil
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from contextdiff_jax import configs
from contextdiff_jax.runtime import help_page, terminal
from contextdiff_jax.runtime.errors import RunError, one_line
from contextdiff_jax.runtime.help_page import Entry
from contextdiff_jax.runtime.host import (
    collect_garbage_seldom,
    keep_freed_memory,
    suit_processor,
)
from contextdiff_jax.runtime.keys import LARGEST

_BEFORE = {*flags.FLAGS}  # of the libraries; --help of a command shows what it defines itself
LOGGER = logging.getLogger(__name__)  # a command's own would be `__main__`'s, which is silent
CONFIG = None
GROUPS: list[tuple[str, set[str]]] = []  # titles, each with the names of the flags before it
# What stands for a flag's value in --help, by its type; TEXT for the others.
VALUES = {
    "int": "N",
    "float": "X",
    "path": "PATH",
    "comma separated list of strings": "A,B",
    "multi path": "PATH",
}
SETTING, SETS = "--config.SECTION.FIELD=VALUE", "Sets a field, as in --config.train.steps=500."
HELP = {"--help", "-help", "--helpshort", "-helpshort", "-h"}
# Fields of configs that name files or folders.
PATHS = (
    "data.path",
    "data.metadata",
    "data.heldout_metadata",
    "data.index_folder",
    "data.tokenizer",
    "train.init_from",
    "distill.teacher",
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


def define_config() -> None:
    """Defines --config=FILE with overrides --config.a.b=c. Read it with `read_config` in the
    command.
    """
    global CONFIG
    CONFIG = config_flags.DEFINE_config_file(
        "config", None, f"A config's name or Python file. Names: {', '.join(configs.names())}."
    )
    flags.FLAGS["config"].parser = _Config("config")
    list_names("config", FIELDS)


class _Config(ConfigFileFlagParser):
    """A config's name or file, with `:ARGUMENT` for its `get_config` or without."""

    def parse(self, argument: str) -> Any:
        name, colon, rest = argument.partition(":")
        try:
            file = configs.find(expand(name, ""))
        except ValueError as error:
            raise flags.Error(f"--config={error}") from None
        if os.getcwd() not in sys.path:  # as `python -m`: a config may import its neighbours
            sys.path.append(os.getcwd())
        try:
            return super().parse(f"{file}{colon}{rest}")
        except ImportError as error:
            raise flags.Error(f"--config={name}: {error}") from error


# Where the names are that a flag, or a field of a config, takes: MODULE:TABLE.
SAMPLERS = "contextdiff_jax.diffusion.samplers:SAMPLERS"
SPACINGS = "contextdiff_jax.diffusion.grids:NAMES"
METRICS = "contextdiff_jax.evaluation.metrics:METRICS"
FIELDS = {
    "data.source": "contextdiff_jax.data:SOURCES",
    "diffusion.schedule": "contextdiff_jax.diffusion.schedule:NAMES",
    "diffusion.prediction_type": "contextdiff_jax.diffusion.process:TARGETS",
    "context.kind": "contextdiff_jax.models.context_kinds:KINDS",
    "context.estimate": "contextdiff_jax.settings.process:ESTIMATES",
    "context.shift": "contextdiff_jax.diffusion.process:SHIFTS",
    "mesh.rules": "contextdiff_jax.parallel.mesh:RULES",
    "sample.sampler": SAMPLERS,
}


class _Names:
    """The names in tables, read when `--help` prints them: the modules import JAX."""

    def __init__(self, tables: dict[str, str]):
        self._tables = tables

    def lines(self) -> list[str]:
        names = {what: pkgutil.resolve_name(table) for what, table in self._tables.items()}
        return [f"{what}: {', '.join(table)}" for what, table in names.items()]

    def __str__(self) -> str:
        return "; ".join(self.lines())


def list_names(flag: str, tables: dict[str, str]) -> None:
    """Has `--help` list under the flag the names in tables: {what they are: MODULE:TABLE}."""
    parser = flags.FLAGS[flag].parser = copy(flags.FLAGS[flag].parser)
    parser.syntactic_help = _Names(tables)


def group(title: str) -> None:
    """Head the flags that are defined from here on, up to the next group, in `--help`."""
    GROUPS.append((title, {*flags.FLAGS}))


def make_help(main: Callable[[], None]) -> str:
    """Return what `--help` prints: the docstring of the command whose `main` it is, its flags."""
    groups: dict[str, list[Entry]] = {}
    own = [flags.FLAGS[name] for name in flags.FLAGS if name not in _BEFORE]
    # a config is what a command begins with, though its flag is defined last
    for flag in sorted(own, key=lambda flag: flag.name != "config"):
        heads = [title for title, before in GROUPS if flag.name not in before] or ["Flags"]
        if flag.name == "config":
            entries = [Entry("--config=NAME", flag.help), Entry(SETTING, SETS, _names(flag))]
            groups[heads[0]] = entries
        else:
            default = _default(flag)
            help = flag.help.partition(";\n")[0]  # absl says of a list how it is given
            help += f" (default: {default})" if default else ""
            groups.setdefault(heads[-1], []).append(Entry(_typed(flag), help, _names(flag)))
    width = shutil.get_terminal_size().columns
    return help_page.make_page(main.__globals__["__doc__"], groups, width)


def _typed(flag: flags.Flag) -> str:
    """The flag as one types it."""
    if flag.boolean:
        return f"--{flag.name}"
    if isinstance(flag.parser, flags.EnumParser):
        return f"--{flag.name}={'|'.join(flag.parser.enum_values)}"
    return f"--{flag.name}={VALUES.get(flag.parser.flag_type(), 'TEXT')}"


def _default(flag: flags.Flag) -> str:
    if flag.boolean or flag.default in (None, "", []):
        return ""
    return ",".join(flag.default) if isinstance(flag.default, list) else str(flag.default)


def _names(flag: flags.Flag) -> list[str]:
    names = flag.parser.syntactic_help
    return names.lines() if isinstance(names, _Names) else []


def read_config() -> dict[str, Any]:
    """The config with its overrides, as plain JSON-able values; `~` in its paths is the home."""
    if CONFIG is None or CONFIG.value is None:
        raise ValueError("--config: missing; name a config, as in --config=shapes")
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


class PerStage(list):
    """The values of a flag for a cascade's stages, one each; None: the stage's own."""


class _Stages(flags.ArgumentParser):
    """One value, or several for the stages of a cascade, which may be left empty."""

    def __init__(self, one: flags.ArgumentParser, between: str):
        self._one, self._between = one, between
        self.syntactic_help = one.syntactic_help

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str) or self._between not in argument:
            return self._one.parse(argument)
        parts = argument.split(self._between)
        return PerStage(self._one.parse(part) if part else None for part in parts)

    def flag_type(self) -> str:
        return self._one.flag_type()


def for_stages(flag: flags.FlagHolder, between: str = ",") -> flags.FlagHolder:
    """The flag, which takes a value for each stage of a cascade too, with `between` between."""
    defined = flags.FLAGS[flag.name]
    defined.parser = _Stages(defined.parser, between)
    return flag


def define_count(name: str, default: int | None, help: str) -> flags.FlagHolder:
    """A flag that is a whole number of at least 1, or one for each stage of a cascade."""
    # absl's own bounds are checked of the whole value, as a number
    return flags.DEFINE(_Stages(flags.IntegerParser(lower_bound=1), ","), name, default, help)


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


def define_ema_length() -> flags.FlagHolder:
    """--ema_length, of a run's weights."""
    return define_float(
        "ema_length",
        None,
        "Instead of ema: the average of this length, a share of training, that the snapshots of "
        "train.power_ema make.",
    )


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


def run(main: Callable[[], None]) -> None:
    """Parses flags and calls `main`. What the user can put right is one line on stderr and exit
    status 2.
    """
    if HELP & {*sys.argv[1:]}:
        print(make_help(main))
        return
    suit_processor()
    keep_freed_memory()
    collect_garbage_seldom()

    def parse(argv):
        try:
            left = flags.FLAGS(argv)
        except flags.IllegalFlagValueError as error:
            # what a config file raised comes as the text of its whole traceback
            *before, last = str(error).strip().splitlines()
            if not any("Traceback" in line for line in before):
                raise
            raise flags.Error(f"--config: {last.partition(': ')[2] or last}") from error
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
        absl_logging.set_verbosity(absl_logging.WARNING)
        terminal.set_up_logging()
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
    print(f"error: {one_line(error)}", file=sys.stderr)
    sys.exit(2)
