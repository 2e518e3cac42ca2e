"""The documentation site: its parts are whole, and it builds strictly and offline."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "launch"))
import docs_reference  # noqa: E402  beside the other scripts of the site

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
IN_NAV = re.compile(r": (\S+\.md)$", re.M)
FENCED = re.compile(r"^(`{3,})[^`\n]*\n.*?^\1`*$", re.M | re.S)


def test_every_field_of_every_config_is_in_the_reference_with_its_meaning():
    page = docs_reference.config_page()  # raises for one without a comment
    rows = {row.split("|")[1].strip(): row for row in page.splitlines() if row.startswith("| `")}
    for section in docs_reference.sections():
        for field in section.defaults:
            assert f"`{section.name}.{field}`" in rows
    assert "`plugin`, `posterior_mean`, `velocity`" in rows["`context.estimate`"]
    assert "| `1000` | `int`, at least 1 |" in rows["`train.steps`"]


def test_every_command_is_in_the_reference_with_its_flags():
    page = docs_reference.commands_page()
    assert {"train", "sample", "edit", "evaluate"} <= docs_reference.commands().keys()
    for name in docs_reference.commands():
        assert f"\n## {name}\n" in page
    assert "| `--guidance` |" in page and "### docs.sh" in page


def test_every_page_stands_in_the_navigation_once():
    named = IN_NAV.findall((ROOT / "mkdocs.yml").read_text())
    assert len(set(named)) == len(named)
    there = {str(page.relative_to(DOCS)) for page in PAGES}
    there |= {f"{book.stem}.md" for book in DOCS.glob("*.ipynb")}
    made = {*docs_reference.pages(), "contributing.md", "changes.md"}
    missing = (there | made) - set(named)
    assert not missing, f"mkdocs.yml, nav: add {', '.join(sorted(missing))}"
    assert set(named) <= there | made


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_prose_has_a_hundred_columns(page):
    """Tables, code, formulas and links are as long as they must be."""
    for line in FENCED.sub("", page.read_text()).splitlines():
        free = line.startswith(("|", "    ", "$$")) or "](" in line or line.count("|") > 2
        assert free or len(line) <= 100, line


@pytest.mark.slow
def test_the_site_builds_strictly_and_asks_no_other_host(tmp_path):
    """`bash launch/test.sh -m slow tests/test_site.py`; a broken link or anchor is an error."""
    pytest.importorskip("mkdocs", reason="not installed: requirements-docs.txt")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = re.compile(r"<(?:script|link|img|iframe)[^>]*\b(?:src|href)=\"?(?:https?:)?//[^>]*>")
    styled = re.compile(r"(?:@import|url\()\s*[\"']?(?:https?:)?//")
    for file in [*tmp_path.rglob("*.html"), *tmp_path.rglob("*.css")]:
        text = file.read_text()
        found = loaded.search(text) if file.suffix == ".html" else styled.search(text)
        assert not found, f"{file.name}: {found[0]}"
    assert (tmp_path / "reference/config.html").is_file()
