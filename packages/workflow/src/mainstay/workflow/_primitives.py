"""What a workflow function may call; each takes its place in the record the same way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, Never, TypeVar

from mainstay.core import Effect, Kept, digest
from mainstay.workflow._asks import NO_DECISION, Asks, Limits
from mainstay.workflow._attempts import EFFECT, Attempts, nothing
from mainstay.workflow._branch import Branch, current_branch
from mainstay.workflow._children import Children
from mainstay.workflow._effects import Work, or_parked
from mainstay.workflow._execution import Execution
from mainstay.workflow._gather import side_by_side
from mainstay.workflow._history import Keys, Kind, StepRecord, StepState
from mainstay.workflow._insistence import undisturbed
from mainstay.workflow._recording import Recording
from mainstay.workflow._replay import Difference, Replay, other_digest, other_text, other_values
from mainstay.workflow._surroundings import Surroundings
from mainstay.workflow._verdict import step_failed
from mainstay.workflow._waits import Waits
from mainstay.workflow._way_back import anew, arguments_of, load
from mainstay.workflow.errors import (
    Continued,
    ControlFlow,
    Parked,
)
from mainstay.workflow.step import AnyStep
from mainstay.workflow.tables import NOW
from mainstay.workflow.workflow import AnyWorkflow

T = TypeVar("T")

_WRITES = "a workflow function may be executed again, so what it writes belongs into a transactional step"


class Primitives:
    """The primitives of one execution of a function. They end with it, also for tasks that outlive it."""

    def __init__(
        self,
        keys: Keys,
        *,
        replay: Replay,
        execution: Execution,
        recording: Recording,
        attempts: Attempts,
        waits: Waits,
        children: Children,
        around: Surroundings,
    ) -> None:
        self._keys = keys
        self._replay = replay
        self._execution = execution
        self._recording = recording
        self._attempts = attempts
        self._waits = waits
        self._children = children
        self._asks = Asks(keys, waits=waits, recording=recording)
        self._around = around

    def step(
        self, branch: Branch, step: AnyStep, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        """Execute a step, or recall what came of it."""

        def differs(record: StepRecord, arguments: str) -> str | None:
            there, here = arguments_of(step.signature, record), step.signature.load_arguments(arguments)
            return other_values(step.signature.differing(there, here))

        fresh: Mapping[str, Any] = {}

        def written() -> str:
            nonlocal fresh
            if self._around.steps.get(step.name) is not step:
                msg = f"the router of step {step.name} is not part of this App: add it with WorkflowModule.for_feature"
                raise Parked(msg)
            text, fresh = or_parked(step.signature.keep_arguments, or_parked(step.signature.bind, args, kwargs))
            return text

        async def perform(record: StepRecord) -> Any:
            if record.state is StepState.DONE:
                return load(step.signature.load_result, record)
            if step.policy.after_pivot and not self._replay.history.pivoted:
                msg = (
                    f"{record.key} is declared after_pivot, and no pivot is done yet: nothing would undo it. Call it "
                    "after the pivot, or declare its compensation"
                )
                raise Parked(msg)
            # What was begun is carried on with the input that it began with.
            again = partial(arguments_of, step.signature, record)
            given = anew(again() if record.seq else fresh, again)
            work = Work(
                name=step.name,
                policy=step.policy,
                call=lambda: partial(step.call, given()),
                keep=step.signature.keep_result,
                load=step.signature.load_result,
                input=record.input,
                ask=None if step.ask is None else lambda: partial(step.call_probe, given()),
                own=step.own_code,
            )
            return await self._attempts.settle(work, record)

        return self._primitive(branch, step.name, written, perform, differs)

    async def once(
        self, name: str, effect: Effect, *, transactional: bool, arguments: Callable[[], object] | None = None
    ) -> str:
        """`Journal.once`: another package's effect as a step that leaves nothing to undo."""
        branch = current_branch.get()
        if branch is None:
            msg = f"{name}: the history of run {self._keys.run_id} was used outside the run's own code"
            self._execution.stop(Parked(msg))
            raise await self._execution.told()
        label = "@" + name.replace("/", "_")

        async def perform(record: StepRecord) -> str:
            key = record.inherited or self._keys.of(record.key)
            if record.state is not StepState.DONE:
                work = Work(
                    name=label,
                    policy=EFFECT,
                    call=lambda: partial(effect, key),
                    keep=nothing,
                    input=record.input,
                    entry=transactional,
                )
                await self._attempts.settle(work, record)
            return key

        def written() -> str:
            return "" if arguments is None else json.dumps(digest(arguments()))

        return await self._primitive(branch, label, written, perform, other_digest)

    async def sleep(self, branch: Branch, seconds: float) -> None:
        """Let time pass, by the database's clock from the moment that is recorded."""

        async def perform(record: StepRecord) -> None:
            if record.state is not StepState.DONE:
                await self._waits.sleep(record, seconds)

        await self._primitive(branch, "@sleep", lambda: json.dumps(seconds), perform)

    async def sleep_until(self, branch: Branch, moment: datetime) -> None:
        """Wait for a moment, by the database's clock: the worker's may be wrong, or set while it waits."""

        async def perform(record: StepRecord) -> None:
            if record.state is not StepState.DONE:
                left = 0.0 if record.seq else moment.timestamp() - await self._database_seconds()
                await self._waits.sleep(record, max(0.0, left))

        await self._primitive(branch, "@sleep_until", lambda: json.dumps(moment.isoformat()), perform)

    async def now(self) -> str:
        """The time by the database's clock, in ISO 8601."""
        return datetime.fromtimestamp(await self._database_seconds(), UTC).isoformat()

    async def _database_seconds(self) -> float:
        ((seconds,),) = await self._recording.read(NOW, {})
        return float(seconds)

    async def value(self, branch: Branch, kind: str, make: Callable[[], str | Awaitable[str]]) -> str:
        """What `make` returns the first time: it is recorded, and a replay sees the same."""

        async def perform(record: StepRecord) -> str:
            if record.state is not StepState.DONE:
                made = make()
                body = json.dumps(made if isinstance(made, str) else await made)
                row = self._recording.row(Kind.DONE, record.key, position=record.position, body=body)
                record.state, record.seq, record.output = StepState.DONE, row["seq"], body
                self._recording.settle(row, executed=False)
            value: str = load(json.loads, record)
            return value

        return await self._primitive(branch, f"@{kind}", str, perform)

    async def publish(self, branch: Branch, name: str, kept: Kept[T], value: T) -> None:
        """Set a value of the run, in one commit with its place in the record."""

        def differs(record: StepRecord, arguments: str) -> str | None:
            same = _says(kept, record.input or "null", kept.read(arguments))
            return None if same else "with another value than its record has"

        async def perform(record: StepRecord) -> None:
            if record.state is not StepState.DONE:
                await self._recording.publish(record, name)

        label = f"@value {name.replace('/', '_')}"
        await self._primitive(branch, label, lambda: or_parked(kept.write, value), perform, differs)

    async def receive(self, branch: Branch, name: str, read: Callable[[str], T], seconds: float | None) -> T:
        """Wait for a message and take it."""

        async def perform(record: StepRecord) -> T:
            if record.state is not StepState.DONE:
                await self._waits.receive(record, name, seconds)
            result: T = load(read, record)
            return result

        return await self._primitive(branch, f"@signal {name.replace('/', '_')}", lambda: json.dumps(seconds), perform)

    async def ask(
        self, branch: Branch, name: str, kept: Kept[T], question: T, limits: Limits
    ) -> tuple[str, str | None]:
        """Ask people and wait: the key of this place, and the decision as JSON, or None once the ask is escalated."""
        times = [limits.timeout_seconds, limits.escalate_after_seconds]

        def written() -> str:
            return json.dumps([or_parked(kept.write, question), *times])

        def differs(record: StepRecord, _arguments: str) -> str | None:
            there = json.loads(record.input or "[null, null, null]")
            if there[1:] != times:
                return f"with the times {times} where its record has {there[1:]}"
            return None if _says(kept, there[0], question) else "with another question than its record has"

        async def perform(record: StepRecord) -> tuple[str, str | None]:
            if record.state is not StepState.DONE:
                await self._asks.ask(record, name, json.loads(record.input or "[null]")[0], limits)
            return record.key, None if record.output == NO_DECISION else record.output

        return await self._primitive(branch, f"@approval {name.replace('/', '_')}", written, perform, differs)

    async def go_on_asking(self, branch: Branch, name: str, key: str, *, limited: bool, withdrawn: bool = False) -> str:
        """Wait on for the decision of an ask that was escalated; as JSON."""

        async def perform(record: StepRecord) -> str:
            if record.state is not StepState.DONE:
                await self._asks.go_on(record, name, key, limited=limited, withdrawn=withdrawn)
            return record.output or NO_DECISION

        return await self._primitive(branch, f"@escalated {name.replace('/', '_')}", lambda: json.dumps(key), perform)

    async def child(self, branch: Branch, workflow: AnyWorkflow, input: str) -> Any:
        """Execute another workflow as a run of its own, and wait for its end without taking anybody's place."""
        label = f"@child {workflow.name.replace('/', '_')}"

        def differs(record: StepRecord, arguments: str) -> str | None:
            there, here = arguments_of(workflow.signature, record), workflow.signature.load_arguments(arguments)
            return other_values(workflow.signature.differing(there, here))

        async def perform(record: StepRecord) -> Any:
            if record.state is not StepState.DONE:
                await self._children.result(workflow, record)
            return load(workflow.signature.load_result, record)

        return await self._primitive(branch, label, lambda: input, perform, differs)

    async def gather(self, branch: Branch, awaitables: tuple[Awaitable[Any], ...]) -> tuple[Any, ...]:
        """Execute branches side by side, each with numbers of its own; all of them end before this does."""
        number, branch.gathers = branch.gathers, branch.gathers + 1

        async def perform(record: StepRecord) -> tuple[Any, ...]:
            if record.state is not StepState.DONE:  # how many there are is part of the record
                info = {"input": record.input}
                row = self._recording.row(Kind.DONE, record.key, position=record.position, info=info)
                record.state, record.seq = StepState.DONE, row["seq"]
                self._recording.settle(row, executed=False)
            branches = [Branch(self, f"{branch.prefix}{number}.{place}/", branch) for place in range(len(awaitables))]
            return await side_by_side(
                branches, awaitables, execution=self._execution, replay=self._replay, recording=self._recording
            )

        try:
            return await self._primitive(branch, "@gather", lambda: str(len(awaitables)), perform)
        finally:
            for awaitable in awaitables:
                if asyncio.iscoroutine(awaitable):
                    awaitable.close()  # one that was never begun

    async def go_on(self, branch: Branch, workflow: AnyWorkflow, input: str) -> Never:
        """End this generation of the run; the next one has this input. What the end counts for, the record decides."""
        execution = self._execution
        if execution.stopped is None:
            execution.stop(self._continued(branch, workflow, input))
        raise await execution.told()

    def _continued(self, branch: Branch, workflow: AnyWorkflow, input: str) -> ControlFlow:
        name = f"{workflow.signature.name}.continue_with"
        if branch.prefix or branch.busy:
            return Parked(
                f"{name} was called beside what the function is still doing: call it in the function itself, once its "
                "branches have ended"
            )
        if self._around.database.in_unit_of_work():
            return Parked(f"{name} was called inside db.transaction(): call it after the transaction")
        return Continued(workflow.name, workflow.version, input)

    # The one way in and out of every primitive

    async def _primitive(
        self,
        branch: Branch,
        label: str,
        arguments: Callable[[], str],
        perform: Callable[[StepRecord], Coroutine[Any, Any, T]],
        differs: Difference = other_text,
    ) -> T:
        """Take a place in the record, do what is to be done there, and remember what ends the execution.

        Args:
            branch: in which it is called.
            label: what is called.
            arguments: makes JSON of what it is called with.
            perform: the work, or recalls what came of it.
            differs: how arguments differ from those on record, or None.
        """
        execution = self._execution
        if execution.stopped is not None:
            raise await execution.told()
        try:
            if self._around.database.in_unit_of_work():
                msg = f"{label} was called inside db.transaction(): {_WRITES}"
                raise Parked(msg)
            record = self._replay.enter(branch, label, arguments(), differs)
            try:
                if record.state in {StepState.FAILED, StepState.UNKNOWN}:
                    raise step_failed(label, record.key, record.state, record.error)
                return await perform(record)
            except asyncio.CancelledError:
                if execution.ended_from_outside() or record.state is StepState.DONE:
                    raise
                # The function's own doing, by a time limit of its own for example: a replay has to see the same.
                settled = (self._asks if record.closing else self._attempts).given_up(label, record)
                given_up = await undisturbed(settled, ends=execution.ended_from_outside)
                if given_up is None:
                    return await perform(record)
                raise given_up from None
            finally:
                branch.busy = False
        except ControlFlow as signal:
            execution.stop(signal)
            raise await execution.told() from None


def _says(kept: Kept[T], recorded: str, value: T) -> bool:
    """Whether a recorded value, as today's type reads it, is this one; one that the type cannot read is another."""
    try:
        return kept.same(kept.read(recorded), value)
    except ValueError:
        return False
