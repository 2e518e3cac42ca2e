"""Gradio's components for what visitors send, without their decoding and their downloads.

Gradio decodes pictures before a handler sees them, fetches a file that a request names by a URL,
and keeps blobs of an editor without bounds. Here a handler gets paths or bytes, bounded, and
`uploads` decodes them. The methods are replaced on the instances, because a subclass would have
Gradio write a stub file beside this module: handlers set these components' values, and never
their properties, for which Gradio makes new instances.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from contextdiff_jax.demo_page.limits import MAX_UPLOAD, WAITING

if TYPE_CHECKING:
    import gradio as gr

EDITORS = 4 * WAITING  # drawings that wait for their click, the oldest of which go
LAYERS = 4  # of a drawing


def local_files_alone(component: gr.components.Component) -> gr.components.Component:
    """Return the component; it refuses files that a request names by a URL."""
    move = component.async_move_resource_to_block_cache

    async def moved(path: Any) -> str | None:
        if str(path or "").lower().startswith(("http:", "https:")):
            raise ValueError("Files are taken from uploads alone, not from addresses.")
        return await move(path)

    component.async_move_resource_to_block_cache = moved
    return component


def make_file(**options: Any) -> gr.File:
    """Return a field for one uploaded file, whose path the handler gets."""
    import gradio as gr

    return local_files_alone(gr.File(type="filepath", file_count="single", **options))


def make_editor(**options: Any) -> gr.ImageEditor:
    """Return an editor for strokes on a picture; the handler gets the layers' files as bytes."""
    import gradio as gr

    editor = gr.ImageEditor(sources=(), layers=False, transforms=(), **options)
    editor.blob_storage, add = OrderedDict(), editor.accept_blobs

    def accept_blobs(data: Any) -> None:
        index = str(data.data.get("index") or "0")
        too_large = any(len(file) > MAX_UPLOAD for _, file in data.files)
        if too_large or not (index == "null" or (index.isdecimal() and int(index) < LAYERS)):
            raise ValueError("The drawing is too large.")
        while len(editor.blob_storage) >= EDITORS:
            editor.blob_storage.popitem(last=False)
        add(data)

    def preprocess(payload: Any) -> list[bytes]:
        if payload is None:
            return []
        drawn = payload if payload.id is None else editor.blob_storage.pop(payload.id, None)
        layers = (drawn.layers or [])[:LAYERS] if drawn is not None else []
        return [_read(layer) for layer in layers if layer is not None]

    accept_blobs._is_server_fn = True  # Gradio's mark of what browsers may call
    editor.accept_blobs, editor.preprocess = accept_blobs, preprocess
    return local_files_alone(editor)


def _read(layer: Any) -> bytes:
    if isinstance(layer, bytes):
        return layer
    with open(layer.path, "rb") as file:  # Gradio has checked that it is an upload of this page
        return file.read(MAX_UPLOAD + 1)
