"""The page served: by one process, one queue, to this machine alone unless it is told otherwise."""

from __future__ import annotations

import hmac
import logging
import os
import pathlib
import threading
from collections.abc import Callable
from typing import Any

# Before Gradio is imported, which reads them: no telemetry, no look for newer versions.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr  # noqa: E402
import jax  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402

from contextdiff_jax.demo_page import look  # noqa: E402
from contextdiff_jax.demo_page.album import Album  # noqa: E402
from contextdiff_jax.demo_page.clips import ClipStudio  # noqa: E402
from contextdiff_jax.demo_page.guard import Guard  # noqa: E402
from contextdiff_jax.demo_page.handlers import ClipHandlers, PictureHandlers  # noqa: E402
from contextdiff_jax.demo_page.limits import MAX_UPLOAD, WAITING  # noqa: E402
from contextdiff_jax.demo_page.page import build_page  # noqa: E402
from contextdiff_jax.demo_page.studio import Studio  # noqa: E402
from contextdiff_jax.demo_page.worker import Stopped, Worker  # noqa: E402
from contextdiff_jax.inference.pipeline import Pipeline  # noqa: E402

LOGGER = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_password(password: str) -> Callable[[str, str], bool]:
    """Return the check of Gradio's login: any name, and this password."""

    def check(_: str, given: str) -> bool:
        return hmac.compare_digest(given.encode(), password.encode())

    return check


def _no_stops(record: logging.LogRecord) -> bool:
    """Whether JAX's log of a callback's error is of something else than a visitor who left."""
    return not (record.exc_info and isinstance(record.exc_info[1], Stopped))


def make_page(pipeline: Pipeline, folder: str, files: pathlib.Path) -> gr.Blocks:
    """Return the page of an opened model; `files`: where pictures and uploads are kept."""
    os.environ["GRADIO_TEMP_DIR"] = str(files / "uploads")  # where Gradio's components keep theirs
    named = pathlib.Path(folder).name or folder  # visitors needn't know the way to it
    step, of, _ = pipeline.opened.source.partition(" of ")
    source = f"{step} of {named}" if of else named
    worker = Worker()
    studio = Studio(pipeline, worker, source)
    clips = ClipHandlers(ClipStudio(pipeline, folder, worker))
    pictures = PictureHandlers(studio, Album(files / "pictures"))
    height, width = studio.size
    kind = jax.devices()[0].device_kind
    facts = f"{height} x {width} pixels · on {kind.upper() if kind == 'cpu' else kind}"
    page = build_page(studio, pictures, clips, source, facts)
    page.studio = studio
    return page


def serve(
    page: gr.Blocks,
    files: pathlib.Path,
    *,
    host: str = "127.0.0.1",
    port: int | None = 7860,
    password: str | None = None,
    block: bool = True,
) -> str:
    """Serves the page and returns its address, with `block` only when it is stopped.

    Raises ValueError, one line, where the port is taken.
    """
    logging.getLogger("jax._src.debugging").addFilter(_no_stops)
    page.queue(max_size=WAITING, default_concurrency_limit=1)
    options: dict[str, Any] = {
        "auth": check_password(password) if password else None,
        "auth_message": "Any name; the password is the one that the page was started with.",
        "app_kwargs": {"middleware": [Middleware(Guard, folder=files)]},
        "theme": look.make_theme(),
        "css": look.CSS,
    }
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            max_file_size=MAX_UPLOAD,
            max_threads=2 * WAITING,
            state_session_capacity=200,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            show_error=False,
            quiet=True,
            **options,
        )
    except OSError as error:
        raise ValueError(f"--port={port}: {error}; choose another") from None
    if host not in LOOPBACK and not password:
        LOGGER.warning("--host=%s: whoever reaches this machine can use the page; --password", host)
    threading.Thread(target=_warm, args=(page.studio,), daemon=True).start()
    print(f"The page: {url}  (Ctrl-C stops it)", flush=True)
    if block:
        page.block_thread()
    return url


def _warm(studio: Studio) -> None:
    if studio.pipeline.opened.only_inpaints:  # there is no picture to begin with yet
        return
    try:
        studio.warm()
    except Exception as error:  # the first visitor's click says the same
        LOGGER.warning("the first picture, made to compile its program: %s", error)
