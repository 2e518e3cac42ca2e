"""README and docs are true: snippets run, commands parse, links lead somewhere, recipes work."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from command_flags import flags_of, parse
from conftest import ROOT, SMALLEST, TINY

from contextdiff_jax import diffusion
from contextdiff_jax.__main__ import COMMANDS
from contextdiff_jax.inference.pipeline import Request
from contextdiff_jax.settings import SampleConfig

PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
PACKAGE = ROOT / "contextdiff_jax"
# A fenced block, with the comment before it that says why it is only compiled.
BLOCK = re.compile(r"(<!-- compiled: \S.*? -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)
INDENTED = re.compile(r"(?:^ {4,}\S.*\n)+", re.M)
FIELD = re.compile(r"(?:^|--config\.|\s)([a-z]+)\.([a-z_0-9]+)\b(?!\()")
INLINE = re.compile(r"`([^`\n]+)`")


def ids(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: pathlib.Path, language: str) -> list[tuple[bool, str]]:
    """(whether it is only to be compiled, text) of the page's blocks in that language."""
    found = BLOCK.findall(page.read_text())
    return [(bool(compiled), text) for compiled, name, text in found if name == language]


def prose(page: pathlib.Path) -> str:
    return BLOCK.sub("", page.read_text())


def commands(page: pathlib.Path) -> list[list[str]]:
    """The words of every command in the page: lines joined, variables of the block set."""
    places = [block for name in ("bash", "sh", "") for _, block in blocks(page, name)]
    places += INDENTED.findall(prose(page)) + INLINE.findall(prose(page))
    found = []
    for place in places:
        for name, value in re.findall(r'^(\w+)="(.*)"$', place, re.M):
            place = place.replace(f"${name}", value)
        for line in place.replace("\\\n", " ").splitlines():
            if "python -m contextdiff_jax" in line or "bash launch/" in line:
                found.append(shlex.split(line, comments=True))
    return found


@pytest.fixture(scope="module")
def all_flags() -> set[str]:
    """The flags of all commands."""
    found = {"out", "seed"}
    for file in [*PACKAGE.glob("*.py"), *PACKAGE.glob("*/*.py")]:
        if re.search(r"^    cli\.run\(", file.read_text(), re.M) and file.name != "cli.py":
            with flags_of(file) as flags:
                found |= {*flags}
    return found


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_snippet_runs(page):
    """In the order of the page, each in a namespace of its own."""
    for compiled, text in blocks(page, "python"):
        code = compile(text, ids(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        if not compiled:
            exec(code, {"__name__": "snippet"})


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_command_has_the_flags_that_the_page_gives_it(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        if "bash" in words:  # a launch script: it hands its flags to `train`
            script = words[words.index("bash") + 1]
            assert (ROOT / script).is_file(), script
            file, arguments = PACKAGE / "train.py", [w for w in words if w.startswith("--")]
            if not any(argument.startswith("--config=") for argument in arguments):
                arguments = ["--config=configs/shapes.py", *arguments]
        else:
            start = words.index("-m") + 1
            name = words[start].replace(".", "/")
            file = ROOT / f"{name}/__main__.py" if name == PACKAGE.name else ROOT / f"{name}.py"
            # [--this | --that] are choices: all of them are flags.
            arguments = [word.strip("[]") for word in words[start + 1 :] if word != "|"]
        assert file.is_file(), words
        if file.name == "__main__.py":
            assert not arguments or arguments[0] in COMMANDS, words
            continue
        try:
            parse(file, arguments)
        except Exception as error:
            raise AssertionError(f"{page.name}: {shlex.join(words)}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_field_that_a_page_names_is_one_of_a_config(page):
    from contextdiff_jax.configs import base, edit_shapes, shapes_mmdit, vae_emoji

    modules = (base, edit_shapes, shapes_mmdit, vae_emoji)
    configs = [module.get_config() for module in modules]
    fields = {
        (section, field)
        for config in configs
        for section, values in config.items()
        if hasattr(values, "keys")
        for field in values
    }
    sections = {section for section, _ in fields}
    files = ("py", "md", "json", "jsonl", "safetensors")
    for text in INLINE.findall(prose(page)):
        for section, field in FIELD.findall(text):
            if section in sections and field not in files and not hasattr(diffusion, field):
                assert (section, field) in fields, f"{page.name}: {text}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_flag_that_a_page_names_is_one_of_a_command(page, all_flags):
    for text in INLINE.findall(prose(page)):
        first = text.split()[0]
        if not (first.startswith("--") or (PACKAGE / f"{first}.py").is_file()):
            continue  # another program's
        for name in re.findall(r"(?<![\w-])--([a-z_]+)(?![\w.-])", text):
            known = name in all_flags | {"help"} or name.startswith("xla_")
            assert known, f"{page.name}: --{name}"


def test_the_page_of_sampling_names_every_flag_and_every_option():
    page = (ROOT / "docs/sampling.md").read_text()
    with flags_of(PACKAGE / "sample.py") as flags:
        missing = [name for name in flags if f"`--{name}`" not in page]
    options = [field.name for cls in (Request, SampleConfig) for field in dataclasses.fields(cls)]
    missing += [name for name in options if name != "prompts" and f"`{name}`" not in page]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_link_picture_and_path_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert anchor in {slug(heading) for heading in headings}, f"{page.name}: {target}"
    for path in re.findall(r"[`=]((?:[\w-]+/)+[a-z_0-9]+\.(?:py|sh|md))\b", prose(page)):
        near = [ROOT / path, PACKAGE / path, PACKAGE / "diffusion" / path, page.parent / path]
        assert any(file.is_file() for file in near), f"{page.name}: {path}"


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_recipes_of_the_docs_work_as_they_stand(tmp_path):
    """Each block goes to the end of the file that its first line names, in a copy."""
    for folder in ("contextdiff_jax", "configs"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    followed = []
    for compiled, text in blocks(ROOT / "docs/extending.md", "python"):
        name = re.match(r"# (\S+\.py)\n", text)
        if compiled and name:
            followed.append(name[1])
            with (tmp_path / name[1]).open("a") as file:
                file.write(text)
    assert len(followed) == 7, followed
    tiny = {
        field: ast.literal_eval(value) if isinstance(value, str) else value
        for field, value in (TINY | SMALLEST).items()
    }
    done = subprocess.run(
        [sys.executable, ROOT / "tests/recipes_program.py", tmp_path, json.dumps(tiny)],
        cwd=tmp_path,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
