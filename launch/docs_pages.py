"""mkdocs' hook: what the site has beside the pages in docs/, and what it makes of their text.

- The reference, written from the code (launch/docs_reference.py).
- The notebook as a page, with the pictures that its cells made.
- A page for each file of the repository that a page links to.
- Formulas, $$...$$, as MathML: browsers draw it without a script, so nothing comes from a network.
"""

from __future__ import annotations

import base64
import json
import pathlib
import posixpath
import re
from collections.abc import Iterator

import docs_reference  # beside this file: mkdocs puts its folder on the path
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".sh": "bash", ".toml": "toml", ".yml": "yaml", ".md": "markdown"}
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changes.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that no file in docs/ holds."""
    made: dict[str, str | bytes] = dict(docs_reference.pages())
    for name, path in ROOT_PAGES.items():
        text = (ROOT / name).read_text()
        made[path] = LINK.sub(lambda link: _from_root(link), text)
    for notebook in sorted(DOCS.glob("*.ipynb")):
        made |= notebook_pages(notebook)
    linked = {file for page in DOCS.rglob("*.md") for file in _outside(page)}
    for file in sorted(linked - {ROOT / name for name in ROOT_PAGES}):
        made[source_path(file)] = source_page(file)
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that leave docs/ lead to the pages that were made of their files."""
    here = posixpath.dirname(page.file.src_uri)

    def inside(link: re.Match) -> str:
        target, anchor = link[1], link[2] or ""
        if "://" in target or page.file.abs_src_path is None:
            return link[0]
        if target.endswith(".ipynb"):
            return f"]({target[: -len('.ipynb')]}.md{anchor})"
        file = (DOCS / here / target).resolve()
        if file.is_relative_to(DOCS) or not file.is_file():
            return link[0]
        made = ROOT_PAGES.get(str(file.relative_to(ROOT))) or source_path(file)
        return f"]({posixpath.relpath(made, here or '.')}{anchor})"

    return LINK.sub(inside, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas in LaTeX, which arithmatex has found, become MathML."""
    block = re.compile(r'<(div|span) class="arithmatex">\\([\[(])(.*?)\\[\])]</\1>', re.S)

    def drawn(found: re.Match) -> str:
        latex = found[3].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
        return convert(latex, display="block" if found[2] == "[" else "inline")

    return block.sub(drawn, html)


def _from_root(link: re.Match) -> str:
    """A link of a page at the repository's root, as it is from docs/."""
    target = link[1]
    if "://" not in target:
        target = ROOT_PAGES.get(target) or posixpath.relpath(target, "docs")
        if not target.startswith("..") or (ROOT / link[1]).is_dir():
            return f"]({target}{link[2] or ''})"
        raise ValueError(f"{link[0]}: leaves docs/; link to a page")
    return link[0]


def _outside(page: pathlib.Path) -> Iterator[pathlib.Path]:
    """The files of the repository, out of docs/, that the page links to."""
    for target, _ in LINK.findall(page.read_text()):
        file = (page.parent / target).resolve()
        if "://" not in target and file.is_file() and not file.is_relative_to(DOCS):
            yield file


def source_path(file: pathlib.Path) -> str:
    """Where in the site the page of a file is."""
    return f"source/{file.relative_to(ROOT)}.md"


def source_page(file: pathlib.Path) -> str:
    """A page that shows a file of the repository."""
    language = LANGUAGES.get(file.suffix, "text")
    return f"# {file.relative_to(ROOT)}\n\n````{language}\n{file.read_text()}````\n"


def notebook_pages(notebook: pathlib.Path) -> dict[str, str | bytes]:
    """{path in the site: content} of a notebook: a page, and its cells' pictures."""
    made: dict[str, str | bytes] = {}
    parts = [f"[The notebook itself]({notebook.name}), to run it."]
    for number, cell in enumerate(json.loads(notebook.read_text())["cells"]):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            printed = "".join(output.get("text", data.get("text/plain", "")))
            if "image/png" in data:
                picture = f"{notebook.stem}_{number}.png"
                made[picture] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![]({picture})")
            elif printed.strip():
                parts.append(f"```text\n{printed.rstrip()}\n```")
    title = parts.pop(1)  # the page begins with its title
    made[f"{notebook.stem}.md"] = "\n\n".join([title, *parts]) + "\n"
    return made
