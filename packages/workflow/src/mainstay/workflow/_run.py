"""One run, executed by one worker: what its function may call, and how its end is decided.

The end of an execution is decided in one place, `_decide`, and against the record: first what the run was told from
outside, then what its record has and the function did not read, and only then what the function returned or raised.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from mainstay.core import Clock, ConfigurationError, Effect, bind_journal, cancelled_from_outside, current, derived_id
from mainstay.database import Database
from mainstay.workflow._attempts import EFFECT, Attempts, Work, nothing, or_parked
from mainstay.workflow._branch import Branch, current_branch
from mainstay.workflow._execution import Execution
from mainstay.workflow._history import History, Kind, StepRecord, StepState, recall
from mainstay.workflow._recording import Places, Recording
from mainstay.workflow._replay import Replay, SameArguments, same_text
from mainstay.workflow._verdict import (
    CANCELLED,
    EXPIRED,
    UNDONE,
    NoException,
    describe,
    error_text,
    misconfigured,
    plain_text,
    step_failed,
)
from mainstay.workflow._waits import Waits
from mainstay.workflow._way_back import AnyStep, WayBack, arguments_of, load
from mainstay.workflow.errors import (
    CancelRequested,
    CompensationExhausted,
    ControlFlow,
    Lost,
    Parked,
    Released,
    StepFailed,
    Suspended,
)
from mainstay.workflow.tables import (
    CANCEL,
    CANCEL_LATER,
    CANCEL_PARKED,
    CHILD,
    END,
    ENTRIES,
    FAIL,
    PARK,
    RELEASE,
    ROUSE,
    START_QUIETLY,
    UNDO_ENDED,
)
from mainstay.workflow.workflow import RunStatus, Workflow

_log = logging.getLogger("mainstay.workflow")

T = TypeVar("T")

AnyWorkflow = Workflow[*tuple[Any, ...], Any]
End = tuple[RunStatus, str | None, dict[str, Any] | None]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the runs of one worker share.

    Attributes:
        executing: places for steps that are being executed.
        unrecorded: places for results that are not recorded yet.
        steps: every step of the App, by name.
        wake: tells the worker of this process that a run may be in the queue, or has news.
        cancel: tells it that a run is to be cancelled.
    """

    database: Database
    clock: Clock
    executing: Places
    unrecorded: Places
    suspend_after_seconds: float
    steps: Mapping[str, AnyStep]
    wake: Callable[[str], None]
    cancel: Callable[[str], None]


class Run:
    """One claim of one run.

    Args:
        row: of the table.
        held: whether the worker's lease is good, by this machine's monotonic clock.
    """

    def __init__(
        self,
        row: Mapping[str, Any],
        *,
        workflow: AnyWorkflow,
        history: History,
        recording: Recording,
        held: Callable[[], bool],
        surroundings: Surroundings,
    ) -> None:
        self.id: str = row["id"]
        self.epoch: int = row["epoch"]
        self.workflow = workflow
        self.status = RunStatus.RUNNING
        self._input: str = row["input"]
        self._parent: str | None = row.get("parent")
        self._failure: dict[str, Any] | None = json.loads(row["failure"]) if row.get("failure") else None
        self._cancel = bool(row["cancel_requested"])
        self._why = CANCELLED
        self._deadline = _deadline(surroundings.clock, row.get("left_seconds"))
        self._history = history
        self._recording = recording
        self._around = surroundings
        self._going_back = self._failure is not None
        self._held = held
        self._news: int = row.get("news", 0)
        self._told: ControlFlow | None = None
        self._replay = Replay(history)
        self._begin()

    def _begin(self) -> None:
        """Begin an execution: of the function, or of the way back. What is left of the one before has ended."""
        around = self._around
        self._execution = Execution(
            around.clock,
            held=self._held,
            may_cancel=self._may_cancel,
            suspend_after_seconds=around.suspend_after_seconds,
        )
        if self._told is not None:
            self._execution.stop(self._told)
        self._attempts = Attempts(
            self.id,
            execution=self._execution,
            recording=self._recording,
            history=self._history,
            database=around.database,
            clock=around.clock,
            executing=around.executing,
            unrecorded=around.unrecorded,
        )
        self._waits = Waits(
            self.id, execution=self._execution, recording=self._recording, clock=around.clock, news=self._news
        )

    # What the worker does to it

    def stop(self, signal: ControlFlow) -> None:
        """End the execution at its next boundary between attempts; waits end at once."""
        if self._told is None or isinstance(signal, Lost):
            self._told = signal
        self._execution.stop(signal)

    def cancel(self) -> None:
        """Cancel the run at its next boundary, unless it is on its way back or past a pivot."""
        self._cancel = True
        if self._may_cancel():
            self._execution.wake()

    def _expire(self) -> None:
        """The run has had its time: it fails at the next boundary where it could be cancelled."""
        self._why = EXPIRED | {"detail": f"the run did not end within {self.workflow.timeout_seconds:g} s"}
        self.cancel()

    @property
    def clock(self) -> Clock:
        """The App's."""
        return self._around.clock

    def make_room(self) -> None:
        """Others want this run's place: it leaves the memory where all of it waits for what may take long."""
        self._execution.make_room()

    def look(self) -> None:
        """There is something new for the run."""
        self._execution.look()

    async def execute(self) -> End | None:
        """Take the run as far as it goes: status, result as JSON and failure of its end, or None if it has none yet."""
        timer = None
        if self._deadline is not None:
            left = self._deadline - self._around.clock.monotonic()
            if left > 0:
                timer = self._around.clock.call_later(left, self._expire)
            else:
                self._expire()
        try:
            return await self._to_its_end()
        except ControlFlow as signal:
            await self._leave(signal)
            return None
        except asyncio.CancelledError:
            await self._leave(Released())
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self._execution.end()
            await self._recording.close()

    async def _to_its_end(self) -> End:
        output: str | None = None
        if self._failure is None:
            output = await self._forward()
        if self._failure is None:
            # A step of which nobody knows is not left behind, even where the function found another way.
            await self._back(only_unknown=True)
            return await self._end(RunStatus.COMPLETED, output)
        self.status = RunStatus.COMPENSATING
        await self._back(only_unknown=False)
        cancelled = self._failure["type"] == CANCELLED["type"]
        return await self._end(RunStatus.CANCELLED if cancelled else RunStatus.FAILED, None)

    async def _forward(self) -> str | None:
        """Execute the function; its result as JSON, or None and a failure that is durable."""
        if self._told is not None or self._may_cancel():
            return await self._decide(None, None, self._told)
        signature = self.workflow.signature
        try:
            arguments = signature.load_arguments(self._input)
        except ValueError as error:
            msg = f"the input does not fit {self.workflow!r} any more: {error}"
            raise Parked(msg) from error
        execution = self._execution
        result: Any = None
        cause: BaseException | None = None
        try:
            result = await execution.drive(self._call(arguments))
        except BaseException as error:  # noqa: BLE001  whatever it is, the record decides what it means
            cause = error
        stopped = execution.stopped
        execution.end()
        if isinstance(cause, asyncio.CancelledError) and cancelled_from_outside():
            raise cause
        await execution.quiet()  # a step in a task that outlives the function is a part of the run all the same
        return await self._decide(result, cause, stopped)

    async def _call(self, arguments: Mapping[str, Any]) -> Any:
        token = current_branch.set(Branch(self, ""))
        try:
            with bind_journal(self):
                return await self.workflow.signature.call(arguments)
        finally:
            current_branch.reset(token)

    async def _decide(self, result: Any, cause: BaseException | None, stopped: ControlFlow | None) -> str | None:
        """What the end of the function means.

        Raises:
            ControlFlow: nothing: the execution was told to stop, or the record has more than the function read.
        """
        if stopped is None and self._may_cancel():
            stopped = CancelRequested()
        if isinstance(stopped, CancelRequested):
            if not self._may_cancel():  # a pivot beside the branch that was told was done meanwhile: only forward
                raise Released
            await self._fail(self._why)
            return None
        if stopped is not None:
            raise stopped
        if cause is None:
            self._replay.ended("the function ended")
            return or_parked(self.workflow.signature.keep_result, result)[0]
        failure = describe(cause)
        if isinstance(cause, ConfigurationError):
            raise misconfigured(self.workflow.signature.name, failure) from cause
        if not isinstance(cause, Exception | asyncio.CancelledError):
            _log.warning("run %s: its function raised what is no Exception", self.id, exc_info=cause)
        self._replay.ended(f"the function ended by {error_text(failure)}")
        if self._history.pivoted:
            self._reopen(cause)
            msg = f"failed after its pivot, so there is no way back: {error_text(failure)}"
            raise Parked(msg) from cause
        await self._fail(failure)
        return None

    def _reopen(self, cause: BaseException | None) -> None:
        """Let the step whose failure the function could not deal with be attempted again after a resume."""
        while cause is not None and not isinstance(cause, StepFailed):
            cause = cause.__cause__ or cause.__context__
        if cause is not None and cause.key in self._history.records:
            record = self._history.records[cause.key]
            row = self._recording.row(Kind.REOPENED, record.key, position=record.position)
            self._recording.settle(row, executed=False)

    async def _fail(self, failure: dict[str, Any]) -> None:
        """From here on the run only goes back, in whichever process."""
        _log.info("run %s fails with %s and is compensated", self.id, error_text(failure))
        self._failure = failure
        kept = json.dumps(failure)
        await self._recording.end((FAIL, {"run": self.id, "at_epoch": self.epoch, "failure": kept}))

    async def _back(self, *, only_unknown: bool) -> None:
        records = self._history.records.values()
        if only_unknown and not any(record.state is StepState.UNKNOWN for record in records):
            return
        self._going_back = True
        self._begin()
        way_back = WayBack(
            self.id,
            history=self._history,
            attempts=self._attempts,
            steps=self._around.steps,
            undo_child=self._undo_child,
        )
        await way_back.undo(only_unknown=only_unknown)

    # How it leaves the worker

    async def _end(self, status: RunStatus, output: str | None) -> End:
        failure = None if self._failure is None else json.dumps(self._failure)
        values = {"run": self.id, "at_epoch": self.epoch, "status": status, "output": output, "failure": failure}
        news = [] if self._parent is None else [(ROUSE, {"run": self._parent})]
        await self._recording.end((END, values), *news)
        self.status = status
        if self._parent is not None:
            self._around.wake(self._parent)
        return status, output, self._failure

    async def _leave(self, signal: ControlFlow) -> None:
        """Give the run back in the state that what ended its execution asks for."""
        if isinstance(signal, Lost):
            _log.info("run %s: another worker owns it by now", self.id)
        elif isinstance(signal, Parked):
            await self._park(RunStatus.PARKED, str(signal))
        elif isinstance(signal, CompensationExhausted):
            await self._park(RunStatus.COMPENSATION_FAILED, str(signal))
        elif isinstance(signal, Suspended):
            await self._release(max(0.0, signal.until - self._around.clock.monotonic()))
        else:
            await self._release(0.0)

    async def _park(self, status: RunStatus, note: str) -> None:
        _log.error("run %s of %r is %s: %s", self.id, self.workflow, status, note)
        values = {"run": self.id, "at_epoch": self.epoch, "status": status, "note": plain_text(note)}
        await self._last_word(PARK, {**values, "cancellable": self._has_way_back()})
        self.status = status

    async def _release(self, delay: float) -> None:
        if self._deadline is not None:
            delay = min(delay, max(0.0, self._deadline - self._around.clock.monotonic()))
        values = {"run": self.id, "at_epoch": self.epoch, "delay": delay, "seen": self._waits.seen}
        await self._last_word(RELEASE, values)

    async def _last_word(self, statement: Any, values: Mapping[str, Any]) -> None:
        try:
            await self._recording.end((statement, values))
        except (Lost, Parked) as signal:
            _log.warning("run %s could not be given back (%s): another worker will take it over", self.id, signal)

    def _may_cancel(self) -> bool:
        return self._cancel and self._has_way_back()

    def _has_way_back(self) -> bool:
        return not self._going_back and not self._history.pivoted and self._history.pivot_in_question is None

    # What workflow functions call, by way of the branch they run in

    def step(
        self, branch: Branch, step: AnyStep, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        """Execute a step, or recall what came of it."""

        def same(record: StepRecord, arguments: str) -> bool:
            return step.signature.same_arguments(step.signature.load_arguments(arguments), arguments_of(step, record))

        def written() -> str:
            if self._around.steps.get(step.name) is not step:
                msg = f"the router of step {step.name} is not part of this App: add it with WorkflowModule.for_feature"
                raise Parked(msg)
            return or_parked(step.signature.dump_arguments, or_parked(step.signature.bind, args, kwargs))

        async def perform(record: StepRecord) -> Any:
            if record.state is StepState.DONE:
                return load(step.signature.load_result, record)
            if step.policy.after_pivot and not self._history.pivoted:
                msg = (
                    f"{record.key} is declared after_pivot, and no pivot is done yet: nothing would undo it. Call it "
                    "after the pivot, or declare its compensation"
                )
                raise Parked(msg)
            arguments = arguments_of(step, record)  # what was begun is carried on with the input that it began with
            work = Work(
                name=step.name,
                policy=step.policy,
                call=lambda: step.call(arguments),
                keep=step.signature.keep_result,
                load=step.signature.load_result,
                input=record.input,
                ask=None if step.ask is None else lambda: step.call_probe(arguments),
                own=step.own_code,
            )
            return await self._attempts.settle(work, record)

        return self._primitive(branch, step.name, written, perform, same)

    async def once(self, name: str, effect: Effect, *, transactional: bool) -> str:
        """`Journal.once`: another package's effect as a step that leaves nothing to undo."""
        branch = current_branch.get()
        if branch is None:
            msg = f"{name}: the history of run {self.id} was used outside the run's own code"
            self._execution.stop(Parked(msg))
            raise await self._execution.told()
        label = "@" + name.replace("/", "_")

        async def perform(record: StepRecord) -> str:
            key = f"{self.id}:{record.key}"
            if record.state is not StepState.DONE:
                work = Work(name=label, policy=EFFECT, call=lambda: effect(key), keep=nothing, entry=transactional)
                await self._attempts.settle(work, record)
            return key

        return await self._primitive(branch, label, str, perform)

    async def sleep(self, branch: Branch, seconds: float, until: str | None = None) -> None:
        """Let time pass, by the database's clock from the moment that is recorded."""

        async def perform(record: StepRecord) -> None:
            if record.state is not StepState.DONE:
                await self._waits.sleep(record, seconds)

        label = "@sleep" if until is None else "@sleep_until"
        await self._primitive(branch, label, lambda: json.dumps(seconds if until is None else until), perform)

    async def value(self, branch: Branch, kind: str, make: Callable[[], str]) -> str:
        """What `make` returns the first time: it is recorded, and a replay sees the same."""

        async def perform(record: StepRecord) -> str:
            if record.state is not StepState.DONE:
                body = json.dumps(make())
                row = self._recording.row(Kind.DONE, record.key, position=record.position, body=body)
                record.state, record.seq, record.output = StepState.DONE, row["seq"], body
                self._recording.settle(row, executed=False)
            made: str = load(json.loads, record)
            return made

        return await self._primitive(branch, f"@{kind}", str, perform)

    async def receive(self, branch: Branch, name: str, read: Callable[[str], T], seconds: float | None) -> T:
        """Wait for a message and take it."""

        async def perform(record: StepRecord) -> T:
            if record.state is not StepState.DONE:
                await self._waits.receive(record, name, seconds)
            result: T = load(read, record)
            return result

        return await self._primitive(branch, f"@signal {name.replace('/', '_')}", lambda: json.dumps(seconds), perform)

    async def child(self, branch: Branch, workflow: AnyWorkflow, input: str) -> Any:
        """Execute another workflow as a run of its own, and wait for its end without taking anybody's place."""
        label = f"@child {workflow.name.replace('/', '_')}"

        def same(record: StepRecord, arguments: str) -> bool:
            read = workflow.signature.load_arguments
            return workflow.signature.same_arguments(read(record.input or "{}"), read(arguments))

        async def perform(record: StepRecord) -> Any:
            if record.state is not StepState.DONE:
                await self._to_the_end_of(workflow, record)
            return load(workflow.signature.load_result, record)

        return await self._primitive(branch, label, lambda: input, perform, same)

    async def _to_the_end_of(self, workflow: AnyWorkflow, record: StepRecord) -> None:
        child_id = self._child_of(record)
        if record.seq == 0:
            row = self._recording.row(Kind.WAIT, record.key, position=record.position, body=record.input)
            child = {
                "id": child_id,
                "workflow": workflow.name,
                "version": workflow.version,
                "status": "queued",
                "epoch": 0,
                "worker": None,
                "attempts": 0,
                "progress": 0,
                "cancel_requested": False,
                "input": record.input,
                "context": json.dumps(current().to_dict()),
                "parent": self.id,
                "left_seconds": workflow.timeout_seconds,
            }
            record.seq, record.waits = row["seq"], True
            await self._recording.end((START_QUIETLY[self._around.database.dialect], child), row=row)
            self._around.wake(child_id)
        ended = await self._waits.child(child_id, record.key)
        if ended.status == RunStatus.COMPLETED:
            row = self._recording.row(Kind.DONE, record.key, position=record.position, body=ended.output)
            record.state, record.seq, record.output = StepState.DONE, row["seq"], ended.output
            self._recording.settle(row, executed=False)
            return
        error = {"run": child_id, **(json.loads(ended.failure) if ended.failure else CANCELLED)}
        self._attempts.give_up(record, StepState.FAILED, error)
        raise step_failed(workflow.name, record.key, StepState.FAILED, error)

    def _child_of(self, record: StepRecord) -> str:
        return str(derived_id(f"{self.id}:{record.key}"))

    async def _undo_child(self, record: StepRecord) -> None:
        """Cancel a child that goes on, compensate one that is completed, and wait until that is done."""
        child_id = self._child_of(record)
        while True:
            await self._execution.boundary()
            (found,) = await self._recording.read(CHILD, {"run": self.id, "child": child_id})
            if found.status is None or found.status in {RunStatus.FAILED, RunStatus.CANCELLED}:
                return
            entries = await self._recording.read(ENTRIES, {"ids": [child_id]})
            past = recall(dict(entry._mapping) for entry in entries)
            if past.pivoted and found.status == RunStatus.COMPLETED:
                msg = f"child {child_id} is past its pivot and cannot be undone"
                raise CompensationExhausted(msg)
            change: tuple[Any, dict[str, Any]]
            if found.status == RunStatus.COMPLETED:
                change = UNDO_ENDED, {"run": child_id, "failure": json.dumps(UNDONE)}
            elif found.status == RunStatus.PARKED:
                change = (CANCEL_PARKED if past.pivot_in_question is None else CANCEL_LATER), {"run": child_id}
            else:
                change = CANCEL, {"run": child_id}
            if not past.pivoted:  # while a pivot is in question the child keeps in mind that it is to be cancelled
                await self._recording.end(change)
                self._around.cancel(child_id)
                self._around.wake(child_id)
            await self._waits.child(child_id, f"{record.key} undone")

    async def gather(self, branch: Branch, awaitables: tuple[Awaitable[Any], ...]) -> tuple[Any, ...]:
        """Execute branches side by side, each with numbers of its own; all of them end before this does."""
        number, branch.gathers = branch.gathers, branch.gathers + 1

        async def perform(record: StepRecord) -> tuple[Any, ...]:
            if record.state is not StepState.DONE:  # how many there are is part of the record
                info = json.dumps({"input": record.input})
                row = self._recording.row(Kind.DONE, record.key, position=record.position, info=info)
                record.state, record.seq = StepState.DONE, row["seq"]
                self._recording.settle(row, executed=False)
            branches = [Branch(self, f"{branch.prefix}{number}.{place}/") for place in range(len(awaitables))]
            return await self._side_by_side(branches, awaitables)

        try:
            return await self._primitive(branch, "@gather", lambda: str(len(awaitables)), perform)
        finally:
            for awaitable in awaitables:
                if asyncio.iscoroutine(awaitable):
                    awaitable.close()  # one that was never begun

    async def _side_by_side(self, branches: list[Branch], awaitables: tuple[Awaitable[Any], ...]) -> tuple[Any, ...]:
        execution, loop = self._execution, asyncio.get_running_loop()
        execution.active += len(branches) - 1
        tasks = [
            loop.create_task(self._branch(inner, awaitable), name=f"{self.id} {inner.prefix}")
            for inner, awaitable in zip(branches, awaitables, strict=True)
        ]
        cancelled: asyncio.CancelledError | None = None
        try:
            while pending := [task for task in tasks if not task.done()]:
                try:
                    await asyncio.wait(pending)
                except asyncio.CancelledError as error:
                    cancelled = error
                    for task in pending:
                        task.cancel()
        finally:
            for task in tasks:
                task.cancel()
            execution.active += 1
        if execution.stopped is not None:
            if cancelled is not None and execution.ended_from_outside():
                raise cancelled
            raise await execution.told()
        ends = [task.result() for task in tasks if not task.cancelled()]
        errors = [error for error, _ in ends if error is not None]
        if errors:
            raise errors[0]
        if len(ends) < len(tasks):
            raise cancelled or asyncio.CancelledError
        return tuple(result for _, result in ends)

    async def _branch(self, branch: Branch, awaitable: Awaitable[Any]) -> tuple[BaseException | None, Any]:
        """The error or the result of one branch. Nothing but a cancellation is raised: it would end the loop."""
        current_branch.set(branch)

        async def run() -> Any:
            return await awaitable

        try:
            return None, await self._execution.closable(run())
        except asyncio.CancelledError:
            raise
        except (Exception, ControlFlow) as error:  # noqa: BLE001  the gather raises it
            return error, None
        except BaseException as error:  # noqa: BLE001  the same
            return NoException(error), None
        finally:
            self._execution.active -= 1
            self._execution.consider_leaving()

    # The one way in and out of every primitive

    async def _primitive(
        self,
        branch: Branch,
        label: str,
        arguments: Callable[[], str],
        perform: Callable[[StepRecord], Coroutine[Any, Any, T]],
        same: SameArguments = same_text,
    ) -> T:
        """Take a place in the record, do what is to be done there, and remember what ends the execution.

        Args:
            branch: in which it is called.
            label: what is called.
            arguments: makes JSON of what it is called with.
            perform: the work, or recalls what came of it.
            same: whether arguments are those on record.
        """
        execution = self._execution
        if execution.stopped is not None:
            raise await execution.told()
        try:
            if self._around.database.in_unit_of_work():
                msg = (
                    f"{label} was called inside db.transaction(): a workflow function may be executed again, so what "
                    "it writes belongs into a transactional step"
                )
                raise Parked(msg)
            record = self._replay.enter(branch, label, arguments(), same)
            try:
                if record.state in {StepState.FAILED, StepState.UNKNOWN}:
                    raise step_failed(label, record.key, record.state, record.error)
                return await perform(record)
            except asyncio.CancelledError:
                if execution.ended_from_outside() or record.state is StepState.DONE:
                    raise
                # The function's own doing, by a time limit of its own for example: a replay has to see the same.
                given_up = await self._attempts.given_up(label, record)
                if given_up is None:
                    return await perform(record)
                raise given_up from None
            finally:
                branch.busy = False
        except ControlFlow as signal:
            execution.stop(signal)
            raise await execution.told() from None


def _deadline(clock: Clock, left_seconds: float | None) -> float | None:
    return None if left_seconds is None else clock.monotonic() + left_seconds
