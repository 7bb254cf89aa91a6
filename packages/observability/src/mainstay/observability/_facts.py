"""What is known of a request, in one place: who asks, which route answers, how it ended."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from mainstay.core import Context, Noted
from mainstay.observability._asgi import Scope

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["RequestFacts"]

FACTS = "mainstay.observability"  # in a scope; one request has one, however many middlewares it goes through
UNMATCHED = "unmatched"
NO_ANSWER = 499  # without a client that could be answered: it went away, or the handler was cancelled

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "websocket"})


class RequestFacts(Noted):
    """The facts of one request or WebSocket, in its `scope["mainstay.observability"]`.

    The line of the request, the line of its error, metrics and spans are made of them. A program may add what it knows
    better: `request.scope["mainstay.observability"].actor = user.id`, for one, in a dependency that is no coroutine.

    Attributes:
        context: of the request's headers, with a correlation id.
        actor, tenant: who asks, and for whom: what was bound first in the request, or said by the headers.
        correlation_id: of the request.
        method: of HTTP; `other` for one that HTTP does not know, `websocket` for a WebSocket.
        route: template of the route; None until it is asked for, or as a program has set it.
        status: of the answer; 499 until there is one, 500 of one that broke off.
        code: of the error that was answered; None without one.
        error: what was raised; None where nothing was.
        request_bytes, response_bytes: of the bodies, as far as they were read and written.
        started_at, ended_at: when it came, and when its answer was complete (None before), by `time.perf_counter()`.
        traceparent: W3C trace context of the request's span, or as it was received; None without either.
        gone: whether the client went away before its answer was complete.
        excluded: whether it is not counted and has no line unless an error was raised, as probes.
    """

    __slots__ = (
        "begun", "code", "correlation_id", "ended_at", "error", "excluded", "gone", "lost", "method", "request_bytes",
        "response_bytes", "root", "route", "scope", "seconds_left", "started_at", "status", "told", "traceparent",
    )  # fmt: skip

    def __init__(self, scope: Scope, context: Context, correlation_id: str) -> None:
        super().__init__(context)
        method: str = "websocket" if scope["type"] == "websocket" else scope["method"]
        self.correlation_id = correlation_id
        self.scope: Scope = scope
        self.root: str = scope.get("root_path", "")
        self.method = method if method in _METHODS else "other"
        self.route: str | None = None
        self.status = NO_ANSWER
        self.code: str | None = None
        self.error: BaseException | None = None
        self.request_bytes = self.response_bytes = 0
        self.started_at = perf_counter()
        self.ended_at: float | None = None
        self.traceparent = context.traceparent
        self.seconds_left: float | None = None  # that its caller still waited when it came; None without a deadline
        self.lost: OSError | None = None  # what the server raised when it could send no more
        self.begun = self.gone = self.excluded = self.told = False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)
        self.error = self.lost = None  # they hold frames, and these the facts
        self.scope = {}  # or a task that the request started, and that outlives it, would hold all that came with it

    def template(self) -> str:
        """The route's template, as far as it is known by now."""
        if self.route is not None:
            return self.route
        try:
            return route_template(self.scope, self.root)
        except Exception:  # noqa: BLE001  routes, and what their parameters were converted to, are objects of others
            return UNMATCHED

    def end(self) -> None:
        """Note when the answer was complete, or was given up."""
        if self.ended_at is None:
            self.ended_at = perf_counter()

    def seconds(self) -> float:
        """How long the request took, or takes by now."""
        return (perf_counter() if self.ended_at is None else self.ended_at) - self.started_at

    def answered_in(self, context: Context) -> None:
        """Note the context in which the answer begins: the last word on who asks."""
        own = self.context
        if context is own:
            return
        if context.actor is not None and context.actor != own.actor:
            self.actor = context.actor
        if context.tenant is not None and context.tenant != own.tenant:
            self.tenant = context.tenant

    def of_lines(self) -> Context:
        """The context for what is told of the request from outside: with the actor and the tenant that it had."""
        left = None if self.error is None else self.left_by(self.error)
        actor = (left and left.actor) or self.actor
        tenant = (left and left.tenant) or self.tenant
        if actor == self.context.actor and tenant == self.context.tenant:
            return self.context
        return replace(self.context, actor=actor, tenant=tenant)


def leave_out(scope: Scope) -> None:
    """Take a probe out of what is told of requests: a 503 of one is an answer, and no failure."""
    facts: RequestFacts | None = scope.get(FACTS)
    if facts is not None:
        facts.excluded = True


def route_template(scope: Scope, root: str = "") -> str:
    """The template of the route that answers, such as `/orders/{id}`, prefixes of routers and mounts included.

    The route's own path lacks the prefixes, and frameworks have moved them about; so they are taken from the path that
    was asked for: what remains of it before the part that the route describes, with the values of mount parameters put
    back into their names. Where that is not certain, as with a parameter that was converted or spans several parts, the
    route's own path has to do: what a stranger wrote must never be a label. A request that no route answers is
    `unmatched`, and its path is not told.

    Args:
        scope: of the request, when it is over.
        root: the path that the server serves the application under; it is no part of a template.
    """
    route = scope.get("route")
    template: str | None = getattr(route, "path_format", None) or getattr(route, "path", None)
    if template is None:
        return UNMATCHED
    path: str = scope["path"]
    if root and path.startswith(root):
        path = path[len(root) :]
    if template == path:
        return template
    values = cast("dict[str, Any]", scope.get("path_params") or {})
    described, rest = template, dict(values)
    for name, value in values.items():
        marker = f"{{{name}}}"
        if marker in described:
            described = described.replace(marker, str(value))
            del rest[name]
    if described == path or not path.endswith(described):
        return template
    prefix = path[: len(path) - len(described)]
    parts = prefix.split("/")
    for name, value in rest.items():
        if not isinstance(value, str) or not value or value not in parts:
            return template
        parts = [f"{{{name}}}" if part == value else part for part in parts]
    return "/".join(parts) + template
