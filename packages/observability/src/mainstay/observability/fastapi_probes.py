"""Probes as a router of FastAPI, which takes prefixes and dependencies as any other.

api.include_router(probe_router(app, private=True), prefix="/internal", dependencies=[Depends(operator)])
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request, Response

from mainstay.core import App
from mainstay.observability._facts import leave_out
from mainstay.observability.probes import answered
from mainstay.observability.settings import ObservabilitySettings

__all__ = ["probe_router"]


def probe_router(app: App, *, private: bool = False) -> APIRouter:
    """A router with the paths of the App's `ObservabilitySettings`; they answer 503 while the App does not run.

    Args:
        app: the Mainstay App; without an `ObservabilityModule` the router is empty.
        private: whether only people of this service can ask here, because the router's dependencies see to it: then
            metrics and health with details are there without a token.
    """
    router = APIRouter(tags=["probes"])
    for settings in (each.settings for each in app.modules if isinstance(each.settings, ObservabilitySettings)):
        for path in sorted(settings.paths.all):
            router.add_api_route(path, _answering(app, path, private=private), methods=["GET", "HEAD"], name=path)
    return router


def _answering(app: App, path: str, *, private: bool) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        leave_out(request.scope)
        found = await answered(app, path, request.scope, private=private)
        # Starlette would add a charset to what has one.
        return Response(
            found.body, found.status, headers={"content-type": found.content_type, "cache-control": "no-store"}
        )

    return answer
