"""Workflows, and the handles of their runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Generic, Never, ParamSpec, Protocol, TypeAlias, TypeVar, cast, overload

from mainstay.core import Binding, derived_id, once
from mainstay.workflow import _names
from mainstay.workflow._branch import current_branch
from mainstay.workflow._signature import Signature
from mainstay.workflow.errors import NotInRun

if TYPE_CHECKING:
    from mainstay.workflow.engine import WorkflowEngine
    from mainstay.workflow.forms import Group
    from mainstay.workflow.value import Published, Value

__all__ = ["Handle", "RunInput", "RunStatus", "Workflow"]

P = ParamSpec("P")
T = TypeVar("T")
V = TypeVar("V")
T1 = TypeVar("T1")
T2 = TypeVar("T2")
T3 = TypeVar("T3")
T4 = TypeVar("T4")
T5 = TypeVar("T5")
T6 = TypeVar("T6")
F_co = TypeVar("F_co", covariant=True)


class RunStatus(StrEnum):
    """Where a run is."""

    QUEUED = "queued"
    """It waits for a worker."""
    WAITING = "waiting"
    """It waits for a time, a signal, a child, or the end of a pause before another attempt; a worker takes it then."""
    RUNNING = "running"
    COMPENSATING = "compensating"
    """It failed or was cancelled, and what it did is being undone."""
    COMPLETED = "completed"
    FAILED = "failed"
    """It failed, and everything that it did is undone."""
    CANCELLED = "cancelled"
    """It was cancelled, and everything that it did is undone."""
    TERMINATED = "terminated"
    """A person ended it as it was: nothing is undone."""
    PARKED = "parked"
    """It waits for a person."""
    COMPENSATION_FAILED = "compensation_failed"
    """Undoing it got stuck; it waits for a person, and is resumed there."""

    @property
    def terminal(self) -> bool:
        """Whether nothing more will happen to the run."""
        return self in ENDS

    @property
    def waits_for_a_person(self) -> bool:
        """Whether only `resume` or `cancel` takes the run on."""
        return self in {RunStatus.PARKED, RunStatus.COMPENSATION_FAILED}


ENDS = frozenset({RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.CANCELLED, RunStatus.TERMINATED})


@dataclass(frozen=True, slots=True)
class Handle(Generic[T]):
    """One run, in whatever process it executes."""

    id: str
    _signature: Signature
    _engine: WorkflowEngine

    async def result(self, timeout_seconds: float | None = None) -> T:
        """Wait for the run to end and return what its function returned.

        Raises:
            WorkflowFailed: it failed or was cancelled, and is compensated; or it was terminated, and is not.
            RunParked: it waits for a person.
            DeadlineExceeded: it has not ended after `timeout_seconds`; it goes on.
            RunNotFound: it does not exist, for example because the transaction that started it was rolled back.
        """
        state = await self._engine.ended(self.id, timeout_seconds)
        result: T = self._signature.load_result(state)
        return result

    async def status(self) -> RunStatus:
        """Where the run is.

        Raises:
            RunNotFound: it does not exist.
        """
        return await self._engine.status(self.id)

    async def value(self, value: Value[V]) -> Published[V] | None:
        """The value that the run has set last: `Value.of`.

        Raises:
            RunNotFound: it does not exist.
        """
        return await value.of(self.id)

    async def cancel(self) -> None:
        """Ask for the run to be cancelled: it stops at the next boundary between steps, and compensates.

        Once this returns the run does not complete, go on with new input or begin a pivot, in whichever process it is
        executed. Only a pivot that is being executed already may still be done, unless it is transactional; the run
        then goes forward to its end.

        Raises:
            RunStateError: it has ended, is past its pivot, or is parked with a pivot that may have taken effect.
            RunNotFound: it does not exist.
        """
        await self._engine.cancel(self.id)


@dataclass(frozen=True, slots=True)
class RunInput(Generic[T]):
    """The input of a run that is yet to be started; made by `workflow.input(…)`.

    Attributes:
        workflow: whose input it is.
        text: the arguments as JSON.
        id: of the run; None for one that is given when it is started.
    """

    workflow: AnyWorkflow
    text: str = field(repr=False)
    id: str | None = None

    def named(self, id: str) -> RunInput[T]:
        """The same input, for the run with this id.

        Raises:
            TypeError: the id is no text.
            ValueError: it breaks the rule for identifiers.
        """
        return replace(self, id=_names.run_id(id))

    async def start(self) -> Handle[T]:
        """Begin the run. See `Workflow.start`."""
        begin: Callable[[str, str | None], Awaitable[Handle[T]]] = self.workflow.begin
        return await begin(self.text, self.id)


class _Of(Protocol[F_co]):
    """What has a function of this type: a ParamSpec takes no keyword of ours beside its own (docs/adr/0070)."""

    @property
    def function(self) -> F_co: ...


class Workflow(Generic[P, T]):
    """A durable workflow; made by `@flows.workflow(name=…)`.

    Attributes:
        name, version: what a run's record names; both stay as long as there are runs of it.
        timeout_seconds: how long after its start a run fails that has not ended; None for no limit.
        function: the plain function.
        plan: its steps as data, where `saga` declared it.
    """

    def __init__(
        self,
        function: Callable[P, Awaitable[T]],
        name: str,
        version: int,
        binding: Binding[WorkflowEngine],
        *,
        timeout_seconds: float | None = None,
    ) -> None:
        self.signature = Signature(function, kind="workflow")
        if "id" in self.signature.keywords:
            msg = f"workflow {self.signature.name} has a parameter id, which `start` takes as the run's: rename it"
            raise TypeError(msg)
        self.name = name
        self.version = version
        self.timeout_seconds = timeout_seconds
        self.function: Callable[P, Awaitable[T]] = function
        self.binding = binding
        self.plan: Group[Any, Any] | None = None
        self.__doc__ = function.__doc__
        self.__wrapped__ = function

    def __repr__(self) -> str:
        return f"<workflow {self.name} version {self.version}>"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
        """Inside a workflow function: execute it as a run of its own, a child, and wait for its result.

        The child is started once, also where its parent crashes, and executed by any worker; the parent waits for it
        without memory. Where the parent is undone, the child is, too.

        Raises:
            NotInRun: there is no run around it; `start` begins one.
            WorkflowFailed: the child failed or was cancelled.
        """
        return self._as_child(args, kwargs)

    async def _as_child(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> T:
        branch = current_branch.get()
        if branch is None:
            name = self.signature.name
            msg = f"{name}(…) was called outside a run: `await {name}.start(…, id=…)` begins one"
            raise NotInRun(msg)
        result: T = await branch.primitives.child(branch, self, self._text(args, kwargs))
        return result

    def _text(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        return self.signature.dump_arguments(self.signature.bind(args, kwargs))

    async def continue_with(self, *args: P.args, **kwargs: P.kwargs) -> Never:
        """Inside this workflow's function: end its history and go on under the same id, with new input.

        For runs that live for long, such as a subscription or a poller: what they have done would otherwise be read
        again by each worker that takes them. One commit replaces the input and forgets the history; signals that were
        not received are kept. What was done before is final: a later failure or cancellation undoes nothing of it.
        A step of which it is unknown whether it happened is undone first. `timeout_seconds` goes on from the start of
        the run. Called on another version of the same workflow, the run goes on as one of that version.

        It does not return. What the function does all the same is ignored, as after any end. The run is parked where
        the function did not read all of its record, or left something going on; a cancellation that was asked for
        before comes first.

        Args:
            args, kwargs: the input, kept as JSON.

        Raises:
            NotInRun: there is no run around it.
            TypeError: the arguments do not fit.
        """
        branch = current_branch.get()
        if branch is None:
            msg = f"{self.signature.name}.continue_with(…) was called outside a run: only its own function goes on"
            raise NotInRun(msg)
        await branch.primitives.go_on(branch, self, self._text(args, kwargs))

    @overload
    async def start(self, *args: P.args, **kwargs: P.kwargs) -> Handle[T]: ...
    @overload
    async def start(self: _Of[Callable[[], Awaitable[T]]], *, id: str | None) -> Handle[T]: ...
    @overload
    async def start(self: _Of[Callable[[T1], Awaitable[T]]], one: T1, /, *, id: str | None) -> Handle[T]: ...
    @overload
    async def start(
        self: _Of[Callable[[T1, T2], Awaitable[T]]], one: T1, two: T2, /, *, id: str | None
    ) -> Handle[T]: ...
    @overload
    async def start(
        self: _Of[Callable[[T1, T2, T3], Awaitable[T]]], one: T1, two: T2, three: T3, /, *, id: str | None
    ) -> Handle[T]: ...
    @overload
    async def start(
        self: _Of[Callable[[T1, T2, T3, T4], Awaitable[T]]], one: T1, two: T2, three: T3, four: T4, /, *, id: str | None
    ) -> Handle[T]: ...
    @overload
    async def start(
        self: _Of[Callable[[T1, T2, T3, T4, T5], Awaitable[T]]],
        one: T1,
        two: T2,
        three: T3,
        four: T4,
        five: T5,
        /,
        *,
        id: str | None,
    ) -> Handle[T]: ...
    @overload
    async def start(
        self: _Of[Callable[[T1, T2, T3, T4, T5, T6], Awaitable[T]]],
        one: T1,
        two: T2,
        three: T3,
        four: T4,
        five: T5,
        six: T6,
        /,
        *,
        id: str | None,
    ) -> Handle[T]: ...
    async def start(self, *args: Any, id: str | None = None, **kwargs: Any) -> Handle[T]:  # type: ignore[misc]  # adr/0070
        """Begin a run; durable when this returns, or, inside `db.transaction()`, with its commit.

        Inside a workflow function it is a recorded step, from whose key the id derives: a replay starts nothing again.

        Args:
            args, kwargs: the input, kept as JSON.
            id: names the run for as long as it is kept: starting again with the same id and the same input returns the
                same run. Without one, the run is a new one. 1 to 128 of the characters in `mainstay.core.ID_RULE`.
                Type checkers take it beside at most six positional arguments; beside keywords, and for more, write
                `workflow.input(…).named(id).start()`.

        Raises:
            RunConflict: the id belongs to another workflow or to another input.
            TypeError: the arguments do not fit, or the id is no text.
            ValueError: the id breaks the rule for identifiers.
            NotBoundError: the router is not part of a running App.
        """
        return await self.begin(self._text(args, kwargs), None if id is None else _names.run_id(id))

    def input(self, *args: P.args, **kwargs: P.kwargs) -> RunInput[T]:
        """The input of a run that is yet to be started: `named` gives it an id, `start` and `start_batch` begin it.

        Raises:
            TypeError: the arguments do not fit, or a value would not come back equal as its parameter's type.
        """
        return RunInput(self, self._text(args, kwargs))

    async def begin(self, text: str, chosen: str | None) -> Handle[T]:
        """Begin a run with its input as JSON. See `start`."""
        engine = self.binding.get()
        started: list[str] = []

        async def begin(key: str | None) -> None:
            run_id = _id_of(key) if chosen is None else chosen
            started.append(
                await engine.start(self.name, self.version, text, run_id, timeout_seconds=self.timeout_seconds)
            )

        def arguments() -> object:
            return chosen, self.signature.given_arguments(text)

        key = await once(f"start:{self.name}", begin, transactional=False, arguments=arguments)
        # On a replay nothing is begun: the id is the one that was asked for, or that of the step.
        run_id = started[0] if started else _id_of(key) if chosen is None else chosen
        return Handle(cast("str", run_id), self.signature, engine)

    def handle(self, id: str) -> Handle[T]:
        """The run with this id, which may exist or not.

        Raises:
            TypeError: the id is no text.
            ValueError: it breaks the rule for identifiers.
        """
        return Handle(_names.run_id(id), self.signature, self.binding.get())


def _id_of(key: str | None) -> str | None:
    """The id of a run that a step starts; None outside a run, where each is a new one."""
    return None if key is None else str(derived_id(key))


AnyWorkflow: TypeAlias = Workflow[..., Any]
