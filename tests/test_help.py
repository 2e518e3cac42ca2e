"""`--help`: an example first, then what the command does, then its own flags by groups."""

from __future__ import annotations

import ast
import re
import shlex
import sys

import pytest
from absl import flags
from command_flags import command_of, flags_of, parse
from conftest import ROOT

from contextdiff_jax import cli
from contextdiff_jax.__main__ import COMMANDS
from contextdiff_jax.runtime.help_page import Entry, make_page


def file_of(name):
    return ROOT / "contextdiff_jax" / f"{name}.py"


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_its_example_and_each_of_its_flags_once(name, wide):
    with command_of(file_of(name)) as (defined, main):
        own = sorted(flag for flag in defined if flag not in cli._BEFORE)
        page = cli.make_help(main)  # imports libraries, which define flags of their own
    assert page.startswith(f"Example:\n  python -m contextdiff_jax.{name} --")
    shown = re.findall(r"^  --(?:\[no\])?(\w+)(?=[= \n]|$)", page, re.M)
    assert sorted(shown) == own and "flagfile" not in page
    assert all(len(line) <= 100 for line in page.splitlines())
    assert "repeat this option" not in page and "None" not in page


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_the_help_are_commands_that_parse(name):
    text = ast.get_docstring(ast.parse(file_of(name).read_text())).partition("\n\n")[0]
    for line in text.splitlines():
        python, m, module, *arguments = shlex.split(line)
        assert (python, m, module) == ("python", "-m", f"contextdiff_jax.{name}")
        parse(file_of(name), arguments)


def test_flags_stand_under_the_title_before_them(wide):
    with command_of(file_of("sample")) as (_, main):
        page = cli.make_help(main)
    groups = dict(re.findall(r"^(\S[^\n]*):\n(  --.*?)(?=\n\n|\Z)", page, re.M | re.S))
    assert [*groups] == [
        "Model and prompts",
        "Steps",
        "Guidance and context",
        "Seed, weights, size",
        "From a picture",
        "Output",
    ]
    assert "--mask=PATH" in groups["From a picture"] and "--out=PATH" in groups["Output"]
    assert re.search(r"--num=N +Pictures a prompt\. \(default: 1\)", groups["Model and prompts"])
    assert "one of: ddpm, ddim" in groups["Steps"]


def test_the_page_fits_a_narrow_terminal():
    entries = {"Some": [Entry("--a=N", "word " * 20), Entry("--a_long_name_of_a_flag=TEXT", "b")]}
    page = make_page("python -m x --a=1\n\n" + "About it. " * 20, entries, 50)
    assert max(map(len, page.splitlines())) <= 50
    assert page.endswith("\n  --a_long_name_of_a_flag=TEXT\n" + 28 * " " + "b")


@pytest.mark.parametrize("asked", ["--help", "-h"])
def test_help_is_printed_without_running_anything(monkeypatch, capsys, asked):
    def main():
        raise AssertionError("it ran")

    monkeypatch.setitem(main.__globals__, "__doc__", "python -m it\n\nDo it.")
    monkeypatch.setattr(sys, "argv", ["it", asked])
    cli.run(main)
    assert capsys.readouterr().out.startswith("Example:\n  python -m it\n\nDo it.\n")


def test_a_config_that_cannot_be_imported_is_one_line(tmp_path):
    (tmp_path / "mine.py").write_text("import no_such_module\n")
    with pytest.raises(flags.Error, match=r"^--config=\S+/mine.py: No module named 'no_such_mod"):
        parse(file_of("train"), [f"--config={tmp_path}/mine.py"])


def test_a_config_may_import_what_lies_in_the_working_folder(tmp_path, monkeypatch):
    """As by `python -m`: a console script has its own folder in sys.path instead."""
    (tmp_path / "a_neighbour.py").write_text("STEPS = 7\n")
    (tmp_path / "mine.py").write_text(
        "from ml_collections import ConfigDict\n\nimport a_neighbour\n\n\n"
        "def get_config():\n    return ConfigDict({'train': {'steps': a_neighbour.STEPS}})\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    with flags_of(file_of("train")) as defined:
        defined(["train", "--config=mine.py"])
        assert defined["config"].value.train.steps == 7
    assert sys.path[-1] == str(tmp_path)
