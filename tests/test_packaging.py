"""What is installed: the wheel's contents, its commands, and that they work in an empty folder."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from conftest import ROOT, SMALLEST_BY_FLAGS, TINY, overrides

from contextdiff_jax import __version__, configs
from contextdiff_jax.__main__ import COMMANDS, make_list

PACKAGE = ROOT / "contextdiff_jax"
SCRIPTS = {f"contextdiff-{name.replace('_', '-')}": name for name in COMMANDS}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """The wheel, built from a copy: what an earlier build left in the clone would be packed too."""
    source, folder = (tmp_path_factory.mktemp(name) for name in ("source", "dist"))
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("contextdiff_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    single = ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "CITATION.cff")
    for file in [*(ROOT / name for name in single), *ROOT.glob("requirements*.txt")]:
        shutil.copy(file, source)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, folder], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> pathlib.Path:
    """A folder that has of the wheel what site-packages gets."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_the_package_with_its_configs_and_nothing_beside_it(unpacked):
    top = {path.name for path in unpacked.iterdir()}
    assert top == {"contextdiff_jax", f"contextdiff_jax-{__version__}.dist-info"}
    there = {file for file in unpacked.rglob("*") if file.is_file()}
    packed = {str(file.relative_to(unpacked / "contextdiff_jax")) for file in there
              if file.is_relative_to(unpacked / "contextdiff_jax")}  # fmt: skip
    wanted = {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*") if file.is_file()}
    wanted |= {f"configs/{file.relative_to(configs.FOLDER)}" for file in configs.FOLDER.rglob("*")
               if file.is_file()}  # fmt: skip
    assert packed == {name for name in wanted if "__pycache__" not in name}
    for file in (unpacked / "contextdiff_jax/configs").rglob("*.py"):  # there is no `configs` there
        assert not re.search(r"^(from|import) configs\b", file.read_text(), re.M), file


def test_every_command_has_its_console_script_and_every_requirements_file_its_extra(unpacked):
    (facts,) = importlib.metadata.distributions(path=[str(unpacked)])
    scripts = {entry.name: entry.value for entry in facts.entry_points}
    expected = {name: f"contextdiff_jax.{module}:command" for name, module in SCRIPTS.items()}
    assert scripts == expected | {"contextdiff": "contextdiff_jax.__main__:command"}
    assert {"cuda", "tpu", "demo", "docs", "test", "wandb"} <= {
        *facts.metadata.get_all("Provides-Extra")
    }
    needs = [need.replace(" ", "") for need in facts.requires]
    assert any(re.fullmatch(r"jax==[\d.]+", need) for need in needs)
    assert any(re.fullmatch(r"""jax\[cuda13\]==[\d.]+;extra=="cuda\"""", need) for need in needs)
    assert not any(need.startswith("-") for need in needs)


def test_the_list_of_commands_is_whole_and_imports_no_jax():
    commands = {
        file.stem for file in PACKAGE.glob("*.py") if "    cli.run(main)" in file.read_text()
    }
    assert commands == {*COMMANDS}
    code = (
        "import sys; from contextdiff_jax.__main__ import command; command(); "
        "sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout == f"{make_list()}\n", done.stderr
    for name in COMMANDS:
        (line,) = re.findall(rf"^  {name} .*$", done.stdout, re.M)
        assert len(line) <= 100 and len(line.split()) > 4


def test_a_config_is_found_by_name_in_any_folder(unpacked, tmp_path):
    """In the layout of an installation: names, paths of a clone, and modules that import others."""
    code = (
        "import contextdiff_jax; from contextdiff_jax import configs\n"
        "from importlib.util import find_spec\n"
        "print(contextdiff_jax.__file__)\n"
        "print(configs.find('shapes'), configs.find('configs/shapes.py'))\n"
        "print(configs.find('toy', 'experiments'), configs.find('mine.py'))\n"
        "print(find_spec('contextdiff_jax.configs.experiments.shapes_one').origin)\n"
    )
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "configs").mkdir()  # of the user's own, with nothing of ours
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(unpacked), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    there = unpacked / "contextdiff_jax"
    shapes = there / "configs/shapes.py"
    assert done.stdout.split() == [
        *map(str, (there / "__init__.py", shapes, shapes)),
        *map(str, (there / "configs/experiments/toy.py", "mine.py")),
        str(there / "configs/experiments/shapes_one.py"),
    ]


@pytest.mark.parametrize(
    "value, found", [("shapes", "shapes.py"), ("configs/emoji.py", "emoji.py")]
)
def test_a_path_is_itself_and_a_name_is_the_packages(tmp_path, monkeypatch, value, found):
    monkeypatch.chdir(tmp_path)
    assert configs.find(value) == ROOT / "configs" / found
    own = tmp_path / "configs" / found
    own.parent.mkdir()
    own.write_text("")
    assert configs.find(str(own)) == own
    with pytest.raises(ValueError, match=r"^shapez: no such file; by name there are base, "):
        configs.find("shapez")


def test_the_citation_and_the_changes_are_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {__version__}" in citation and "2402.16627" in citation
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"] in citation


@pytest.mark.slow
def test_an_installed_wheel_trains_and_samples_in_an_empty_folder(wheel, tmp_path):
    """`bash launch/test.sh -m slow tests/test_packaging.py`: minutes, most of them pip's."""
    work = tmp_path / "work"
    work.mkdir()

    def run(*words: str | pathlib.Path) -> str:
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(
            [*map(str, words)],
            cwd=work,
            env=clean | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert done.returncode == 0, (words, done.stderr[-3000:])
        return done.stdout

    run(sys.executable, "-m", "venv", tmp_path / "venv")
    programs = tmp_path / "venv/bin"
    run(programs / "python", "-m", "pip", "install", "--quiet", "--no-compile", wheel)
    assert run(programs / "contextdiff") == f"{make_list()}\n"
    for script, module in SCRIPTS.items():
        assert f"python -m contextdiff_jax.{module} --" in run(programs / script, "--help")
    short = overrides(TINY | SMALLEST_BY_FLAGS | {"train.steps": 2})
    run(programs / "contextdiff-train", "--config=base", "--workdir=run", *short)
    run(programs / "contextdiff-sample", "--workdir=run", "--prompt=a circle", "--out=grid.png")
    assert (work / "grid.png").stat().st_size > 100
    own = "from contextdiff_jax.configs import base\n\nget_config = base.get_config\n"
    (work / "mine.py").write_text(own)
    run(programs / "contextdiff", "train", "--config=mine.py", "--workdir=other", *short)
    assert (work / "other/checkpoints/2").is_dir()
