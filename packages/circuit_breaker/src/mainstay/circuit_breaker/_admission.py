"""The path of a call: one generated function for all the policies around it.

Benchmark rows: "breaker closed, async", "breaker closed, sync", "four policies, nothing going wrong" in
`benchmarks/circuit_breaker`.

Written the readable way, each policy is a wrapper of its own: a frame, a packing and unpacking of arguments, a
coroutine and an await, for each of them, on each call; a breaker as a class with `admit` and `settle` adds two method
calls and a lock. That is what costs the libraries around us between one and twenty-five microseconds a call. Here the
policies write the lines that they need into **one function**, outermost first, around one call:

    async def call(*args, **kwargs):
        window_0 = circuit_0.window            # admission: the one thing that a closed circuit needs to say
        if window_0 is None:
            asked_0 = now_0()
            if asked_0 < circuit_0.shut_until: # open, and not for a moment only
                circuit_0.rejected += 1
                raise CircuitOpen(name_0, 'open', circuit_0.shut_until - asked_0)
            window_0 = admit_0()               # half open, ramping, …: the state machine decides
            if window_0 is None:
                raise rejection_0()
        try:
            result = await fn(*args, **kwargs)
        except BaseException as error_0:
            raised_0(window_0, error_0)
            raise
        if window_0 is circuit_0.window:       # settling: the state has not changed meanwhile
            window_0.successes += 1            # the window, the ratio, the streak and the metrics, in one addition
        else:
            succeeded_0(window_0)
        return result

Three things make it cheap. The ticket *is* the window, so that one comparison answers "is it still closed, and the same
epoch". A success only increments a counter: what a window needs beyond that is worked out when a failure comes, since
only then can a circuit open, and metrics are read from the counters when somebody scrapes. And `try` costs nothing
until something raises.

**Threads.** There is no lock around `window.successes += 1`. With the interpreter's global lock, threads switch only at
calls and at jumps backwards; between the comparison and the addition there is neither, so nothing is lost or counted
twice. Without the global lock that does not hold, and the same lines are generated with the circuit's lock around them
(`_LOCKED`).

**Shapes.** The text depends only on which policies there are and which of their features are on, never on their names
or numbers. It is compiled once per shape; each decorated function gets the code object with a namespace of its own, in
which `circuit_0`, `admit_0` and so on are globals (as fast as closure cells, and open to change). When a reload
switches a feature on or off, the function is given the code of the other shape in place, and calls under way finish
with the old one.

Tracebacks show the generated lines: they are registered with `linecache`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import linecache
import sys
import threading
import types
import weakref
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, ParamSpec, Self, TypeVar, cast

from mainstay.circuit_breaker.circuit import Probe
from mainstay.circuit_breaker.errors import CircuitOpen, WrongKind

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
T = TypeVar("T")

Mode = Literal["async", "sync", "async_run", "sync_run", "stream", "sync_stream", "async_block", "sync_block"]

_LOCKED: Final = not getattr(sys, "_is_gil_enabled", lambda: True)()


@dataclass(frozen=True, slots=True)
class Layer:
    """What a policy contributes to a generated function.

    Attributes:
        policy: who contributes.
        kind: which lines, a key of `_LINES`.
        shape: which variant of them.
        names: what the lines refer to; `circuit` becomes `circuit_0` in the outermost layer, and so on.
    """

    policy: Policy
    kind: str
    shape: tuple[object, ...]
    names: dict[str, object]


class Policy:
    """Base of everything that can stand around a call.

    A policy decorates functions (async, plain, and async generator functions), runs callables (`call`, `call_sync`),
    and guards blocks (`async with`, `with`), unless it says otherwise.
    """

    # Created on first use: one circuit of a hundred thousand has no functions of its own.
    _compiled: weakref.WeakKeyDictionary[types.FunctionType, tuple[Policy, Mode, int]] | None = None
    _runners: Mapping[Mode, Callable[..., Any]] = types.MappingProxyType({})
    _blocks: dict[types.FrameType, list[tuple[Mode, object, object]]] | None = None  # blocks entered and not yet left

    def _layers(self) -> tuple[Layer, ...]:
        """What it contributes, outermost first."""
        raise NotImplementedError

    def _members(self) -> Sequence[Policy]:
        """The policies that it consists of, outermost first."""
        return (self,)

    def __call__(self, fn: F) -> F:
        """Decorate `fn`.

        Raises:
            TypeError: `fn` is of a kind that a policy here cannot stand around, or one of the policies stands around it
                already; the message says what to write instead.
        """
        mode = kind_of(fn)
        self._refuse_twice(fn)
        built = self._build(mode, fn)
        functools.update_wrapper(built, fn)
        known: tuple[Policy, ...] = getattr(fn, _POLICIES, ())
        setattr(built, _POLICIES, (*known, *self._members()))
        return cast("F", built)

    async def call(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Await `fn(*args, **kwargs)` under this policy.

        Raises:
            TypeError: `fn` returned nothing to await, or is decorated with this policy already.
        """
        # A bound method that lacks an attribute takes ten times as long to say so as its function does.
        named: Any = fn
        if getattr(named.__func__ if named.__class__ is _Method else named, _POLICIES, None) is not None:
            self._refuse_twice(fn)
        run = self._runners.get("async_run") or self._runner("async_run")
        return cast("T", await run(fn, *args, **kwargs))

    def call_sync(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the plain function `fn(*args, **kwargs)` under this policy.

        Raises:
            TypeError: `fn` is no plain function, or is decorated with this policy already.
        """
        named: Any = fn
        if getattr(named.__func__ if named.__class__ is _Method else named, _POLICIES, None) is not None:
            self._refuse_twice(fn)
        run = self._runners.get("sync_run") or self._runner("sync_run")
        return cast("T", run(fn, *args, **kwargs))

    async def __aenter__(self) -> Self:
        block = contextlib.asynccontextmanager(self._runner("async_block"))()
        await block.__aenter__()
        self._enter_block("async_block", block, sys._getframe(1))
        return self

    async def __aexit__(self, *details: Any) -> bool | None:  # noqa: PYI036  passed on as they come
        block = self._leave_block("async_block", sys._getframe(1))
        return await cast("AbstractAsyncContextManager[None]", block).__aexit__(*details)

    def __enter__(self) -> Self:
        block = contextlib.contextmanager(self._runner("sync_block"))()
        block.__enter__()
        self._enter_block("sync_block", block, sys._getframe(1))
        return self

    def __exit__(self, *details: Any) -> bool | None:  # noqa: PYI036  passed on as they come
        block = self._leave_block("sync_block", sys._getframe(1))
        return cast("AbstractContextManager[None]", block).__exit__(*details)

    # Which block ends? The last one that the same frame began: a `with` statement begins and ends in one frame, also
    # where that is a generator's, which another thread, task or context may drive (as FastAPI does). An `ExitStack` has
    # a frame for each: then the last one of this task or thread. And one that nobody can tell must still end, or its
    # place in a bulkhead would be lost.

    def _enter_block(self, mode: Mode, block: object, frame: types.FrameType) -> None:
        with _entering:
            if self._blocks is None:
                self._blocks = {}
            self._blocks.setdefault(frame, []).append((mode, _runs_in(), block))

    def _leave_block(self, mode: Mode, frame: types.FrameType) -> object:
        with _entering:
            opened = self._blocks or {}
            if frame not in opened:
                runs_in = _runs_in()
                frames = [frame for frame, blocks in opened.items() if blocks[-1][0] == mode]
                if not frames:
                    msg = f"{self!r} was not entered: there is no block to end"
                    raise RuntimeError(msg)
                mine = [frame for frame in frames if opened[frame][-1][1] == runs_in]
                frame = (mine or frames)[-1]
            block = opened[frame].pop()[2]
            if not opened[frame]:
                del opened[frame]
            return block

    # Building

    def _runner(self, mode: Mode) -> Callable[..., Any]:
        runner = self._runners.get(mode)
        if runner is None:
            runner = self._build(mode, None)
            self._runners = {**self._runners, mode: runner}
        return runner

    def _build(self, mode: Mode, fn: Callable[..., Any] | None, start: int = 0) -> types.FunctionType:
        layers, inner = self._cut(start)
        for layer in layers:
            refusal = _REFUSALS.get((layer.kind, mode))
            if refusal is not None:
                msg = f"{layer.policy!r} {refusal}"
                raise TypeError(msg)
        name = getattr(fn, "__name__", "call")
        namespace: dict[str, Any] = {"__builtins__": __builtins__, "__name__": __name__, **_SHARED}
        if inner is not None:
            # The function around which attempts race, with the layers inside the hedge.
            namespace["fn"] = self._build("async" if fn is not None else "async_run", fn, inner)
            if fn is None:
                mode = "async_run"
        else:
            namespace["fn"] = fn
        built = types.FunctionType(_code(mode, layers), namespace, name)
        with _compiling:
            for layer in layers:
                known = layer.policy._compiled
                if known is None:
                    known = layer.policy._compiled = weakref.WeakKeyDictionary()
                known[built] = (self, mode, start)
            # After it is known to the policies: a reload before that would have passed it by.
            self._fit(built, mode, start)
        return built

    def _refuse_twice(self, fn: Callable[..., Any]) -> None:
        around: tuple[Policy, ...] = getattr(fn, _POLICIES, ())
        for policy in self._members():
            if any(policy is other for other in around):
                msg = (
                    f"{getattr(fn, '__name__', repr(fn))} is decorated with {policy!r} already, and twice around one "
                    f"call it would wait for itself: decorate with it, or call through it, not both"
                )
                raise WrongKind(msg)

    def _cut(self, start: int) -> tuple[tuple[Layer, ...], int | None]:
        """The layers that make one function, and where those of the function inside a hedge begin."""
        layers = self._layers()[start:]
        for index, layer in enumerate(layers):
            if layer.kind == "hedge":
                return layers[: index + 1], start + index + 1
        return layers, None

    def _fit(self, built: types.FunctionType, mode: Mode, start: int) -> None:
        """Give a function the names and the code of the present shape; under the lock, or an older one could win."""
        layers, _ = self._cut(start)
        for index, layer in enumerate(layers):
            for name, value in layer.names.items():
                built.__globals__[f"{name}_{index}"] = value
        built.__code__ = _code(mode, layers)

    def _recompile(self) -> None:
        """Give the functions that this policy takes part in the code of its present shape."""
        with _compiling:
            for built, (owner, mode, start) in list((self._compiled or {}).items()):
                owner._fit(built, mode, start)


def require(owner: str, field: str, value: object, range_: str, *, holds: bool) -> None:
    """Refuse an impossible argument.

    Raises:
        ValueError: it does not hold; the message names owner, field, value and range.
    """
    if not holds:
        msg = f"{owner}: {field} is {value!r}; it is {range_}"
        raise ValueError(msg)


_Method: Final = types.MethodType
_entering = threading.RLock()  # the collector may close a generator, and so leave its block, at any allocation
_POLICIES: Final = "__mainstay_policies__"
"""The policies that a function is decorated with. `functools.wraps` carries it to what stands around the function."""


def _runs_in() -> object:
    """The running task, or in plain code the thread."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident() if task is None else task


def is_async(fn: object) -> bool:
    """Whether calling `fn` shows nothing of its outcome yet: an async function or generator, in any guise."""
    looked_at = fn  # by another name, or a type checker takes `fn` for the kinds that it is asked for
    bare = inspect.isroutine(looked_at) or isinstance(looked_at, functools.partial)
    asked: tuple[object, ...] = (fn,) if bare else (fn, type(fn).__call__)
    return any(is_so(each) for each in asked for is_so in (inspect.iscoroutinefunction, inspect.isasyncgenfunction))


def require_plain(owner: str, field: str, fn: object) -> None:
    """Refuse what is to be called, and is no plain callable.

    Raises:
        TypeError: it is not callable, or async: nobody would await what it returns.
    """
    if not callable(fn):
        msg = f"{owner}: {field} is {fn!r}; it is a function"
        raise TypeError(msg)
    if is_async(fn):
        msg = f"{owner}: {field} is an async function, which nobody would await here; give it a plain one"
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


def in_thread(fn: Callable[P, T]) -> Callable[P, Any]:
    """Make an async function of a blocking one: it runs in a thread, with the caller's context.

    For `Timeout` and `Hedge`, which need something that can be cancelled. A thread cannot be: when the time is up the
    caller goes on, and the thread finishes its work unheard. Give the work a time limit of its own as well.
    """

    @functools.wraps(fn)
    async def threaded(*args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.to_thread(fn, *args, **kwargs)

    return threaded


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


_SHARED: Final = {
    "CircuitOpen": CircuitOpen,
    "Coroutine": types.CoroutineType,
    # Nearly all results: what remains is asked whether it can be awaited.
    "Plain": frozenset({bool, bytes, dict, float, int, list, set, str, tuple, type(None)}),
    "Probe": Probe,
    "refuse_finished": refuse_finished,
    "refuse_unfinished": refuse_unfinished,
}

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

_REFUSALS: Final[dict[tuple[str, str], str]] = {
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


# ------------------------------------------------------------------------------------------------- generating text


class _Text:
    """Lines with indentation. The layers ask it what differs between async and plain code."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.asynchronous = mode not in {"sync", "sync_run", "sync_stream", "sync_block"}
        self.streams = mode in {"stream", "sync_stream"}
        self.returns = mode in {"async", "sync", "async_run", "sync_run"}
        self.lines: list[str] = []
        self._depth = 0

    def add(self, *lines: str) -> None:
        """Append lines at the current depth."""
        self.lines.extend("    " * self._depth + line for line in lines)

    def waited(self, name: str, index: str) -> str:
        """The name of something that waits: awaited in async code, its blocking twin in plain code."""
        return f"await {name}_{index}" if self.asynchronous else f"{name}_sync_{index}"

    def driven(self, method: str) -> str:
        """A method of the generator that a stream is."""
        return f"await stream.a{method}" if self.asynchronous else f"stream.{method}"

    @contextmanager
    def block(self, head: str) -> Generator[None]:
        """Append `head` and indent what follows."""
        self.add(head)
        self._depth += 1
        yield
        self._depth -= 1


Body = Callable[[], None]
_codes: dict[tuple[object, ...], types.CodeType] = {}
_compiling = threading.RLock()


def _code(mode: Mode, layers: tuple[Layer, ...]) -> types.CodeType:
    shape = (mode, *((layer.kind, layer.shape) for layer in layers))
    code = _codes.get(shape)
    if code is None:
        with _compiling:
            code = _codes.get(shape) or _codes.setdefault(shape, _compile(mode, layers, len(_codes)))
    return code


def _compile(mode: Mode, layers: tuple[Layer, ...], number: int) -> types.CodeType:
    source = text_of(mode, layers)
    file = f"<mainstay.circuit_breaker {' '.join(layer.kind for layer in layers)} {mode} {number}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = compile(source, file, "exec")
    return next(constant for constant in module.co_consts if isinstance(constant, types.CodeType))


def text_of(mode: Mode, layers: tuple[Layer, ...]) -> str:
    """The text of the function for these layers; a test prints it, people may."""
    text = _Text(mode)
    runs = mode in {"async_run", "sync_run"}
    parameters = "fn, /, *args, **kwargs" if runs else "*args, **kwargs"
    if runs and layers and layers[-1].kind == "hedge":
        # `fn` is the inner function, and takes the callable as its first argument.
        parameters = "fn_run, /, *args, **kwargs"
    with text.block(f"{'async ' if text.asynchronous else ''}def call({parameters}):"):
        _nest(text, layers, 0)
        if text.returns:
            text.add("return result")
    return "\n".join(text.lines) + "\n"


def _nest(text: _Text, layers: tuple[Layer, ...], index: int) -> None:
    if index < len(layers):
        layer = layers[index]
        _LINES[layer.kind](text, str(index), layer.shape, lambda: _nest(text, layers, index + 1))
    elif layers and layers[-1].kind == "hedge":
        runs = "(fn_run,)" if text.mode == "async_run" else "()"
        text.add(f"result = await race_{index - 1}(fn, {runs}, args, kwargs)")
    elif text.mode in {"async_block", "sync_block"}:
        text.add("result = None", "yield")
    elif text.streams:
        _stream(text, layers)
    elif text.mode == "async":
        text.add("result = await fn(*args, **kwargs)")
    elif text.mode == "async_run":
        text.add("result = fn(*args, **kwargs)")
        with text.block("if result.__class__ is not Coroutine:"):
            text.add("refuse_finished(result)")
        text.add("result = await result")
    else:
        text.add("result = fn(*args, **kwargs)")
        # A plain function that hands back a coroutine would count nothing for ever.
        with text.block("if result.__class__ not in Plain:"):
            text.add("refuse_unfinished(result)")


def _stream(text: _Text, layers: tuple[Layer, ...]) -> None:
    """Pass on what the generator yields, and to it what the consumer sends and throws."""
    text.add("result = None", "stream = fn(*args, **kwargs)")
    with text.block("try:"):
        text.add(f"item = {text.driven('send')}(None)")
        with text.block("while True:"):
            text.add("begun = True")
            _consume(text, layers)
    with text.block(f"except {'StopAsyncIteration' if text.asynchronous else 'StopIteration'}:"):
        text.add("pass")
    with text.block("finally:"):
        text.add(f"{text.driven('close')}()")


def _consume(text: _Text, layers: tuple[Layer, ...]) -> None:
    """One item: what the consumer does with it takes the consumer's time, not the dependency's."""
    circuits = [index for index, layer in enumerate(layers) if layer.kind in {"breaker", "keyed_breaker"}]
    timed = [index for index, layer in enumerate(layers) if _measures(layer)]

    def renew() -> None:
        for index in circuits:
            with text.block(f"if window_{index}.__class__ is Probe:"):
                text.add(f"circuit_{index}._renew(window_{index})")

    def come_back() -> None:
        renew()
        text.add(*(f"started_{index} += now_{index}() - left_{index}" for index in timed))

    renew()
    text.add(*(f"left_{index} = now_{index}()" for index in timed))
    with text.block("try:"):
        text.add("sent = yield item")
    with text.block("except GeneratorExit:"):
        text.add("raise")
    with text.block("except BaseException as thrown:"):
        come_back()
        text.add(f"item = {text.driven('throw')}(thrown)")
    with text.block("else:"):
        come_back()
        text.add(f"item = {text.driven('send')}(sent)")


def _measures(layer: Layer) -> bool:
    """Whether the layer draws conclusions from how long a stream took."""
    if layer.kind == "bulkhead":
        return bool(layer.shape[0])
    return layer.kind in {"breaker", "keyed_breaker"} and bool(layer.shape[1])


def _breaker(text: _Text, i: str, shape: tuple[object, ...], body: Body) -> None:
    _circuit(text, i, shape, body, "")


def _keyed_breaker(text: _Text, i: str, shape: tuple[object, ...], body: Body) -> None:
    text.add(f"key_is_{i} = key_{i}(*args, **kwargs)")
    if _LOCKED:
        text.add(f"circuit_{i} = hold_{i}(key_is_{i})")
    else:
        # Like the counting of a success, an addition without a call inside. A circuit that was forgotten between the
        # look and the addition says so by a number far below zero.
        text.add(f"circuit_{i} = get_{i}(key_is_{i})")
        with text.block(f"if circuit_{i} is not None:"):
            text.add(f"circuit_{i}.under_way += 1")
        with text.block(f"if circuit_{i} is None or circuit_{i}.under_way < 1:"):
            text.add(f"circuit_{i} = hold_{i}(key_is_{i})")
    with text.block("try:"):
        _circuit(text, i, shape, body, f"circuit_{i}.")
    with text.block("finally:"):
        if _LOCKED:
            text.add(f"circuit_{i}._let_go()")
        else:
            text.add(f"circuit_{i}.under_way -= 1")


def _circuit(text: _Text, i: str, shape: tuple[object, ...], body: Body, of: str) -> None:
    """`of` is empty where the circuit's methods are names of their own, bound once."""

    def method(name: str) -> str:
        return f"{of}_{name}" if of else f"{name}_{i}"

    timed, slow, judged = shape
    judged = judged and text.returns  # a block and a stream have no result
    seconds = f", now_{i}() - started_{i}" if slow else ""
    text.add(f"window_{i} = circuit_{i}.window")
    with text.block(f"if window_{i} is None:"):
        text.add(f"asked_{i} = now_{i}()")
        with text.block(f"if asked_{i} < circuit_{i}.shut_until:"):
            text.add(
                f"circuit_{i}.rejected += 1", f"raise CircuitOpen(name_{i}, 'open', circuit_{i}.shut_until - asked_{i})"
            )
        text.add(f"window_{i} = {method('admit')}()")
        with text.block(f"if window_{i} is None:"):
            text.add(f"raise {method('rejection')}()")
    if slow:
        text.add(f"started_{i} = now_{i}()")
    with text.block("try:"):
        body()
        if judged:
            text.add(f"is_bad_{i} = bad_{i}(result)")
    with text.block(f"except BaseException as error_{i}:"):
        text.add(f"{method('raised')}(window_{i}, error_{i}{seconds})", "raise")
    if judged:
        with text.block(f"if is_bad_{i}:"):
            text.add(f"{method('failed')}(window_{i}{seconds})")
        with text.block("else:"):
            _succeed(text, i, method, timed=bool(timed), slow=bool(slow))
    else:
        _succeed(text, i, method, timed=bool(timed), slow=bool(slow))


def _succeed(text: _Text, i: str, method: Callable[[str], str], *, timed: bool, slow: bool) -> None:
    seconds = f", ended_{i} - started_{i}" if slow else ""
    if timed or slow:
        text.add(f"ended_{i} = now_{i}()")
    if timed:
        # Before the comparison: between it and the addition there must be no call.
        with text.block(f"if ended_{i} >= window_{i}.edge:"):
            text.add(f"{method('turn')}()")
    if _LOCKED:
        with text.block(f"with circuit_{i}.lock:"):
            text.add(f"counted_{i} = window_{i} is circuit_{i}.window")
            with text.block(f"if counted_{i}:"):
                text.add(f"window_{i}.successes += 1")
        condition = f"counted_{i}"
    else:
        condition = f"window_{i} is circuit_{i}.window"
    with text.block(f"if {condition}:"):
        text.add("pass" if _LOCKED else f"window_{i}.successes += 1")
        if slow:
            with text.block(f"if ended_{i} - started_{i} > limit_{i}:"):
                text.add(f"{method('was_slow')}(window_{i})")
    with text.block("else:"):
        text.add(f"{method('succeeded')}(window_{i}{seconds})")


def _retry(text: _Text, i: str, shape: tuple[object, ...], body: Body) -> None:
    timed, judged, budgeted = shape
    judged = judged and text.returns  # a stream has no result
    started = f", started_{i}" if timed else ", None"
    if timed:
        text.add(f"started_{i} = now_{i}()")
    if budgeted:
        text.add(f"deposit_{i}()")
    text.add(f"trial_{i} = None")
    if text.streams:
        text.add("begun = False")
    with text.block("while True:"):
        with text.block("try:"):
            body()
        with text.block(f"except Exception as error_{i}:"):
            if text.streams:  # what the consumer has seen cannot be taken back
                with text.block("if begun:"):
                    text.add("raise")
            text.add(f"trial_{i} = again_{i}(trial_{i}, error_{i}{started}, args, kwargs)")
            with text.block(f"if trial_{i}.delay is None:"):
                with text.block(f"if trial_{i}.error is error_{i}:"):
                    text.add(f"trial_{i} = None", "raise")
                text.add(f"raise trial_{i}.take_error()")
        _cut_short(text, i, begun=1)
        # A trial holds an error, whose traceback holds this frame: let go of it, or it is garbage in a cycle.
        with text.block("else:"):
            if judged:
                text.add(f"trial_{i} = again_with_{i}(trial_{i}, result{started}, args, kwargs)")
                with text.block(f"if trial_{i}.delay is None:"):
                    text.add(f"trial_{i} = None", "break")
            else:
                text.add(f"trial_{i} = None", "break")
        with text.block("try:"):
            text.add(f"{text.waited('pause', i)}(trial_{i}.delay)")
        _cut_short(text, i, begun=0)


def _cut_short(text: _Text, i: str, *, begun: int) -> None:
    """If a deadline of ours ends this attempt, or the pause before it, the last real error must not be lost."""
    with text.block(f"except BaseException as error_{i}:"):
        with text.block(f"if trial_{i} is not None:"):
            text.add(f"trial_{i}.cut_short(error_{i}, {begun})", f"trial_{i} = None")
        text.add("raise")


def _timeout(text: _Text, i: str, shape: tuple[object, ...], body: Body) -> None:  # noqa: ARG001  all shapes are alike
    text.add(f"deadline_{i} = begin_{i}()")
    with text.block("try:"):
        body()
    with text.block(f"except BaseException as error_{i}:"):
        text.add(f"end_{i}(deadline_{i}, error_{i})", "raise")
    text.add(f"end_{i}(deadline_{i})")


def _bulkhead(text: _Text, i: str, shape: tuple[object, ...], body: Body) -> None:
    (adaptive,) = shape
    if _LOCKED:
        with text.block(f"if not take_{i}():"):
            text.add(f"{text.waited('queue', i)}()")
    else:
        # Like the counting of a success: between the comparison and the change there is no call.
        with text.block(f"if bulkhead_{i}.free > 0:"):
            text.add(f"bulkhead_{i}.free -= 1")
        with text.block("else:"):
            text.add(f"{text.waited('queue', i)}()")
    if adaptive:
        text.add(f"started_{i} = now_{i}()")
    with text.block("try:"):
        body()
    if adaptive:
        with text.block(f"except BaseException as error_{i}:"):
            text.add(f"learn_{i}(now_{i}() - started_{i}, error_{i})", "raise")
        with text.block("else:"):
            text.add(f"learn_{i}(now_{i}() - started_{i}, None)")
    with text.block("finally:"):
        if _LOCKED:
            text.add(f"release_{i}()")
        else:
            with text.block(f"if bulkhead_{i}.waiting:"):
                text.add(f"release_{i}()")
            with text.block("else:"):
                text.add(f"bulkhead_{i}.free += 1")


def _rate_limit(text: _Text, i: str, shape: tuple[object, ...], body: Body) -> None:  # noqa: ARG001  all shapes are alike
    text.add(f"delay_{i} = take_{i}()")
    with text.block(f"if delay_{i}:"):
        text.add(f"{text.waited('pause', i)}(delay_{i})")
    body()


def _budget(text: _Text, i: str, shape: tuple[object, ...], body: Body) -> None:  # noqa: ARG001  all shapes are alike
    text.add(f"request_{i}(args, kwargs)")
    with text.block("try:"):
        body()
    with text.block(f"except BaseException as error_{i}:"):
        text.add(f"raised_{i}(error_{i})", "raise")
    text.add(f"accepted_{i}()")


def _fallback(text: _Text, i: str, shape: tuple[object, ...], body: Body) -> None:
    asynchronous, remembers = shape
    with text.block("try:"):
        body()
    with text.block(f"except on_{i} as error_{i}:"):
        text.add(f"result = {'await ' if asynchronous else ''}instead_{i}(error_{i}, args, kwargs)")
        with text.block(f"if result is nothing_{i}:"):
            text.add("raise")
    if remembers:
        with text.block("else:"):
            text.add(f"remember_{i}(args, kwargs, result)")


def _hedge(text: _Text, i: str, shape: tuple[object, ...], body: Body) -> None:  # noqa: ARG001  its call is the body's
    body()


def _chaos(text: _Text, i: str, shape: tuple[object, ...], body: Body) -> None:  # noqa: ARG001  all shapes are alike
    text.add(f"fault_{i} = None")
    with text.block(f"if chaos_{i}.armed:"):
        text.add(f"fault_{i} = {text.waited('disturb', i)}()")
    with text.block(f"if fault_{i} is None:"):
        body()
    with text.block("else:"):
        text.add(f"result = fault_{i}.result")


_LINES: Final[dict[str, Callable[[_Text, str, tuple[object, ...], Body], None]]] = {
    "async_fallback": _fallback,
    "breaker": _breaker,
    "budget": _budget,
    "bulkhead": _bulkhead,
    "chaos": _chaos,
    "fallback": _fallback,
    "hedge": _hedge,
    "keyed_breaker": _keyed_breaker,
    "rate_limit": _rate_limit,
    "retry": _retry,
    "timeout": _timeout,
}
