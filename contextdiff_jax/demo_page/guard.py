"""What is refused before Gradio reads it, and what browsers are told: an ASGI middleware."""

from __future__ import annotations

import pathlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from contextdiff_jax.demo_page.album import is_full
from contextdiff_jax.demo_page.limits import MAX_BODY

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HERE = "'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
HEADERS = {
    # Browsers then ask no other host for anything, whatever the page or a library says.
    "content-security-policy": f"default-src {HERE}; frame-ancestors 'self'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Guard:
    """Bounds the bodies of requests, and adds `HEADERS` to answers."""

    def __init__(self, app: App, folder: pathlib.Path, most: int = MAX_BODY):
        self.app, self.folder, self.most = app, folder, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or hands it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await _answer(send, *refusal)
            return

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *more]
            await send(message)

        await self.app(scope, receive, with_headers)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return None
        headers = {name.lower(): value for name, value in scope["headers"]}
        length = headers.get(b"content-length", b"")
        if not length.isdigit():  # the server counts what comes, and stops there
            return 411, "The request doesn't say its length."
        if int(length) > self.most:
            return 413, f"The request is larger than {self.most // 2**20} MB."
        if scope["path"].endswith("/upload") and is_full(self.folder):
            return 507, "The page keeps too many files; try again later."
        return None


async def _answer(send: Send, code: int, text: str) -> None:
    start = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": code, "headers": start})
    await send({"type": "http.response.body", "body": text.encode()})
