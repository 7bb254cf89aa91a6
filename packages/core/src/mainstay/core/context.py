"""One context through everything: who asked, for whom, and as part of what.

It is immutable and lives in one `ContextVar`, so that tasks and `asyncio.to_thread` carry it by themselves. The same
fields come out in logs, traces, event headers, workflow records, audit entries and error bodies. Until when is
`mainstay.core.deadline`'s, in a variable of its own: code that binds the context that came with an event must not
thereby escape the deadline around it, and a record outlives the call that made it.

The trace is OpenTelemetry's: inside a span, `current()` names that span, not what was bound. What is bound is the
trace as it was received, and is what travels on where no span is active, or where OpenTelemetry is not even imported.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast
from urllib.parse import quote, unquote

from mainstay.core.ids import ID_RULE, is_id

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Context", "Later", "Noted", "bind", "current", "rebind"]

# What a stranger sends ends up in logs, headers and records: short, printable and without separators, or dropped. An
# actor and a tenant come from the authentication, and have the names that they have there.
_LONGEST_NAME = 256
_MOST_ERRORS = 64  # that are looked at to find one that is known
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)
_TRACESTATE = re.compile(r"[\x20-\x7e]{1,512}", re.ASCII)

_HEADERS = {
    "correlation_id": "x-correlation-id",
    "causation_id": "x-causation-id",
    "actor": "x-actor",
    "tenant": "x-tenant",
    "traceparent": "traceparent",
    "tracestate": "tracestate",
}
_NAMES = frozenset({"actor", "tenant"})
_FROM_STRANGERS = frozenset({"correlation_id", "traceparent", "tracestate"})


@dataclass(frozen=True, slots=True)
class Context:
    """The facts that travel with a piece of work.

    Attributes:
        correlation_id: names the whole conversation, the same in every service that takes part.
        causation_id: names what directly caused this work: a request, an event, a step.
        actor: who acts, as the service that authenticated them names them.
        tenant: on whose behalf.
        traceparent, tracestate: the W3C trace context: of the span that is active, in what `current()` returns, and
            as received otherwise.
    """

    correlation_id: str | None = None
    causation_id: str | None = None
    actor: str | None = None
    tenant: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None

    def to_dict(self) -> dict[str, str]:
        """The fields that are set."""
        values = ((name, getattr(self, name)) for name in _HEADERS)
        return {name: value for name, value in values if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """The context that `to_dict` described. Unknown names and malformed values are dropped, not believed."""
        good = {name: value for name, value in values.items() if name in _HEADERS and _well_formed(name, value)}
        return cls(**cast("dict[str, Any]", good))

    def to_headers(self) -> dict[str, str]:
        """HTTP headers (lower case) that carry this context to another service of ours.

        Actor and tenant are percent-encoded (RFC 3986), since a header holds ASCII only.
        """
        return {
            _HEADERS[name]: quote(value, safe="@:/+=") if name in _NAMES else value
            for name, value in self.to_dict().items()
        }

    @classmethod
    def from_headers(cls, headers: Mapping[str, str], *, trusted: bool = False) -> Self:
        """The context that HTTP headers describe; malformed values are dropped.

        Args:
            headers: names in lower case.
            trusted: whether the caller is a service of ours. A stranger may name a conversation and a trace, never an
                actor, a tenant or a cause.
        """
        names = _HEADERS if trusted else _FROM_STRANGERS
        values = {name: headers[_HEADERS[name]] for name in names if _HEADERS[name] in headers}
        return cls.from_dict({name: unquote(value) if name in _NAMES else value for name, value in values.items()})


def _well_formed(name: str, value: object) -> bool:
    if not isinstance(value, str):
        return False
    if name in _NAMES:
        return 0 < len(value) <= _LONGEST_NAME and value.isprintable()
    pattern = {"traceparent": _TRACEPARENT, "tracestate": _TRACESTATE}.get(name)
    return is_id(value) if pattern is None else pattern.fullmatch(value) is not None


def _explain(name: str) -> str:
    if name in _NAMES:
        return f"1 to {_LONGEST_NAME} printable characters"
    if name in {"traceparent", "tracestate"}:
        return "as W3C Trace Context says"
    return f"1 to 128 {ID_RULE}"


class Later:
    """A context that is made at the first use: `make(source)`, once.

    For a loop that handles what strangers send: reading a context out of headers, with all its checks, costs as much as
    the rest of the dispatch of an event, and most handlers never look.
    """

    __slots__ = ("_context", "_make", "_source")

    def __init__(self, make: Callable[[Any], Context], source: object) -> None:
        self._make = make
        self._source = source
        self._context: Context | None = None

    def get(self) -> Context:
        """The context."""
        context = self._context
        if context is None:
            context = self._context = self._make(self._source)
        return context


_EMPTY = Context()
_current: ContextVar[Context | Later] = ContextVar("mainstay_context", default=_EMPTY)


class Noted:
    """A context for a block, and what is bound inside of it, which is undone before those around it can look.

    An error leaves every `bind` on its way out, and a dependency of a web framework that is no coroutine binds in a
    thread of its own; the line that tells of the request is written outside of both. `with Noted(context) as noted:`
    binds `context`, and notes what this task, and the tasks and threads that it starts, bind from then on.

    Args:
        context: for the block.

    Attributes:
        context: as passed.
        actor, tenant: the first that was bound inside, or else those of `context`. A program may set them, too.
    """

    __slots__ = ("_error", "_left", "_noted_token", "_token", "actor", "context", "tenant")

    def __init__(self, context: Context) -> None:
        self.context = context
        self.actor = context.actor
        self.tenant = context.tenant
        self._error: BaseException | None = None
        self._left: Context | None = None

    def __enter__(self) -> Self:
        self._token = _current.set(self.context)
        self._noted_token = _noted.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _noted.reset(self._noted_token)
        _current.reset(self._token)
        self._error = self._left = None  # an error holds the frames that it came through, and all that is in them

    def bound(self, context: Context) -> None:
        """Note a context that is bound inside."""
        own = self.context
        if context.actor is not None and self.actor == own.actor:
            self.actor = context.actor
        if context.tenant is not None and self.tenant == own.tenant:
            self.tenant = context.tenant

    def left(self, context: Context, error: BaseException) -> None:
        """Note that an error leaves a context that was bound inside; it leaves the innermost one first."""
        if self._error is not error:
            self._error, self._left = error, context

    def left_by(self, error: BaseException) -> Context | None:
        """The innermost context that `error`, or what caused it, has left; None where it was raised in `context`."""
        seen: list[BaseException] = [error]
        try:
            for each in seen:
                if each is self._error:
                    return self._left
                if isinstance(each, BaseExceptionGroup):
                    seen += cast("BaseExceptionGroup[BaseException]", each).exceptions
                seen += [more for more in (each.__cause__, each.__context__) if more is not None]
                if len(seen) > _MOST_ERRORS:
                    break
        except Exception:  # noqa: BLE001  an error is code of others, and may fail when it is asked what is in it
            return None
        return None


_noted: ContextVar[Noted | None] = ContextVar("mainstay_noted", default=None)


def _bound() -> Context:
    context = _current.get()
    return context if isinstance(context, Context) else context.get()


# OpenTelemetry's `get_current_span` and what it returns outside of any, once its API is imported, which is no
# dependency. Where no SDK is installed this question costs less than asking for the provider first.
_ask: Callable[[], Any] | None = None
_no_span: object = None


def _look_for_opentelemetry() -> Callable[[], Any] | None:
    global _ask, _no_span  # imported once in a process
    source: Any = sys.modules.get("opentelemetry.trace")
    ask = getattr(source, "get_current_span", None)  # None also while another thread is importing it
    if ask is not None:
        _no_span, _ask = source.INVALID_SPAN, ask
    return ask


def _within(span: Any, context: Context) -> Context:
    """The same context in a span."""
    active = span.get_span_context()
    if not active.is_valid:
        return context
    traceparent = f"00-{active.trace_id:032x}-{active.span_id:016x}-{active.trace_flags:02x}"
    if traceparent == context.traceparent:
        return context
    state = active.trace_state.to_header() if active.trace_state else None
    return Context(context.correlation_id, context.causation_id, context.actor, context.tenant, traceparent, state)


def current() -> Context:
    """The context of the running task or thread; an empty one where none was bound.

    Its trace context is that of OpenTelemetry's span that is active now; without one, as it was bound.
    """
    context = _current.get()
    if not isinstance(context, Context):
        context = context.get()
    ask = _ask or _look_for_opentelemetry()
    if ask is None or (span := ask()) is _no_span:
        return context
    return _within(span, context)


def rebind(context: Context | Later) -> None:
    """Use another context until the task ends or the next one is bound; for loops that own their task."""
    _current.set(context)


class bind:  # noqa: N801  used like a function: `with bind(actor="ann"):`
    """Use another context inside a `with` block.

    `with bind(tenant="acme"):` changes single fields; `with bind(context):` replaces the context whole, and
    `with bind(context, causation_id=…)` does both. Yields the new context. A trace that is bound is the one that was
    received: inside an active span, `current()` names the span instead.

    Raises:
        ValueError: a changed field is malformed. Here it is a mistake to be seen; on the wire it would vanish. Or the
            block ends in another task than it began in, where it stays bound.
        TypeError: there is no such field.
    """

    __slots__ = ("_context", "_token")

    def __init__(self, context: Context | None = None, **changes: Any) -> None:
        base = _bound() if context is None else context  # never the span: it may end before the block does
        for name, value in changes.items():
            if value is not None and name in _HEADERS and not _well_formed(name, value):
                msg = f"bind({name}={value!r:.80}): {name} is {_explain(name)}, or None"
                raise ValueError(msg)
        # Not dataclasses.replace, which is slower: this runs for every request and event.
        self._context = Context(**{**{name: getattr(base, name) for name in _HEADERS}, **changes}) if changes else base

    def __enter__(self) -> Context:
        self._token: Token[Context | Later] = _current.set(self._context)
        noted = _noted.get()
        if noted is not None:
            noted.bound(self._context)
        ask = _ask or _look_for_opentelemetry()
        return self._context if ask is None or (span := ask()) is _no_span else _within(span, self._context)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            noted = _noted.get()
            if noted is not None:
                noted.left(self._context, error)
        try:
            _current.reset(self._token)
        except ValueError:
            # Entered in another context of Python's: a framework runs the two halves of a dependency that is a plain
            # generator in threads, each with a copy that is thrown away. There is nothing to undo, unless what was
            # entered was copied to here, and goes on there.
            before = _EMPTY if self._token.old_value is Token.MISSING else self._token.old_value
            if _current.get() is self._context and before is not self._context:
                raise
