"""One line for a FastAPI or Starlette application: `instrument(api, app)`.

Each answer of 400 and above is a problem, in applications that are mounted in it, too. FastAPI's own answer to an
invalid request repeats what was sent, a password beside the wrong field included, even where the model says
`SecretStr`; here an error says where and why, never what.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, cast

from fastapi import FastAPI
from fastapi.encoders import jsonable_encoder
from fastapi.exception_handlers import (
    http_exception_handler,
    request_validation_exception_handler,
    websocket_request_validation_exception_handler,
)
from fastapi.exceptions import RequestValidationError, ResponseValidationError, WebSocketRequestValidationError
from fastapi.utils import is_body_allowed_for_status_code
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketState

from mainstay.core import App, ConfigurationError, InvalidRequest, MainstayError, current
from mainstay.observability._answers import cors_of, noted, refuse
from mainstay.observability._asgi import ASGIApp, Receive, Scope, Send
from mainstay.observability._input import SHOWN, names_of, told
from mainstay.observability._openapi import show_problems
from mainstay.observability.asgi import ObservabilityMiddleware
from mainstay.observability.errors import BY_STATUS, Problem, problem_by_class, problem_of, problem_of_kind

__all__ = ["instrument"]

_SERVER_ERROR = _UNHANDLED = 500
_CLIENT_ERROR = 400
_LONG_WAIT_DIGITS = 9
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_OWN_HEADERS = frozenset({"content-type", "content-length"})
_PARAMETERS = ("path_params", "query_params", "header_params", "cookie_params", "body_params")


def instrument(api: Starlette, app: App | None = None, *, trusted: bool = False) -> None:
    """Give `api`, and each application that is mounted in it, context, metrics, probes and problems for errors.

    Call it after every other `add_middleware`: the last is outermost. Exception handlers of the application's own stay.

    Args:
        api: the application, FastAPI's or Starlette's, before its first request.
        app: the Mainstay App whose probes it serves; None serves none.
        trusted: whether callers may name actor and tenant in headers; see `ObservabilityMiddleware`.

    Raises:
        ConfigurationError: the application has a handler for every Exception, which would never be called.
    """
    _refuse_catch_all(api)
    api.add_middleware(ObservabilityMiddleware, app=app, trusted=trusted)
    if isinstance(api, FastAPI):
        show_problems(api)
    build = api.build_middleware_stack

    def build_with_problems() -> ASGIApp:
        # Called once, by the start or the first request: by then every route, mount and handler is there, however early
        # in its file an application was instrumented.
        _refuse_catch_all(api)
        _adopt(api, cors_of.get(api, ()), set())
        return build()

    api.build_middleware_stack = build_with_problems  # type: ignore[method-assign]  # there is no other moment


def _refuse_catch_all(api: Starlette) -> None:
    if any(api.exception_handlers.get(kind) not in {None, _left_to_the_outermost} for kind in (Exception, _UNHANDLED)):
        msg = (
            "instrument(api) answers unhandled errors itself, with their correlation id, so the exception handler of "
            "this api for Exception or 500 would never be called: remove it, or register it for the errors it means"
        )
        raise ConfigurationError(msg)


def _adopt(api: Starlette, outside: Sequence[Callable[[ASGIApp], ASGIApp]], seen: set[int]) -> None:
    """Put the handlers into an application and into those that are mounted in it, where it has none of its own.

    Args:
        api: the application.
        outside: the CORS middlewares of those that it is mounted in.
        seen: applications that were adopted already.
    """
    if id(api) in seen:
        return
    seen.add(id(api))
    handlers = cast("dict[object, object]", api.exception_handlers)
    for kind, handler in _HANDLERS.items():
        if handlers.get(kind) is None or handlers[kind] in _DEFAULTS:
            handlers[kind] = handler
    if _UNHANDLED not in handlers:
        handlers.setdefault(Exception, _left_to_the_outermost)
    cors_of[api] = [*_cors(api), *outside]
    for inner in _mounted(api.routes):
        inner.middleware_stack = None  # it has copied its handlers, if it was used before
        if isinstance(inner, FastAPI):
            show_problems(inner)
        _adopt(inner, cors_of[api], seen)


def _cors(api: Starlette) -> Iterator[Callable[[ASGIApp], ASGIApp]]:
    """The CORS middlewares that stand inside of ours, the innermost first."""
    for middleware in reversed(api.user_middleware):
        kind = cast("object", middleware.cls)
        if kind is ObservabilityMiddleware:
            return
        if isinstance(kind, type) and issubclass(kind, CORSMiddleware):
            yield _wrapping(middleware)


def _wrapping(middleware: Middleware) -> Callable[[ASGIApp], ASGIApp]:
    return lambda asgi: cast("ASGIApp", middleware.cls(asgi, *middleware.args, **middleware.kwargs))


def _mounted(routes: Iterable[object]) -> Iterator[Starlette]:
    for route in routes:
        # What is mounted may be wrapped, by middlewares of the mount or by hand; routes of a router are its own.
        inner = getattr(route, "_base_app", getattr(route, "app", None))
        for _ in range(32):
            if isinstance(inner, Starlette) or not hasattr(inner, "app"):
                break
            inner = cast("Any", inner).app
        if isinstance(inner, Starlette):
            yield inner
        else:
            router = getattr(route, "original_router", route)
            yield from _mounted(cast("Iterable[object]", getattr(router, "routes", None) or ()))


async def _answered(connection: HTTPConnection, error: Exception) -> Response | None:
    return await _told(connection, error, problem_of(error))


async def _http_error(connection: HTTPConnection, error: Exception) -> Response | None:
    assert isinstance(error, HTTPException)  # noqa: S101  registered for this class only
    status = error.status_code
    if isinstance(connection, Request) and (status < _CLIENT_ERROR or not is_body_allowed_for_status_code(status)):
        return await http_exception_handler(connection, error)
    return await _told(connection, error, problem_of(error))


async def _invalid_request(connection: HTTPConnection, error: Exception) -> Response | None:
    assert isinstance(error, RequestValidationError | WebSocketRequestValidationError)  # noqa: S101  as above
    return await _told(connection, error, _invalid(error, _names(_parameters(connection.scope))))


async def _invalid_response(connection: HTTPConnection, error: Exception) -> NoReturn:
    assert isinstance(error, ResponseValidationError)  # noqa: S101  as above
    mistakes = told(error.errors(), _names(_response(connection.scope)))
    text = "; ".join(f"{'.'.join(map(str, each.location))}: {each.message} ({each.type})" for each in mistakes[:10])
    # FastAPI's own text holds the whole answer, which is what was to be kept from being sent. Raised and not answered:
    # it is as unhandled as any other mistake in the application.
    raise InvalidResponse(text).with_traceback(error.__traceback__) from None


class InvalidResponse(Exception):
    """What an endpoint returned is not what its response model says; the text says where, and not what it was."""


async def _left_to_the_outermost(_request: Request, _error: Exception) -> ASGIApp:
    """In place of the 500 of an application's own: the error goes on, to be logged and answered once, outermost."""

    async def nothing(_scope: Scope, _receive: Receive, _send: Send) -> None:
        return

    return nothing


_DEFAULTS: tuple[object, ...] = (
    http_exception_handler,
    request_validation_exception_handler,
    websocket_request_validation_exception_handler,
)
_HANDLERS: dict[type[Exception], Callable[..., Any]] = {
    MainstayError: _answered,
    HTTPException: _http_error,
    RequestValidationError: _invalid_request,
    WebSocketRequestValidationError: _invalid_request,
    ResponseValidationError: _invalid_response,
}


async def _told(connection: HTTPConnection, error: Exception, problem: Problem) -> Response | None:
    noted(connection.scope, error, problem)
    if isinstance(connection, WebSocket):
        if WebSocketState.DISCONNECTED not in {connection.client_state, connection.application_state}:
            accepted = connection.application_state is WebSocketState.CONNECTED
            await refuse(problem, connection.scope, connection.send, accepted=accepted)
        return None
    body = problem.body()
    response = Response(body, problem.status)
    response.raw_headers = problem.all_headers(body)
    return response


@problem_by_class.register
def _of_http_error(error: HTTPException) -> Problem:
    server = error.status_code >= _SERVER_ERROR
    kind: type[MainstayError] = MainstayError if server else InvalidRequest
    code, title = BY_STATUS.get(error.status_code, (kind.code, kind.title))
    detail, details = kind.public_message, None
    given = cast("object", error.detail)  # said to be text, but FastAPI's subclass takes anything
    if not server and isinstance(given, str):
        detail = given
    elif not server and given is not None:
        details = _as_json(given)
    headers = {str(name).lower(): str(value) for name, value in (error.headers or {}).items()}
    wait = headers.get("retry-after", "")
    known = len(wait) <= _LONG_WAIT_DIGITS and wait.isascii() and wait.isdigit()
    return Problem(
        code=code,
        status=error.status_code,
        title=title,
        detail=detail,
        correlation_id=current().correlation_id,
        retry_after_seconds=float(wait) if known else None,
        details=details,
        headers=tuple(
            (name, value)
            for name, value in headers.items()
            if name not in _OWN_HEADERS
            and not (known and name == "retry-after")
            and _NAME.fullmatch(name)
            and _VALUE.fullmatch(value)
        ),
    )


def _as_json(value: object) -> object:
    """What JSON has of a value; None of one that has no such form."""
    try:
        return cast("object", json.loads(json.dumps(jsonable_encoder(value), allow_nan=False)))
    except (TypeError, ValueError, RecursionError):
        return None


@problem_by_class.register(RequestValidationError)
@problem_by_class.register(WebSocketRequestValidationError)
def _invalid(
    error: RequestValidationError | WebSocketRequestValidationError, names: frozenset[str] = frozenset()
) -> Problem:
    mistakes = error.errors()
    more = f" Of its {len(mistakes)} mistakes {SHOWN} are listed." if len(mistakes) > SHOWN else ""
    return problem_of_kind(InvalidRequest, InvalidRequest.public_message + more, errors=told(mistakes, names))


def _routes(scope: Scope) -> tuple[object, ...]:
    # Newer FastAPI keeps what a router was included with beside the route. Where that moves, some names are not shown.
    kept = cast("dict[str, object]", scope.get("fastapi") or {})
    return scope.get("route"), kept.get("effective_route_context")


def _parameters(scope: Scope) -> Iterator[object]:
    """The fields that a route's parameters are, those of its dependencies included."""
    left = [getattr(route, "dependant", None) for route in _routes(scope)]
    for each in left:
        left.extend(getattr(each, "dependencies", ()))
        for place in _PARAMETERS:
            yield from getattr(each, place, ())


def _response(scope: Scope) -> Iterator[object]:
    """The field that a route's response model is."""
    return (getattr(route, "response_field", None) for route in _routes(scope))


def _names(fields: Iterable[object]) -> frozenset[str]:
    """The names that a mistake in one of the fields can have in its location."""
    known = list(fields)
    own = (getattr(field, name, None) for field in known for name in ("alias", "name"))
    types = (getattr(getattr(field, "field_info", None), "annotation", None) for field in known)
    return names_of(types).union(name for name in own if isinstance(name, str))
