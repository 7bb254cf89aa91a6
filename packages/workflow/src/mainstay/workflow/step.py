"""Steps: the functions whose outcome a run records."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar, overload

from mainstay.core import App, Binding, FullJitter, Retry, RetryState
from mainstay.workflow._branch import current_branch
from mainstay.workflow._signature import Signature, is_async
from mainstay.workflow._threads import Threads
from mainstay.workflow.errors import NotInRun
from mainstay.workflow.outcome import Done, Failed, Unknown

__all__ = ["CompensationInfo", "Step", "StepInfo", "current_compensation", "current_step"]

P = ParamSpec("P")
T = TypeVar("T")

OnUnknown = Literal["compensate", "probe", "park"]
Exhausted = Literal["compensate", "park"]


def any_error(retry_state: RetryState, /) -> bool:
    """Every `Exception` is worth another attempt."""
    return isinstance(retry_state.outcome.exception(), Exception)


COMPENSATION_RETRY = Retry(attempts=30, wait=FullJitter(initial_seconds=0.2, max_seconds=60.0), retry=any_error)
"""A compensation tries for ten minutes or so, whatever the error, before it asks for a person."""


@dataclass(frozen=True, slots=True)
class StepPolicy:
    """How one kind of work is attempted, and what undoes it; see `WorkflowRouter.step` for the fields."""

    retry: Retry = field(default_factory=Retry)
    timeout_seconds: float | None = None
    failed_on: tuple[type[Exception], ...] = ()
    on_unknown: OnUnknown = "compensate"
    transactional: bool = False
    pivot: bool = False
    one_call: bool = False
    exhausted: Exhausted = "compensate"
    harmless: bool = False
    after_pivot: bool = False
    cancellable: bool = False

    @property
    def uncompensated(self) -> tuple[str, ...]:
        """The options that say that no compensation undoes the step; without any it needs one."""
        return tuple(name for name in ("harmless", "pivot", "after_pivot") if getattr(self, name))


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What the code of a step may know about itself.

    Attributes:
        run_id: the run it is part of.
        name: the step's name.
        key: names this step of this run, in every attempt and after every crash: the idempotency key to hand to others.
        attempt: from 1; one that a crash cut off is not counted.
        undoes: in a compensation, the `key` of the step that it undoes: what the other side knows the original by.
    """

    run_id: str
    name: str
    key: str
    attempt: int
    undoes: str | None = None


@dataclass(frozen=True, slots=True)
class CompensationInfo(StepInfo):
    """What the code of a compensation may know about itself: `undoes` is always there."""

    undoes: str = ""


current_info: ContextVar[StepInfo | None] = ContextVar("mainstay_workflow_step", default=None)


def current_step() -> StepInfo:
    """The step or compensation whose code is running.

    Raises:
        NotInRun: none is.
    """
    info = current_info.get()
    if info is None:
        msg = "current_step() was called outside the code of a step or of a compensation"
        raise NotInRun(msg)
    return info


def current_compensation() -> CompensationInfo:
    """The compensation whose code is running.

    Raises:
        NotInRun: none is: a step has nothing to undo.
    """
    info = current_info.get()
    if not isinstance(info, CompensationInfo):
        msg = "current_compensation() was called outside the code of a compensation"
        raise NotInRun(msg)
    return info


class Step(Generic[P, T]):
    """A durable step; made by `@flows.step(…)`. Awaited in a workflow function it is executed, or recalled.

    Attributes:
        name: the function's name, which is part of every record: renaming it strands the runs that have it.
        function: the plain function, for tests and for other code that wants no durability.
    """

    def __init__(
        self,
        function: Callable[P, Awaitable[T]] | Callable[P, T],
        policy: StepPolicy,
        undo_retry: Retry,
        *,
        binding: Binding[Any],
    ) -> None:
        self.signature = Signature(function, kind="step")
        _check_thread(function, policy)
        self.name = self.signature.name
        self.function: Callable[P, Any] = function  # async or plain
        self.policy = policy
        self.undo_policy = StepPolicy(
            retry=undo_retry, timeout_seconds=policy.timeout_seconds, transactional=policy.transactional, one_call=True
        )
        self.own_code = own_code(function)
        self.undo: Callable[..., Awaitable[None]] | None = None
        self.ask: Callable[..., Awaitable[Done[T] | Failed | Unknown]] | None = None
        self.binding = binding
        self._filled: dict[Callable[..., Any], Callable[..., Any]] = {}
        self.__doc__ = function.__doc__
        self.__wrapped__ = function

    def __repr__(self) -> str:
        return f"<step {self.name}>"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
        """Execute the step as part of the run around it.

        Raises:
            NotInRun: there is none around it.
            StepFailed: the step ended without a result.
        """
        return self._execute(args, kwargs)

    async def _execute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        branch = current_branch.get()  # asked when awaited: a gather awaits it in a branch of its own
        if branch is None:
            where = "inside the code of another step" if current_info.get() is not None else "outside a run"
            msg = (
                f"step {self.name} was called {where}: steps are called by workflow functions; "
                f"{self.name}.function is the plain function"
            )
            raise NotInRun(msg)
        result: T = await branch.primitives.step(branch, self, args, kwargs)
        return result

    @overload
    def compensation(
        self, function: Callable[Concatenate[Done[T] | Unknown, P], Awaitable[None]]
    ) -> Callable[Concatenate[Done[T] | Unknown, P], Awaitable[None]]: ...
    @overload
    def compensation(
        self, function: Callable[Concatenate[Done[T] | Unknown, P], None]
    ) -> Callable[Concatenate[Done[T] | Unknown, P], None]: ...
    def compensation(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate the function that undoes the step; its first parameter is the outcome, the others are the step's.

        It runs when a later step fails for good, in reverse order of completion, until it succeeds. It is repeated
        after a crash, so it must tolerate having run; and for `Unknown` it must tolerate that there is nothing to undo.

        Raises:
            TypeError: it does not fit the step, or the step has one, or says that it needs none.
        """
        if self.policy.uncompensated:
            (why,) = self.policy.uncompensated
            msg = f"step {self.name} says that nothing undoes it: remove {why}=True, or {_name(function)}"
            raise TypeError(msg)
        if self.undo is not None:
            msg = f"step {self.name} already has a compensation"
            raise TypeError(msg)
        self._fits(function, "compensation", leading=1)
        _check_thread(function, self.undo_policy)
        self.undo = function
        return function

    @overload
    def probe(
        self, function: Callable[P, Awaitable[Done[T] | Failed | Unknown]]
    ) -> Callable[P, Awaitable[Done[T] | Failed | Unknown]]: ...
    @overload
    def probe(self, function: Callable[P, Done[T] | Failed | Unknown]) -> Callable[P, Done[T] | Failed | Unknown]: ...
    def probe(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate the function that asks the other side what became of an attempt whose end was not seen.

        Raises:
            TypeError: it does not fit the step, or the step does not say `on_unknown="probe"`.
        """
        if self.policy.on_unknown != "probe":
            msg = f'step {self.name} would never use a probe: write @…step(on_unknown="probe")'
            raise TypeError(msg)
        self._fits(function, "probe", leading=0)
        self.ask = function
        return function

    def _fits(self, function: Callable[..., Any], kind: str, *, leading: int) -> None:
        signature = Signature(function, kind=kind)
        parameters = signature.parameters[leading:]
        if len(signature.parameters) < leading or parameters != self.signature.parameters:
            wanted = ", ".join([*["outcome"] * leading, *self.signature.parameters])
            msg = (
                f"{kind} {signature.name} takes ({', '.join(signature.parameters)}); "
                f"that of step {self.name} takes ({wanted})"
            )
            raise TypeError(msg)

    def functions(self) -> list[Callable[..., Any]]:
        """The function of the step, and those of its compensation and probe where there are any."""
        return [function for function in (self.function, self.undo, self.ask) if function is not None]

    @contextmanager
    def filled_by(self, app: App, threads: Threads) -> Generator[None, None, None]:
        """Give the step's functions the services of `app` within the block, and plain ones a thread."""

        def filled(function: Callable[..., Any]) -> Callable[..., Any]:
            return app.fill(function) if is_async(function) else threads.awaitable(app.fill(function))

        self._filled = {function: filled(function) for function in self.functions()}
        try:
            yield
        finally:
            self._filled = {}

    def call(self, arguments: Mapping[str, Any]) -> Awaitable[T]:
        """Call the step's function with arguments by name, and with the App's services."""
        return self.signature.call(arguments, function=self._filled.get(self.function, self.function))

    def call_undo(self, arguments: Mapping[str, Any], outcome: Done[T] | Unknown) -> Awaitable[None]:
        """Call its compensation in the same way."""
        assert self.undo is not None  # noqa: S101  a step without one is never undone
        return self.signature.call(arguments, outcome, function=self._filled.get(self.undo, self.undo))

    def call_probe(self, arguments: Mapping[str, Any]) -> Awaitable[Done[T] | Failed | Unknown]:
        """Call its probe in the same way."""
        assert self.ask is not None  # noqa: S101  the same
        return self.signature.call(arguments, function=self._filled.get(self.ask, self.ask))

    def check(self) -> None:
        """What can be said only when everything is defined: annotations, and that something undoes the step.

        Raises:
            TypeError: an annotation does not resolve, or a compensation or probe is missing.
        """
        self.signature.check()
        if self.undo is None and not self.policy.uncompensated:
            msg = (
                f"step {self.name} has no compensation: add @{self.name}.compensation, say @….step(harmless=True) if "
                "it leaves nothing to undo, or after_pivot=True if it is executed only after a pivot"
            )
            raise TypeError(msg)
        if self.policy.on_unknown == "probe" and self.ask is None:
            msg = f'step {self.name} says on_unknown="probe": add @{self.name}.probe'
            raise TypeError(msg)


class DeclareStep(Protocol):
    """Makes a step of an `async def` function, or of a plain one that is executed in a thread."""

    @overload
    def __call__(self, function: Callable[P, Awaitable[T]], /) -> Step[P, T]: ...
    @overload
    def __call__(self, function: Callable[P, T], /) -> Step[P, T]: ...


def _check_thread(function: Callable[..., Any], policy: StepPolicy) -> None:
    """Refuse a thread for what writes in the loop's own transaction, and for what a cancellation is to end.

    Raises:
        TypeError: the function is plain, and the step transactional or cancellable.
    """
    if policy.cancellable and not is_async(function):
        msg = (
            f"{_name(function)} must be an `async def` function: a plain one is executed in a thread, which cannot be "
            "stopped, so leave cancellable=True out"
        )
        raise TypeError(msg)
    if policy.transactional and not is_async(function):
        msg = (
            f"{_name(function)} must be an `async def` function: a plain one is executed in a thread, where the "
            "transaction of its step is not"
        )
        raise TypeError(msg)


def own_code(function: Callable[..., Any]) -> CodeType | None:
    """The code of a function below policies of ours, which say truly whether they entered it.

    None without such policies, and where anything else stands between: what that has tried before is not known.
    """
    below: Any = function
    while (inner := getattr(below, "__wrapped__", None)) is not None:
        code = getattr(below, "__code__", None)
        if code is None or not code.co_filename.startswith("<mainstay."):
            return None
        below = inner
    return None if below is function else getattr(below, "__code__", None)


def _name(function: Callable[..., Any]) -> str:
    return getattr(inspect.unwrap(function), "__name__", repr(function))


AnyStep = Step[..., Any]
