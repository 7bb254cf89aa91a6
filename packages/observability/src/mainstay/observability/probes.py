"""Probes as an ASGI application of their own: for a server without `ObservabilityMiddleware`, or under another path.

    api.mount("/internal", Probes(app, private=True))      # FastAPI, Starlette: /internal/health, /internal/metrics …

The paths are those of the settings, below wherever it is mounted, under any root path.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from mainstay.core import App, NotBoundError
from mainstay.observability._facts import leave_out
from mainstay.observability.health import Answer, HealthWatch

__all__ = ["Probes"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_TEXT = "text/plain; charset=utf-8"
_NOT_FOUND = Answer(404, _TEXT, b"Not Found\n")
_NOT_ALLOWED = Answer(405, _TEXT, b"Method Not Allowed\n")
_NOT_RUNNING = Answer(503, _TEXT, b"The App is not running.\n")


class Probes:
    """Answers to GET and HEAD on the paths of the App's `ObservabilitySettings`; 503 while the App does not run.

    Args:
        app: the Mainstay App, with an `ObservabilityModule`.
        private: whether only people of this service can ask here: then metrics and health with details are there
            without a token.
    """

    def __init__(self, app: App, *, private: bool = False) -> None:
        self._app = app
        self._private = private

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Handle one request, as ASGI calls it; other kinds of connections are left alone."""
        if scope["type"] != "http":
            return
        leave_out(scope)
        answer = await self._answer(scope)
        headers = [
            (b"content-type", answer.content_type.encode()),
            (b"content-length", str(len(answer.body)).encode()),
            (b"cache-control", b"no-store"),
        ]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else answer.body})

    async def _answer(self, scope: Scope) -> Answer:
        if scope["method"] not in ("GET", "HEAD"):
            return _NOT_ALLOWED
        try:
            watch = self._app.get(HealthWatch)
        except NotBoundError:
            return _NOT_RUNNING
        said = {name: value.decode("latin-1") for name, value in scope["headers"]}
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        found = await watch.answer(
            path,
            said.get(b"accept", ""),
            private=self._private,
            authorization=said.get(b"authorization", ""),
        )
        return found or _NOT_FOUND
