"""Where application code declares its steps and workflows."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast, get_args, overload
from uuid import UUID

from mainstay.core import Binding, Retry, uuid7
from mainstay.workflow import _names
from mainstay.workflow._branch import Branch, current_branch
from mainstay.workflow._seconds import checked_moment, checked_seconds
from mainstay.workflow.approval import Approval, MayDecide, OnDecision
from mainstay.workflow.errors import NotInRun
from mainstay.workflow.signal import Signal
from mainstay.workflow.step import COMPENSATION_RETRY, DeclareStep, Exhausted, OnUnknown, Step, StepPolicy
from mainstay.workflow.value import Value
from mainstay.workflow.workflow import Workflow

if TYPE_CHECKING:
    from mainstay.workflow.engine import WorkflowEngine

__all__ = ["WorkflowRouter"]

P = ParamSpec("P")
T = TypeVar("T")
T1 = TypeVar("T1")
T2 = TypeVar("T2")
T3 = TypeVar("T3")
T4 = TypeVar("T4")


class WorkflowRouter:
    """The steps and workflows of one feature; `WorkflowModule.for_feature(router)` adds them to an App.

    Declaring them starts nothing.
    """

    def __init__(self) -> None:
        self.steps: dict[str, Step[..., Any]] = {}
        self.workflows: dict[tuple[str, int], Workflow[..., Any]] = {}
        self.signals: dict[str, Signal[Any]] = {}
        self.values: dict[str, Value[Any]] = {}
        self.approvals: dict[str, Approval[Any]] = {}
        self.binding: Binding[WorkflowEngine] = Binding("WorkflowRouter", remedy="WorkflowModule.for_feature(router)")

    def step(
        self,
        *,
        retry: Retry | None = None,
        timeout_seconds: float | None = None,
        failed_on: tuple[type[Exception], ...] = (),
        on_unknown: OnUnknown = "compensate",
        exhausted: Exhausted = "compensate",
        harmless: bool = False,
        after_pivot: bool = False,
        compensation_retry: Retry = COMPENSATION_RETRY,
        transactional: bool = False,
        pivot: bool = False,
        one_call: bool = False,
        cancellable: bool = False,
    ) -> DeclareStep:
        """Declare a step: an `async def` function, or a plain one, which is executed in a thread.

        Args:
            retry: attempts and waits; by default `Retry()`. Every attempt has the same `current_step().key`.
            timeout_seconds: the limit for one attempt; None for no limit. It cannot stop the thread of a plain
                function, which runs on beside the next attempt; its wait for a free thread counts.
            failed_on: exceptions that mean that nothing happened, and nothing will: the step *fails*, at once.
            on_unknown: what to do about an attempt that may or may not have taken effect (an error, a timeout, a
                crash). `compensate`: attempt it again while `retry` allows, then fail, and compensate. `probe`: ask
                `@step.probe` before any other attempt. `park`: never attempt it again without a person.
            exhausted: what to do once `retry` allows no further attempt. `compensate`: the step ends, failed or
                unknown; unless the function catches that, the run is compensated. `park`: the run waits for a
                person, and `resume` gives the step all of its attempts again. "Retry, then park" is
                `retry=Retry(attempts=8), exhausted="park"`. An error of `failed_on` ends the step all the same.
            harmless: the step leaves nothing to undo: it only reads, or what it leaves behind does no harm.
            after_pivot: the step is executed only after a pivot, when there is no way back, so it has no compensation.
            compensation_retry: attempts and waits of the compensation, before the run is parked as
                `compensation_failed`; by default 30 attempts over ten minutes or so.
            transactional: the step writes to the App's database and does nothing else. It runs inside
                `db.transaction()` and shares the commit with its record: exactly once. Its compensation does, too.
            pivot: once this step is done there is no way back: whatever fails later parks the run instead of undoing
                it. It has no compensation, and is either `transactional`, or `on_unknown` probes or parks.
            one_call: the step makes one call to the other side and nothing before or after it, so an error of that call
                that is `no_effect` says that the step did nothing. In any other step it speaks for its own call only,
                and the step may have done something.
            cancellable: a cancellation of the run, its `timeout_seconds` and `terminate` end the step's code at once,
                with a `CancelledError`; the step is unknown then, and compensated. Otherwise they wait for its end.

        Each step has a compensation (`@step.compensation`), or is one of `harmless`, `pivot` and `after_pivot`.

        Raises:
            TypeError: the function is none that can be a step, or options are none, or contradict each other.
            ValueError: `timeout_seconds` is not positive and finite, or the name is taken.
        """
        _check_limit(timeout_seconds)
        policy = StepPolicy(
            retry=retry or Retry(),
            timeout_seconds=timeout_seconds,
            failed_on=_kinds(failed_on),
            on_unknown=on_unknown,
            transactional=transactional,
            pivot=pivot,
            one_call=one_call,
            exhausted=exhausted,
            harmless=harmless,
            after_pivot=after_pivot,
            cancellable=cancellable,
        )
        _check_policy(policy)

        def declare(function: Callable[..., Any], /) -> Step[..., Any]:
            step = Step[..., Any](function, policy, compensation_retry, binding=self.binding)
            self._add(step)
            return step

        return cast("DeclareStep", declare)

    def _add(self, step: Step[..., Any]) -> None:
        _names.step_name(step.name)
        if step.name in self.steps:
            msg = f"this router already has a step {step.name}: a step's name is part of its records, so it is unique"
            raise ValueError(msg)
        self.steps[step.name] = step

    def workflow(
        self, *, name: str, version: int = 1, timeout_seconds: float | None = None
    ) -> Callable[[Callable[P, Awaitable[T]]], Workflow[P, T]]:
        """Declare a workflow function.

        It is executed again from the start after a crash, and every step that is recorded returns at once. So it must
        do the same things in the same order each time: whatever reads a clock, draws a number or asks others is a step.

        Args:
            name: what records call it, for ever.
            version: raise it when steps come, go or change places, and keep the old function until its runs have ended.
            timeout_seconds: how long after its start a run that has not ended fails and is compensated, as by a
                cancellation; once a pivot is done it goes on. None for no limit.

        Raises:
            TypeError: the function is not async, or has a parameter `id`, which is the run's.
            ValueError: the router has this name and version, or they are out of range.
        """
        name = _names.name_of("workflow", name)
        if version < 1:
            msg = f"workflow {name!r} version {version!r}: a version is 1 or more"
            raise ValueError(msg)
        _check_limit(timeout_seconds)

        def declare(function: Callable[P, Awaitable[T]]) -> Workflow[P, T]:
            if (name, version) in self.workflows:
                msg = f"this router already has version {version} of workflow {name!r}"
                raise ValueError(msg)
            workflow = Workflow(function, name, version, self.binding, timeout_seconds=timeout_seconds)
            self.workflows[name, version] = workflow
            return workflow

        return declare

    async def sleep(self, seconds: float) -> None:
        """Let `seconds` pass, durably: a crash neither shortens nor lengthens it, and a long sleep costs no memory.

        Raises:
            NotInRun: this is no workflow function.
            TypeError: `seconds` is no number.
            ValueError: it is negative or not finite.
        """
        checked_seconds("sleep: seconds", seconds)
        branch = _running("sleep", "asyncio.sleep")
        await branch.primitives.sleep(branch, seconds)

    async def sleep_until(self, moment: datetime) -> None:
        """Wait durably until a moment of the database's clock; one that is past is not waited for.

        Raises:
            NotInRun: this is no workflow function.
            TypeError: it is no datetime.
            ValueError: it has no time zone.
        """
        checked_moment("sleep_until: the moment", moment)
        branch = _running("sleep_until", "asyncio.sleep")
        await branch.primitives.sleep_until(branch, moment)

    async def now(self) -> datetime:
        """The time in UTC by the database's clock, recorded: a replay sees the same.

        Raises:
            NotInRun: this is no workflow function.
        """
        branch = _running("now", "datetime.now")
        return datetime.fromisoformat(await branch.primitives.value(branch, "now", branch.primitives.now))

    async def uuid(self) -> UUID:
        """A new id (UUIDv7), recorded: a replay sees the same.

        Raises:
            NotInRun: this is no workflow function.
        """
        branch = _running("uuid", "uuid.uuid4")
        return UUID(await branch.primitives.value(branch, "uuid", lambda: str(uuid7())))

    async def random(self) -> float:
        """A random number from 0 to 1, recorded: a replay sees the same. It guards nothing.

        Raises:
            NotInRun: this is no workflow function.
        """
        branch = _running("random", "random.random")
        return float(await branch.primitives.value(branch, "random", lambda: repr(random.random())))  # noqa: S311  see above

    @overload
    async def gather(self, one: Awaitable[T1], two: Awaitable[T2], /) -> tuple[T1, T2]: ...
    @overload
    async def gather(self, one: Awaitable[T1], two: Awaitable[T2], three: Awaitable[T3], /) -> tuple[T1, T2, T3]: ...
    @overload
    async def gather(
        self, one: Awaitable[T1], two: Awaitable[T2], three: Awaitable[T3], four: Awaitable[T4], /
    ) -> tuple[T1, T2, T3, T4]: ...
    @overload
    async def gather(self, *branches: Awaitable[T]) -> tuple[T, ...]: ...
    async def gather(self, *branches: Awaitable[Any]) -> tuple[Any, ...]:
        """Execute steps, or coroutines that execute steps, side by side; the results are in the order of the arguments.

        Branches are numbered, so that each finds its own records on replay. None is stopped because another failed: all
        of them end, then the error of the first one in the order of the arguments is raised.

        Raises:
            NotInRun: this is no workflow function.
        """
        branch = current_branch.get()
        if branch is None:
            for awaitable in branches:
                if asyncio.iscoroutine(awaitable):
                    awaitable.close()
            msg = "gather was called outside a run: it is for workflow functions; elsewhere use asyncio.gather"
            raise NotInRun(msg)
        return await branch.primitives.gather(branch, branches)

    def signal(self, name: str, kind: type[T]) -> Signal[T]:
        """Declare a kind of message: `await approved.wait()` in a workflow function, `await approved.send(run_id, …)`.

        Raises:
            ValueError: the name is taken, or breaks the rule for identifiers.
        """
        name = _names.name_of("signal", name)
        if name in self.signals:
            msg = f"this router already has a signal {name!r}"
            raise ValueError(msg)
        signal = Signal(name, kind, self.binding)
        self.signals[name] = signal
        return signal

    def value(self, name: str, kind: type[T]) -> Value[T]:
        """Declare a value that runs publish: `await progress.set(…)` in a run, `await progress.of(run_id)` elsewhere.

        Raises:
            ValueError: the name is taken, or breaks the rule for identifiers.
        """
        name = _names.name_of("value", name)
        if name in self.values:
            msg = f"this router already has a value {name!r}"
            raise ValueError(msg)
        value = Value(name, kind, self.binding)
        self.values[name] = value
        return value

    def approval(
        self,
        name: str,
        kind: type[T],
        *,
        may_decide: MayDecide[T],
        on_decision: OnDecision[T] | None = None,
        on_escalation: Step[[T], Any] | None = None,
    ) -> Approval[T]:
        """Declare a question to a person: a workflow function says `await refund.ask(…)`, others `refund.decide(…)`.

        Args:
            name: what records call it, for ever.
            kind: the type of the question.
            may_decide: whether an actor may decide an ask, which says whether it is escalated; async or plain.
            on_decision: called with each attempt to decide. A decision that is accepted is stored in the transaction
                in which this is called, so that an audit entry commits with it; for an attempt that is not allowed
                there is none.
            on_escalation: the step that is executed with the question once an ask is escalated.

        Raises:
            ValueError: the name is taken, or breaks the rule for identifiers.
        """
        name = _names.name_of("approval", name)
        if name in self.approvals:
            msg = f"this router already has an approval {name!r}"
            raise ValueError(msg)
        approval = Approval(
            name, kind, self.binding, may_decide=may_decide, on_decision=on_decision, on_escalation=on_escalation
        )
        self.approvals[name] = approval
        return approval

    def check(self) -> None:
        """What can be said only when everything is defined.

        Raises:
            TypeError: an annotation does not resolve, a type's values would not come back equal, or a step has no
                compensation.
        """
        for step in self.steps.values():
            step.check()
        for workflow in self.workflows.values():
            workflow.signature.check()
        for signal in self.signals.values():
            signal.check()
        for value in self.values.values():
            value.check()
        for approval in self.approvals.values():
            approval.check()


def _kinds(failed_on: object) -> tuple[type[Exception], ...]:
    """The exceptions that fail a step.

    Raises:
        TypeError: there is something else among them.
    """
    kinds = tuple(cast("list[object]", failed_on)) if isinstance(failed_on, tuple | list) else (failed_on,)
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            msg = f"failed_on={failed_on!r}: it is a tuple of subclasses of Exception, such as (Declined,)"
            raise TypeError(msg)
    return cast("tuple[type[Exception], ...]", kinds)


def _check_policy(policy: StepPolicy) -> None:
    """Refuse options that are none, or contradict each other.

    Raises:
        TypeError: they do; the message says what to write.
    """
    for name, kind in (("on_unknown", OnUnknown), ("exhausted", Exhausted)):
        chosen, choices = getattr(policy, name), get_args(kind)
        if chosen not in choices:
            msg = f"{name}={chosen!r}: it is one of {', '.join(map(repr, choices))}"
            raise TypeError(msg)
    if len(policy.uncompensated) > 1:
        named = " and ".join(f"{name}=True" for name in policy.uncompensated)
        msg = f"{named}: each says why nothing undoes the step; keep one"
        raise TypeError(msg)
    if policy.pivot and not policy.transactional and policy.on_unknown == "compensate":
        msg = (
            'a pivot cannot be undone: write on_unknown="probe" or "park" beside pivot=True, or transactional=True '
            "where it only writes to the App's database"
        )
        raise TypeError(msg)
    if policy.transactional and policy.on_unknown != "compensate":
        msg = f"a transactional step is never unknown: on_unknown={policy.on_unknown!r} would never be used"
        raise TypeError(msg)
    if policy.transactional and policy.one_call:
        msg = "a transactional step that fails has done nothing in any case: leave one_call out"
        raise TypeError(msg)
    if policy.cancellable and (policy.pivot or policy.after_pivot):
        msg = "a run is never cancelled during a pivot or after it: leave cancellable out"
        raise TypeError(msg)


def _check_limit(timeout_seconds: float | None) -> None:
    if timeout_seconds is not None:
        checked_seconds("timeout_seconds", timeout_seconds, zero=False)


def _running(what: str, elsewhere: str) -> Branch:
    """The branch of the run whose function is running.

    Raises:
        NotInRun: none is.
    """
    branch = current_branch.get()
    if branch is None:
        msg = f"{what} was called outside a run: it is for workflow functions; elsewhere use {elsewhere}"
        raise NotInRun(msg)
    return branch
