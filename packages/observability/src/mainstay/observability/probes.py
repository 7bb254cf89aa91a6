"""Probes as an ASGI application of their own: for a server without `ObservabilityMiddleware`, or under another path.

    api.mount("/internal", Probes(app, private=True))      # FastAPI, Starlette: /internal/health, /internal/metrics …

The paths are those of the settings, below wherever it is mounted, under any root path.
"""

from __future__ import annotations

from mainstay.core import App, NotBoundError
from mainstay.observability._asgi import Receive, Scope, Send
from mainstay.observability._facts import leave_out
from mainstay.observability.health import Answer, asked

__all__ = ["Probes"]

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
        if scope["method"] in ("GET", "HEAD"):
            path: str = scope["path"].removeprefix(scope.get("root_path", ""))
            found = await answered(self._app, path, scope, private=self._private)
        else:
            found = _NOT_ALLOWED
        await found.send(scope, send)


async def answered(app: App, path: str, scope: Scope, *, private: bool) -> Answer:
    """The answer to a probe where nothing else is served: 404 for other paths, 503 while the App does not run."""
    try:
        return await asked(app, path, scope, private=private) or _NOT_FOUND
    except NotBoundError:
        return _NOT_RUNNING
