"""A command's flags by themselves, in this process: absl's are one table for all modules."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import runpy
from collections.abc import Callable, Iterator
from unittest import mock

from absl import flags

from contextdiff_jax import cli


@contextlib.contextmanager
def flags_of(file: pathlib.Path) -> Iterator[flags.FlagValues]:
    """absl's flags as the command in `file` defines them, and no others."""
    with command_of(file) as (defined, _):
        yield defined


def run(file: pathlib.Path, arguments: list[str]) -> None:
    """Runs the command in this process. Raises what `cli.run` would print as one line."""
    with command_of(file) as (defined, main):
        defined([str(file), *arguments])
        main()


@contextlib.contextmanager
def command_of(file: pathlib.Path) -> Iterator[tuple[flags.FlagValues, Callable[[], None]]]:
    """Its flags, and its `main`."""
    before, config, groups = dict(flags.FLAGS.__dict__), cli.CONFIG, [*cli.GROUPS]
    cli.GROUPS.clear()
    flags.FLAGS.__dict__.update(flags.FlagValues().__dict__)
    try:
        with mock.patch.object(cli, "run") as called:
            runpy.run_path(str(file), run_name="__main__")
        yield flags.FLAGS, called.call_args and called.call_args.args[0]
    finally:
        flags.FLAGS.__dict__.update(before)
        cli.CONFIG, cli.GROUPS[:] = config, groups


def parse(file: pathlib.Path, arguments: list[str]) -> None:
    """Parses them by the command's own flags, config files and overrides included; nothing is run.

    Raises what the command would print.
    """
    argv = [str(file), *arguments]
    with mock.patch("sys.argv", argv):
        if "import argparse" in file.read_text():
            return _parse_by_argparse(file)
        with flags_of(file) as defined:
            left = defined(argv)[1:]
            if left:
                raise flags.Error(f"{left[0]!r}: unexpected argument")
            if "config" in defined and defined["config"].value is not None:
                defined["config"].value.to_dict()


def _parse_by_argparse(file: pathlib.Path) -> None:
    class Parsed(Exception):
        pass

    parse_known = argparse.ArgumentParser.parse_args

    def parse_args(self, *arguments):
        raise Parsed(parse_known(self, *arguments))

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args):
        with contextlib.suppress(Parsed):
            runpy.run_path(str(file), run_name="__main__")
