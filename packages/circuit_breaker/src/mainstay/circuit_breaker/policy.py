"""`Policy`: what can stand around a call, and how it gets there."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
import threading
import types
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, ParamSpec, Self, TypeVar, cast

from mainstay.circuit_breaker._checks import REFUSALS, Mode, kind_of
from mainstay.circuit_breaker._codegen import SHARED, Lines, code_of, compiling
from mainstay.circuit_breaker.errors import WrongKind

__all__ = ["Policy"]

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Layer(Lines):
    """What a policy contributes to a generated function.

    Attributes:
        policy: the one that contributes.
        names: what the lines refer to; `circuit` becomes `circuit_0` in the outermost layer, and so on.
    """

    policy: Policy
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
    # a frame for each: then the last one of this task or thread. And one that cannot be told must still end, or its
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
            refusal = REFUSALS.get((layer.kind, mode))
            if refusal is not None:
                msg = f"{layer.policy!r} {refusal}"
                raise TypeError(msg)
        name = getattr(fn, "__name__", "call")
        namespace: dict[str, Any] = {"__builtins__": __builtins__, "__name__": __name__, **SHARED}
        if inner is not None:
            # The function around which attempts race, with the layers inside the hedge.
            namespace["fn"] = self._build("async" if fn is not None else "async_run", fn, inner)
            if fn is None:
                mode = "async_run"
        else:
            namespace["fn"] = fn
        built = types.FunctionType(code_of(mode, layers), namespace, name)
        with compiling:
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
        built.__code__ = code_of(mode, layers)

    def _recompile(self) -> None:
        """Give the functions that this policy takes part in the code of its present shape."""
        with compiling:
            for built, (owner, mode, start) in list((self._compiled or {}).items()):
                owner._fit(built, mode, start)


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
