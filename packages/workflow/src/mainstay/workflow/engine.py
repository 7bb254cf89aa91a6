"""The engine: starts runs, waits for their results, and does what a person asks."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, ParamSpec, TypeVar, overload

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from mainstay.core import Clock, FullJitter, Health, Retry, RetryState, current, timeout, uuid7
from mainstay.database import Database, DatabaseError
from mainstay.workflow import _decisions, _metrics, _names
from mainstay.workflow._again import Beginnings
from mainstay.workflow._fork import fork
from mainstay.workflow._history import History, recall
from mainstay.workflow._payloads import Payloads
from mainstay.workflow._results import Results
from mainstay.workflow._verdict import plain_text, workflow_failed
from mainstay.workflow._worker import Worker
from mainstay.workflow.approval import AnyApproval
from mainstay.workflow.approvals import Approvals
from mainstay.workflow.errors import RunNotFound, RunParked, RunStateError
from mainstay.workflow.settings import WorkflowSettings
from mainstay.workflow.step import AnyStep
from mainstay.workflow.tables import (
    ASLEEP,
    ENTRIES,
    FIND,
    ROUSE,
    SEND,
    START_QUIETLY,
    VALUE,
    VALUES,
    VIEW,
    runs,
)
from mainstay.workflow.value import ValueView
from mainstay.workflow.workflow import AnyWorkflow, RunInput, RunStatus, Workflow

__all__ = ["RunView", "WorkflowEngine"]

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger("mainstay.workflow")


@dataclass(frozen=True, slots=True)
class RunView:
    """What the table says of a run, for people.

    Attributes:
        note: why it is parked.
        failure: the exception that sent it back, `type` and `detail`.
        output: the result as JSON.
        generation: 1, and one more each time that the run went on with new input.
        due_at: when a worker takes a queued run at the latest; a signal or a cancellation makes it due at once.
        parent: the id of the run that waits for it as its child, if any.
    """

    id: str
    workflow: str
    version: int
    status: RunStatus
    attempts: int
    generation: int
    cancel_requested: bool
    input: str
    output: str | None
    failure: dict[str, Any] | None
    note: str | None
    context: dict[str, Any]
    created_at: datetime
    ended_at: datetime | None
    due_at: datetime | None
    parent: str | None = None


def _was_refused(state: RetryState, /) -> bool:
    """Whether the database did nothing, and may do it the next time."""
    error = state.outcome.exception()
    return isinstance(error, DatabaseError) and error.retryable


class WorkflowEngine:
    """Yielded by `WorkflowModule`; `app.get(WorkflowEngine)` finds it. `approvals` is what runs ask people."""

    def __init__(
        self,
        *,
        database: Database,
        clock: Clock,
        settings: WorkflowSettings,
        workflows: Mapping[tuple[str, int], AnyWorkflow],
        steps: Mapping[str, AnyStep],
        payloads: Payloads,
        approvals: Mapping[str, AnyApproval],
    ) -> None:
        self._database = database
        self._clock = clock
        self._again = Retry(5, FullJitter(0.05, 1.0), retry=_was_refused, clock=clock)
        self._payloads = payloads
        self._beginnings = Beginnings(database, payloads, workflows)
        # The worker is made below.
        self._results = Results(database, clock, executes=lambda run_id: self.worker.executes(run_id))  # noqa: PLW0108
        self.worker = Worker(
            database=database,
            clock=clock,
            settings=settings,
            workflows=workflows,
            steps=steps,
            payloads=payloads,
            ended=self._results.ended,
        )
        self.approvals = Approvals(database, approvals, payloads=payloads, told=self.worker.signal)

    # Starting

    async def start(
        self, name: str, version: int, input: str, id: str | None, *, timeout_seconds: float | None = None
    ) -> str:
        """Begin a run of a workflow with its input as JSON; returns its id. See `Workflow.start`."""
        run_id = str(uuid7()) if id is None else _names.run_id(id)
        # Inside a unit of work it is open whether, and when, there will be a run: it takes no place here, and is
        # claimed after the commit like any other. The claim asks the database, so a run that was there already, or that
        # another process has executed meanwhile, is not begun a second time.
        joins = self._database.in_unit_of_work()
        identity = None if joins else self.worker.takes()
        row: dict[str, Any] = {
            "id": run_id,
            "workflow": name,
            "version": version,
            "status": "queued" if identity is None else "running",
            "epoch": 0 if identity is None else 1,
            "worker": None if identity is None else identity.lease.name,
            "attempts": 0 if identity is None else 1,
            "progress": 0,
            "cancel_requested": False,
            "input": self._payloads.seal(input, run_id),
            "context": json.dumps(current().to_dict()),
            "parent": None,
            "parent_generation": None,
            "left_seconds": timeout_seconds,
        }

        def begin() -> None:
            if identity is None:
                self.worker.wake()
            else:
                self.worker.begin(identity, row)
            _metrics.count_start(name)

        if joins:
            await self._database.write(START_QUIETLY[self._database.dialect], row, route=run_id)
            if await self._beginnings.is_new(row):
                self._database.after_commit(begin)
        elif identity is None:
            if await self._beginnings.insert(row):
                begin()
        else:
            identity.reserved += 1  # or all who start at once would find the same place free
            try:
                new = await self._beginnings.insert(row)
            finally:
                identity.reserved -= 1
            if new:
                begin()
        return run_id

    @overload
    async def execute(self, workflow: Workflow[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    @overload
    async def execute(self, input: RunInput[T], /) -> T: ...
    async def execute(self, what: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Start a run and wait for its result: `Workflow.start` and `Handle.result`.

        Args:
            what: the workflow, with its arguments behind it, or what `workflow.input(…).named(id)` made.
            args, kwargs: the input, kept as JSON.
        """
        return await (await what.start(*args, **kwargs)).result()

    async def send(self, run_id: str, name: str, body: str, id: str | None) -> None:
        """Store a message for a run, and wake the run if it sleeps. See `Signal.send`."""
        run_id = _names.run_id(run_id)
        message_id = str(uuid7()) if id is None else _names.signal_id(id)
        found = await self._database.read(FIND, {"run": run_id})
        if found and (status := RunStatus(found[0].status)).terminal:
            msg = f"signal {name} for run {run_id!r}: it is {status}, so it would never be received"
            raise RunStateError(msg)
        message = {"run_id": run_id, "id": message_id, "name": name, "body": self._payloads.seal(body, run_id)}
        async with self._database.batch(route=run_id):
            await self._database.write(SEND[self._database.dialect], message)
            await self._database.write(ROUSE, {"run": run_id})
            self._database.after_commit(lambda: self.worker.signal(run_id))

    # Results

    async def ended(self, id: str, timeout_seconds: float | None) -> str:
        """Wait for the run to end; its result as JSON. See `Handle.result`."""
        _names.run_id(id)
        if timeout_seconds is None:
            state = await self._results.of(id)
        else:
            async with timeout(timeout_seconds, clock=self._clock):
                state = await self._results.of(id)
        status = RunStatus(state["status"])
        if status is RunStatus.COMPLETED:
            return self._payloads.open(str(state["output"]), id)
        if status.waits_for_a_person:
            msg = f"run {id} is {status}: {state['note']}"
            raise RunParked(msg)
        how = f"run {id} {status}"
        raise workflow_failed(how, state["failure"] or {"type": "Unknown", "detail": ""})

    # For people

    async def status(self, id: str) -> RunStatus:
        """Where the run is.

        Raises:
            RunNotFound: it does not exist.
        """
        return (await self.run(id)).status

    async def run(self, id: str) -> RunView:
        """What the table says of the run.

        Raises:
            RunNotFound: it does not exist.
        """
        found = await self._database.read(FIND, {"run": _names.run_id(id)})
        if not found:
            msg = f"there is no run {id!r}"
            raise RunNotFound(msg)
        return view_of(found[0], self._payloads)

    async def runs(self, status: RunStatus | None = None, *, limit: int = 100) -> list[RunView]:
        """The newest runs, or those with this status."""
        return [view_of(row, self._payloads) for row in await self._database.read(listed(status, limit))]

    async def history(self, id: str) -> History:
        """What the run's history adds up to; of a payload that cannot be read here it says so."""
        entries = await self._database.read(ENTRIES, {"ids": [_names.run_id(id)]})
        return recall((dict(entry._mapping) for entry in entries), partial(self._payloads.shown, run_id=id))

    async def values(self, id: str, name: str | None = None) -> list[ValueView]:
        """The values that the run has published, for people, or the one of this name.

        Raises:
            RunNotFound: it does not exist.
            PayloadUnreadable: the one of this name was stored by a codec that this App does not have.
        """
        read = self._payloads.shown if name is None else self._payloads.open
        asked = (VALUES, {"run": _names.run_id(id)}) if name is None else (VALUE, {"run": id, "name": name})
        found = await self._database.read(*asked)
        if not found:
            msg = f"there is no run {id!r}"
            raise RunNotFound(msg)
        return [value_of(row, read(row.body, id)) for row in found if row.name is not None]

    async def cancel(self, id: str) -> None:
        """What `Handle.cancel` does; a parked run is compensated right away.

        Raises:
            RunStateError: it has ended, is stuck on its way back, or a pivot of it is done or may be.
            RunNotFound: it does not exist.
        """
        _names.run_id(id)
        await self._decide(lambda session: _decisions.cancel(session, id), lambda _: self.worker.cancel(id))

    async def compensate(self, id: str) -> None:
        """Undo a run: cancel one that has not ended, and take one that is completed back.

        Raises:
            RunStateError: a pivot of it is done or may be, or everything of it is undone already.
            RunNotFound: it does not exist.
        """

        def told(_: None) -> None:
            self.worker.cancel(id)
            self.worker.wake()

        _names.run_id(id)
        await self._decide(lambda session: _decisions.compensate(session, id), told)

    async def resume(self, id: str) -> None:
        """Let a parked run go on where it stopped, forward or back, with all attempts of the step that was stuck.

        Raises:
            RunStateError: it is not parked.
            RunNotFound: it does not exist.
        """
        _names.run_id(id)
        await self._decide(lambda session: _decisions.resume(session, id), lambda _: self.worker.wake())

    async def retry_from(self, id: str, step: str) -> None:
        """Let a parked run go on from a step: it and each step that began later is attempted again, under the same key.

        What they did before may have happened: a way back undoes it, also where the new attempt fails. Transactional
        steps that are done, events, signals, children and waits keep their records. A function that then takes another
        way is parked, since its record has more than it reads.

        Args:
            id: the run.
            step: the step's key within the run, such as `charge:1`; `mainstay workflow show` lists them.

        Raises:
            RunStateError: it is not parked on its way forward; or it has no such step; or a pivot from there on took
                effect or may have; or one of the steps is undone already.
            RunNotFound: it does not exist.
        """
        _names.run_id(id)
        await self._decide(lambda session: _decisions.retry_from(session, id, step), lambda _: self.worker.wake())

    async def fork(self, id: str, *, before: str, new_id: str) -> str:
        """Begin a new run that has the input of one that has ended, and what it did before a step.

        What is inherited is not executed again, and stays the original's: the new run never undoes it. From the step on
        everything is executed anew, under keys of the new run, whatever the original did there. Steps that were going
        on beside it are executed anew as well; signals that the original received are inherited.

        Args:
            id: the original.
            before: the key of a step or wait of it, such as `charge:1`; `mainstay workflow show` lists them.
            new_id: the new run's. The same fork again is the same run.

        Returns:
            `new_id`.

        Raises:
            RunStateError: the original goes on, or is a child; or it has no such step; or what would be inherited is
                undone, in part or whole, or is a pivot that may have taken effect.
            RunNotFound: there is no original.
            RunConflict: `new_id` is the id of another run.
            PayloadUnreadable: what would be inherited was stored by a codec that this App does not have.
            ValueError: `new_id` cannot be an id.
        """

        def told(workflow: str | None) -> None:
            if workflow is not None:
                self.worker.wake()
                _metrics.count_start(workflow)

        _names.run_id(id), _names.run_id(new_id)
        await self._decide(lambda session: fork(session, id, before, new_id, payloads=self._payloads), told)
        return new_id

    async def terminate(self, id: str, *, reason: str) -> None:
        """End a run at once and undo nothing: the last resort, where `cancel` and `resume` do not help.

        What the run did is left to whom it may concern. It writes nothing more and begins nothing more; a step that is
        being executed goes on to its end, which is not recorded. The children that it waits for are terminated with
        it. A parent that waits for it gets `WorkflowFailed`, and does not undo it either.

        Args:
            id: the run.
            reason: why; kept, with the actor of the context, in the run's failure.

        Raises:
            RunStateError: it has ended.
            RunNotFound: it does not exist.
            ValueError: there is no reason.
        """
        why = plain_text(reason)
        _names.run_id(id)
        await self._decide(
            lambda session: _decisions.terminate(session, id, why), lambda ended: self._terminated(ended, reason)
        )

    async def _decide(self, decision: Callable[[AsyncSession], Awaitable[T]], told: Callable[[T], None]) -> None:
        """Carry out what a person decides, in one transaction, and tell this process of it after the commit."""

        async def once() -> None:
            async with self._database.transaction() as session:
                done = await decision(session)
                self._database.after_commit(lambda: told(done))

        if self._database.in_unit_of_work():  # its owner repeats it
            await once()
        else:
            # A decision holds a run and then its children, the end of a child holds the child and then its parent:
            # where two meet the database refuses one of them.
            await self._again.call(once)

    def _terminated(self, ended: Mapping[str, str], reason: str) -> None:
        for run_id, workflow in ended.items():
            _log.warning(
                "run %s of %s was terminated by %s: %s", run_id, workflow, current().actor or "a person", reason
            )
            _metrics.count_end(workflow, RunStatus.TERMINATED)
            self.worker.lose(run_id)
            self._results.ended(run_id, None, None, None)
        self.worker.wake()

    async def health(self) -> Health:
        """Degraded while runs wait for a worker that knows their workflow, or this worker's lease may be lost."""
        return _health(self.worker)

    async def close(self) -> None:
        """End what waits for results."""
        await self._results.close()


def _health(worker: Worker) -> Health:
    details = [f"{worker.parked} runs wait for a person"] if worker.parked else []
    if worker.unknown:
        details.append(f"no worker knows the workflow of {', '.join(worker.unknown)}")
    if worker.serving and not worker.held:
        details.append("this worker's lease has run out: nothing new is begun")
    degraded = bool(worker.unknown) or (worker.serving and not worker.held)
    return Health("degraded" if degraded else "ok", "; ".join(details))


def listed(status: RunStatus | None, limit: int) -> sa.Select[Any]:
    """The query for the newest runs, or for those with this status."""
    query = VIEW.order_by(runs.c.created_at.desc()).limit(limit)
    if status is RunStatus.COMPENSATING:  # not `IN`: each of the two has an index of its own
        goes_on = sa.or_(runs.c.status == "queued", runs.c.status == "running")
        return query.where(goes_on, runs.c.failure.is_not(None))
    if status is RunStatus.WAITING:
        return query.where(ASLEEP, runs.c.failure.is_(None))
    if status is RunStatus.QUEUED:
        return query.where(runs.c.status == "queued", sa.not_(ASLEEP), runs.c.failure.is_(None))
    if status is RunStatus.RUNNING:
        return query.where(runs.c.status == "running", runs.c.failure.is_(None))
    return query if status is None else query.where(runs.c.status == str(status))


def value_of(row: Any, body: str) -> ValueView:
    """What the table of values says."""
    return ValueView(row.name, body, datetime.fromtimestamp(row.at, UTC), row.set_by)


def view_of(row: Any, payloads: Payloads) -> RunView:
    """What a row of the table says, with its payloads opened where they can be read here."""
    status = RunStatus(row.status)
    if row.failure and status in {RunStatus.QUEUED, RunStatus.RUNNING}:
        status = RunStatus.COMPENSATING
    elif row.asleep:
        status = RunStatus.WAITING
    return RunView(
        id=row.id,
        workflow=row.workflow,
        version=row.version,
        status=status,
        attempts=row.attempts,
        generation=row.generation,
        cancel_requested=row.cancel_requested,
        input=payloads.shown(row.input, row.id),
        output=None if row.output is None else payloads.shown(row.output, row.id),
        failure=json.loads(row.failure) if row.failure else None,
        note=row.note,
        context=json.loads(row.context),
        created_at=datetime.fromtimestamp(row.created_at, UTC),
        ended_at=None if row.ended_at is None else datetime.fromtimestamp(row.ended_at, UTC),
        due_at=datetime.fromtimestamp(row.wake_at, UTC) if row.status == RunStatus.QUEUED else None,
        parent=row.parent,
    )
