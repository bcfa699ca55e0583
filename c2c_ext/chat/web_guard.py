"""What the web page's server answers at all: only what the page itself asks for."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

MAX_BODY = 1 << 20  # bytes of a request
# Of all the addresses of gradio's server. Those for files, uploads, proxies, monitoring, editing
# the program and calling functions by name are not among them.
READ = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)/?"
    r"|/(assets|static|svelte)/[\w./@+-]+"
    r"|/gradio_api/(info|startup-events|app_id|queue/data|heartbeat/\w+)/?"
)
WRITE = re.compile(r"/gradio_api/(queue/join|cancel|reset)/?")
LOOPBACK = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?")
HEADERS = (
    # Nothing is fetched from elsewhere; gradio's page needs inline code.
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
        b"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        b"connect-src 'self'; frame-ancestors 'none'; form-action 'self'; base-uri 'self'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Guard:
    """ASGI middleware: refuses every address, host and size that the page has no use for.

    Args:
        app: what answers the rest.
        loopback: whether only this machine is served: a request that names another host came by a
            name that somebody made point here. Requests that other sites' pages send are refused
            in any case.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], loopback: bool) -> None:
        self._app, self._loopback = app, loopback

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answers 403, 404 or 413 itself, or passes the request on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        status = self._refusal(scope)
        if status:
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return

        left = MAX_BODY

        async def bounded() -> dict[str, Any]:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            return message if left >= 0 else {"type": "http.disconnect"}

        async def with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        await self._app(scope, bounded, with_headers)

    def _refusal(self, scope: dict[str, Any]) -> int | None:
        """The status that a request is refused with; None: it is not."""
        if scope["type"] != "http":
            return 404
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if self._loopback and not LOOPBACK.fullmatch(headers.get(b"host", "")):
            return 403
        origin = headers.get(b"origin")  # the page that a browser sends a request for
        if origin is not None and origin.partition("://")[2] != headers.get(b"host"):
            return 403
        allowed = READ if scope["method"] in ("GET", "HEAD") else WRITE
        if ".." in scope["path"] or not allowed.fullmatch(scope["path"]):
            return 404
        length = headers.get(b"content-length", "0")
        if not length.isdigit() or int(length) > MAX_BODY:
            return 413
        return None
