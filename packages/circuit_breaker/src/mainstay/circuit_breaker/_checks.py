"""What policies refuse: functions of the wrong kind, results that are still to come, impossible arguments."""

from __future__ import annotations

import asyncio
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, Final, Literal, cast

from mainstay.circuit_breaker.errors import WrongKind

Mode = Literal["async", "sync", "async_run", "sync_run", "stream", "sync_stream", "async_block", "sync_block"]
"""How a call is made: of a decorated function, of one that is handed in, of a generator, or of a `with` block."""


def require(owner: str, field: str, value: object, range_: str, *, holds: bool) -> None:
    """Refuse an impossible argument.

    Raises:
        ValueError: it does not hold; the message names owner, field, value and range.
    """
    if not holds:
        msg = f"{owner}: {field} is {value!r}; it is {range_}"
        raise ValueError(msg)


def is_async(fn: object) -> bool:
    """Whether calling `fn` shows nothing of its outcome yet: an async function or generator, in any guise."""
    looked_at = fn  # by another name, or a type checker takes `fn` for the kinds that it is asked for
    bare = inspect.isroutine(looked_at) or isinstance(looked_at, functools.partial)
    asked: tuple[object, ...] = (fn,) if bare else (fn, type(fn).__call__)
    return any(is_so(each) for each in asked for is_so in (inspect.iscoroutinefunction, inspect.isasyncgenfunction))


def require_plain(owner: str, field: str, fn: object) -> None:
    """Refuse what is to be called, and is no plain callable.

    Raises:
        TypeError: it is not callable, or async: its result is not awaited.
    """
    if not callable(fn):
        msg = f"{owner}: {field} is {fn!r}; it is a function"
        raise TypeError(msg)
    if is_async(fn):
        msg = f"{owner}: {field} is an async function, which is not awaited here; give it a plain one"
        raise TypeError(msg)


def is_whole(value: object) -> bool:
    """Whether it is an integer; callers may be unchecked."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it can be compared with numbers; callers may be unchecked."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def kind_of(fn: Callable[..., Any]) -> Mode:
    """How `fn` is to be called.

    Raises:
        TypeError: it is no function, a class, or a generator function.
    """
    if isinstance(cast("object", fn), staticmethod | classmethod):
        msg = f"a policy goes below @{type(fn).__name__}: write it between that line and the function"
        raise TypeError(msg)
    if not callable(cast("object", fn)):
        msg = f"a policy decorates a function, not {fn!r}"
        raise TypeError(msg)
    if inspect.isclass(fn):
        msg = f"a policy decorates a function, not the class {fn.__name__}: decorate the method that makes the call"
        raise TypeError(msg)
    own = inspect.isroutine(fn) or isinstance(cast("object", fn), functools.partial)
    called = fn if own else type(fn).__call__
    if inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(called):
        return "async"
    if inspect.isasyncgenfunction(fn) or inspect.isasyncgenfunction(called):
        return "stream"
    if inspect.isgeneratorfunction(fn) or inspect.isgeneratorfunction(called):
        msg = f"{getattr(fn, '__name__', repr(fn))} is a generator function: {_NO_GENERATOR}"
        raise TypeError(msg)
    return "sync"


def refuse_unfinished(result: object) -> None:
    """Refuse what a plain function returned, if its work is still to come: all that is known is that it began.

    Raises:
        WrongKind: it is something to await or to iterate over.
    """
    if isinstance(result, types.GeneratorType | types.AsyncGeneratorType):
        msg = f"a plain function returned a generator: {_NO_GENERATOR}"
    elif hasattr(type(result), "__await__"):
        if asyncio.iscoroutine(result):
            result.close()
        msg = (
            "a plain function returned an awaitable, so that its failures would not be counted: decorate the async "
            "function itself (the policy goes below other decorators), or use `await policy.call(fn)`"
        )
    else:
        return
    raise WrongKind(msg)


def refuse_finished(result: object) -> None:
    """Refuse what the callable given to `call` returned, if it is nothing to await.

    Raises:
        WrongKind: it is not.
    """
    if inspect.isawaitable(result):
        return
    if isinstance(result, types.AsyncGeneratorType):
        msg = (
            "`call` awaits one result, and was given an async generator: decorate it, and iterate over what it returns"
        )
    elif isinstance(result, types.GeneratorType):
        msg = f"`call` was given a generator function: {_NO_GENERATOR}"
    else:
        msg = (
            f"`call` awaits what the callable returns, and that has run and returned {type(result).__name__}: give it "
            f"an async function, or use `call_sync`"
        )
    raise WrongKind(msg)


_NO_GENERATOR = (
    "calling it does nothing yet, so there is nothing to count. Make it an async generator, return a list, or write "
    "`with breaker:` around the work inside it"
)
_NO_STREAM = "cannot stand around a stream, whose consumer takes its time: put it around each call inside"
_NO_REPEAT = "cannot repeat the body of a `with` block: decorate a function, or use `call`"
_NO_THREAD = "cannot cancel a thread: make the function async, or wrap it with in_thread and let it run on unheard"
_NO_AWAIT = "has an async function, which a plain caller cannot await: give it a plain one"
_NO_SKIP = "cannot skip the body of a `with` block: decorate a function, or use `call`"
_NO_KEY = "has no key for a `with` block: decorate a function, or use `call`"

REFUSALS: Final[dict[tuple[str, str], str]] = {
    ("timeout", "sync"): _NO_THREAD,
    ("timeout", "sync_run"): _NO_THREAD,
    ("timeout", "sync_block"): _NO_THREAD,
    ("timeout", "stream"): _NO_STREAM,
    ("timeout", "sync_stream"): _NO_THREAD,
    ("hedge", "sync"): _NO_THREAD,
    ("hedge", "sync_run"): _NO_THREAD,
    ("hedge", "sync_block"): _NO_REPEAT,
    ("hedge", "async_block"): _NO_REPEAT,
    ("hedge", "stream"): _NO_STREAM,
    ("hedge", "sync_stream"): _NO_THREAD,
    ("async_fallback", "sync"): _NO_AWAIT,
    ("async_fallback", "sync_run"): _NO_AWAIT,
    ("async_fallback", "sync_block"): _NO_REPEAT,
    ("async_fallback", "async_block"): _NO_REPEAT,
    ("async_fallback", "stream"): _NO_STREAM,
    ("async_fallback", "sync_stream"): _NO_STREAM,
    ("chaos", "sync_block"): _NO_SKIP,
    ("chaos", "async_block"): _NO_SKIP,
    ("chaos", "stream"): _NO_STREAM,
    ("chaos", "sync_stream"): _NO_STREAM,
    ("fallback", "sync_block"): _NO_REPEAT,
    ("fallback", "async_block"): _NO_REPEAT,
    ("fallback", "stream"): _NO_STREAM,
    ("fallback", "sync_stream"): _NO_STREAM,
    ("retry", "sync_block"): _NO_REPEAT,
    ("retry", "async_block"): _NO_REPEAT,
    ("keyed_breaker", "sync_block"): _NO_KEY,
    ("keyed_breaker", "async_block"): _NO_KEY,
}

"""By kind of lines and mode: why they do not go together."""
