"""The web page as a visitor has it: served in this process or by the command, and a browser."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

from conftest import ROOT, SMALLEST, XLA_FLAGS, config_dict, random_params
from playwright.sync_api import Page, sync_playwright

from contextdiff_jax.data import load_tokenizer
from contextdiff_jax.inference.opening import of_run
from contextdiff_jax.settings import parse

PATIENCE = 300_000  # milliseconds: a busy machine's


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextlib.contextmanager
def served(files: pathlib.Path) -> Iterator[str]:
    """The address of the page of a tiny model of random weights, served by this process."""
    import jax.numpy as jnp

    from contextdiff_jax.demo_page import server

    settings = parse(config_dict(**SMALLEST, **{"data.source": "shapes"}))
    params = random_params(settings)
    params["context"]["gamma"][...] = jnp.asarray(1.5)
    pipeline = of_run(settings, load_tokenizer(), params, source="step 9 of tiny")
    page = server.make_page(pipeline, "tiny", files)
    try:
        yield server.serve(page, files, port=free_port(), block=False)
    finally:
        page.close(verbose=False)


@contextlib.contextmanager
def commanded(*arguments: str, **environment: str) -> Iterator[str]:
    """The address of the page that the command serves."""
    command = [sys.executable, "-m", "contextdiff_jax.demo", f"--port={free_port()}", *arguments]
    own = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": XLA_FLAGS}
    process = subprocess.Popen(
        command, env=os.environ | own | environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        line = next(line for line in process.stdout if line.startswith("The page: "))
        yield line.split()[2]
    finally:
        process.terminate()
        process.wait(30)


@contextlib.contextmanager
def visited(address: str) -> Iterator[tuple[Page, list[str]]]:
    """The page in a headless Chromium, and what the browser asked for that isn't the page's own.

    Chromium is Debian's (launch/test.sh installs it); a machine without it fails the tests.
    """
    program = shutil.which("chromium")
    assert program, "Chromium isn't installed: apt-get install chromium"
    foreign: list[str] = []

    def note(request):
        if not request.url.startswith((address, "data:", "blob:")):
            foreign.append(request.url)

    with sync_playwright() as playwright:
        # no sandbox: it needs rights that root in a container lacks
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(PATIENCE)
        page.on("request", note)
        try:
            page.goto(address)
            yield page, foreign
        finally:
            browser.close()


def draw(page: Page, prompt: str) -> str:
    """Types the prompt, clicks Draw, and waits: what the page then says."""
    page.fill("#prompt textarea", prompt)
    return said(page, lambda: page.click("#draw"))


def said(page: Page, action: Callable[[], object], where: str = "#status") -> str:
    """The page's sentence after an action: that it is done, or what is wrong."""
    old = page.locator(f"{where} .status")
    old.evaluate("line => { line.textContent = ''; line.className = 'status' }")
    action()
    done = "^(Done|Restored|Draw over|Stopped)"
    page.wait_for_selector(f"{where} .error, {where} .status:text-matches('{done}')")
    return old.inner_text().strip()
