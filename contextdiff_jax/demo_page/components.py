"""Gradio's components for what visitors send, without their decoding and their downloads.

Gradio decodes pictures before a handler sees them, fetches a file that a request names by a URL,
and keeps an editor's drawings without bounds. Here a handler gets paths or bytes, bounded, and
`uploads` decodes them.
"""

from __future__ import annotations

import abc
import pathlib
from collections import OrderedDict
from typing import Any

import gradio as gr
from gradio.components.base import server

from contextdiff_jax.demo_page.limits import MAX_STROKES, MAX_UPLOAD, WAITING

DRAWINGS = 4 * WAITING  # that are kept; the oldest go


def _subclass(base: type, **attributes: Any) -> type:
    """The subclass, whose front end is the base's. Made by ABCMeta, because Gradio's metaclass
    would write a stub file beside this module.
    """
    attributes |= {"is_template": True, "__module__": __name__}
    return abc.ABCMeta.__new__(type(base), base.__name__, (base,), attributes)


def _local_alone(base: type) -> Any:
    """A method for a subclass of `base`, which moves a file to where Gradio serves it from."""

    async def move(self: Any, path: Any) -> str | None:
        if str(path or "").lower().startswith(("http:", "https:")):
            raise ValueError("Files are taken from uploads alone, not from addresses.")
        return await base.async_move_resource_to_block_cache(self, path)

    return move


def _local(base: type, **attributes: Any) -> type:
    return _subclass(base, async_move_resource_to_block_cache=_local_alone(base), **attributes)


File = _local(gr.File)
UploadButton = _local(gr.UploadButton)


class Drawings:
    """The strokes that browsers have sent, of all visitors, in the order in which they came."""

    def __init__(self, most: int = DRAWINGS):
        self._files: OrderedDict[str, bytes] = OrderedDict()
        self._most = most

    def accept(self, kind: Any, index: Any, name: Any, file: bytes) -> None:
        """Keeps an editor's only layer; its other parts aren't read. ValueError for a large one."""
        if kind != "layer" or str(index) not in ("0", "null", "None"):
            return
        if len(file) > MAX_STROKES:
            raise ValueError("The drawing is too large.")
        self._files[str(name)[:100]] = file
        while len(self._files) > self._most:
            self._files.popitem(last=False)

    def find(self, name: str) -> bytes | None:
        """Return a drawing by the browser's name of it; it may be asked for again."""
        return self._files.get(name[:100])


DRAWN = Drawings()


@server
def _accept_blobs(self: Any, data: Any) -> None:
    """Called by the browser with each part of the picture in the editor."""
    about = data.data
    file = data.files[0][1] if data.files else b""
    DRAWN.accept(about.get("type"), about.get("index"), about.get("id"), file)


def _preprocess(self: Any, payload: Any) -> list[bytes]:
    """What a handler gets: the layers' files."""
    if payload is None:
        return []
    if payload.id is not None:
        drawn = DRAWN.find(payload.id)
        return [] if drawn is None else [drawn]
    # Gradio has checked that these are uploads of this page.
    paths = [layer.path for layer in (payload.layers or [])[:1] if layer is not None]
    files = [path for path in map(pathlib.Path, paths) if path.stat().st_size <= MAX_UPLOAD]
    return [file.read_bytes() for file in files]


MaskEditor = _local(gr.ImageEditor, preprocess=_preprocess, accept_blobs=_accept_blobs)
