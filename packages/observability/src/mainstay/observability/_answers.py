"""How a problem leaves: as the answer to a request, as the end of a WebSocket, and past CORS where there is CORS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from http import HTTPStatus
from weakref import WeakKeyDictionary

from mainstay.observability._asgi import ASGIApp, Message, Receive, Scope, Send, respond
from mainstay.observability._facts import FACTS
from mainstay.observability.errors import Problem, problem_of

# The CORS middlewares of an application and of those that it is mounted in, from the inside out. The outermost answer
# is made outside of them, so it goes through them once more: a browser shows no answer to a page without their headers.
# (A layer further in that answers would hide the error from the middlewares between, which roll back on one.)
cors_of: WeakKeyDictionary[object, Sequence[Callable[[ASGIApp], ASGIApp]]] = WeakKeyDictionary()

DENIAL = "websocket.http.response"  # the extension by which a server can answer in place of a WebSocket
_POLICY, _INTERNAL, _TRY_LATER = 1008, 1011, 1013
_LATER = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT})


async def answer(error: Exception, scope: Scope, send: Send) -> None:
    """Answer a request, of whose answer nothing has been sent yet, with the problem that an error is."""
    problem = problem_of(error)
    noted(scope, error, problem)
    body = problem.body()

    async def asgi(_scope: Scope, _receive: Receive, send: Send) -> None:
        await respond(send, problem.status, problem.all_headers(body), body)

    through: ASGIApp = asgi
    if scope["method"] != "OPTIONS":  # which they would take for a question of theirs
        for wrap in _cors(scope.get("app")):
            through = wrap(through)
    await through(scope, _nothing, send)


def _cors(app: object) -> Sequence[Callable[[ASGIApp], ASGIApp]]:
    try:
        return cors_of.get(app, ())
    except TypeError:  # what another framework calls its application, if it does, may be of any kind
        return ()


async def refuse(problem: Problem, scope: Scope, send: Send, *, accepted: bool) -> None:
    """End a WebSocket: with the problem where it is not accepted yet and the server can say it, or else with its code.

    A client that was accepted sees 1013 where it may try again later, 1008 where it is the cause, 1011 otherwise; the
    reason is the problem's code.
    """
    if not accepted and DENIAL in (scope.get("extensions") or {}):
        body = problem.body()
        await respond(send, problem.status, problem.all_headers(body), body, prefix="websocket.")
        return
    if problem.status in _LATER:
        code = _TRY_LATER
    else:
        code = _POLICY if problem.status < HTTPStatus.INTERNAL_SERVER_ERROR else _INTERNAL
    await send({"type": "websocket.close", "code": code, "reason": problem.code})


def noted(scope: Scope, error: BaseException, problem: Problem) -> None:
    """Put an error into the facts of its request, by which the middleware logs and counts it."""
    facts = scope.get(FACTS)
    if facts is not None:
        facts.error, facts.code = error, problem.code


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
