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
only then can a circuit open, and metrics are read from the counters at a scrape. And `try` costs nothing
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

import linecache
import sys
import threading
import types
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from mainstay.circuit_breaker._checks import Mode, refuse_finished, refuse_unfinished
from mainstay.circuit_breaker._recovery import Probe
from mainstay.circuit_breaker.errors import CircuitOpen

_LOCKED: Final = not getattr(sys, "_is_gil_enabled", lambda: True)()

SHARED: Final = {
    "CircuitOpen": CircuitOpen,
    "Coroutine": types.CoroutineType,
    # Nearly all results: what remains is asked whether it can be awaited.
    "Plain": frozenset({bool, bytes, dict, float, int, list, set, str, tuple, type(None)}),
    "Probe": Probe,
    "refuse_finished": refuse_finished,
    "refuse_unfinished": refuse_unfinished,
}
"""What every generated function refers to by the same name."""


@dataclass(frozen=True, slots=True)
class Lines:
    """The lines of one policy in a generated function.

    Attributes:
        kind: which lines, a key of `_LINES`.
        shape: which variant of them.
    """

    kind: str
    shape: tuple[object, ...]


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
compiling = threading.RLock()
"""Held while functions get their code, so that one that is made during a reload gets the new shape."""


def code_of(mode: Mode, layers: Sequence[Lines]) -> types.CodeType:
    shape = (mode, *((layer.kind, layer.shape) for layer in layers))
    code = _codes.get(shape)
    if code is None:
        with compiling:
            code = _codes.get(shape) or _codes.setdefault(shape, _compile(mode, layers, len(_codes)))
    return code


def _compile(mode: Mode, layers: Sequence[Lines], number: int) -> types.CodeType:
    source = text_of(mode, layers)
    file = f"<mainstay.circuit_breaker {' '.join(layer.kind for layer in layers)} {mode} {number}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = compile(source, file, "exec")
    return next(constant for constant in module.co_consts if isinstance(constant, types.CodeType))


def text_of(mode: Mode, layers: Sequence[Lines]) -> str:
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


def _nest(text: _Text, layers: Sequence[Lines], index: int) -> None:
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


def _stream(text: _Text, layers: Sequence[Lines]) -> None:
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


def _consume(text: _Text, layers: Sequence[Lines]) -> None:
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


def _measures(layer: Lines) -> bool:
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
        # Like the counting of a success, an addition without a call inside. A circuit may be forgotten between the
        # look and the addition; one that is forgotten later would have seen the call under way.
        text.add(f"circuit_{i} = get_{i}(key_is_{i})")
        with text.block(f"if circuit_{i} is not None:"):
            text.add(f"circuit_{i}.under_way += 1")
        with text.block(f"if circuit_{i} is None or circuit_{i}.forgotten:"):
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
