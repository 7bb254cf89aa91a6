"""The engine: starts runs, waits for their results, and does what a person asks."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, ParamSpec, TypeVar, overload

import sqlalchemy as sa

from mainstay.core import Clock, Health, derived_id, once, timeout, uuid7
from mainstay.database import Database
from mainstay.workflow import _names
from mainstay.workflow._history import History, recall
from mainstay.workflow._payloads import Payloads
from mainstay.workflow._results import Results
from mainstay.workflow._starts import Start, Starts
from mainstay.workflow._verdict import workflow_failed
from mainstay.workflow._worker import Worker
from mainstay.workflow.approval import AnyApproval
from mainstay.workflow.approvals import Approvals
from mainstay.workflow.control import RunControl
from mainstay.workflow.errors import RunNotFound, RunParked, RunStateError, SignalConflict
from mainstay.workflow.settings import WorkflowSettings
from mainstay.workflow.step import AnyStep
from mainstay.workflow.tables import (
    ASLEEP,
    ENTRIES,
    FIND,
    ROUSE,
    SEND,
    SENT,
    VALUE,
    VALUES,
    VIEW,
    moment,
    runs,
)
from mainstay.workflow.value import ValueView
from mainstay.workflow.workflow import AnyWorkflow, Handle, RunInput, RunStatus, Workflow

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


class WorkflowEngine(RunControl):
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
        self._payloads = payloads
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
        super().__init__(database, clock, payloads=payloads, worker=self.worker, results=self._results)
        self._starts = Starts(database, payloads, workflows, self.worker)
        self.approvals = Approvals(database, approvals, payloads=payloads, told=self.worker.signal)

    # Starting

    async def start(
        self, name: str, version: int, input: str, id: str | None, *, timeout_seconds: float | None = None
    ) -> str:
        """Begin a run of a workflow with its input as JSON; returns its id. See `Workflow.start`."""
        chosen = None if id is None else _names.run_id(id)
        return await self._starts.one(Start(name, version, input, chosen, timeout_seconds))

    async def start_batch(self, inputs: Iterable[RunInput[T]]) -> list[Handle[T]]:
        """Begin many runs in one commit, all or none: `start_batch(sell.input(n).named(f"sale-{n}") for n in numbers)`.

        For each the rules of `Workflow.start` hold. Joins the unit of work around it; inside a workflow function it is
        one recorded step. Workers take the runs from the queue.

        Args:
            inputs: of workflows of this App, of one or of several.

        Returns:
            The runs, in the order of their inputs.

        Raises:
            RunConflict: some ids belong to other workflows or inputs, or one stands for two inputs here; it names them.
            NotBoundError: a router is not part of a running App.
        """
        chosen = list(inputs)
        handles: list[Handle[T]] = []

        def named(key: str | None) -> list[Handle[T]]:
            new = [uuid7() if key is None else derived_id(f"{key}:{number}") for number in range(len(chosen))]
            return [each.workflow.handle(each.id or str(run_id)) for each, run_id in zip(chosen, new, strict=True)]

        async def begin(key: str | None) -> None:
            handles[:] = named(key)
            starts = [
                Start(of.workflow.name, of.workflow.version, of.text, handle.id, of.workflow.timeout_seconds)
                for of, handle in zip(chosen, handles, strict=True)
            ]
            await self._starts.all(starts)

        def arguments() -> object:
            return [(of.workflow.name, of.id, of.workflow.signature.given_arguments(of.text)) for of in chosen]

        if chosen:
            key = await once("start_batch", begin, transactional=False, arguments=arguments)
            handles = handles or named(key)
        return handles

    async def start_by_name(
        self,
        name: str,
        input: Mapping[str, Any] | None = None,
        *,
        version: int | None = None,
        id: str | None = None,
        timeout_seconds: float | None = None,
    ) -> str:
        """Begin a run of a workflow whose code this process may not have; returns its id. See `Workflow.start`.

        Where the App has the workflow, the input is checked against it. Where it has not, the worker that has reads the
        input; what does not fit parks the run with a note that names the parameter. The time limit is that of the
        workflow either way, from this start on.

        Args:
            name: of the workflow.
            input: values by the names of its parameters, as JSON has them.
            version: of the workflow; without one the newest that this App has.
            id: names the run for as long as it is kept.
            timeout_seconds: how long it may take, in place of the workflow's own, where the App does not have it.

        Raises:
            RunConflict: the id belongs to another workflow or to another input.
            TypeError: the input does not fit, or is nothing that JSON can say.
            ValueError: a name or an id breaks the rule for identifiers, or the version cannot be known here.
        """
        start = self._starts.by_name(name, input or {}, version, id, timeout_seconds)
        started = [] if start.id is None else [start.id]

        async def begin(key: str | None) -> None:
            run_id = start.id or (None if key is None else str(derived_id(key)))
            started[:] = [await self._starts.one(start._replace(id=run_id))]

        arguments = (input or {}, version, id, timeout_seconds)
        key = await once(f"start:{name}", begin, transactional=False, arguments=lambda: arguments)
        return started[0] if started else str(derived_id(key or ""))

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

    async def send(
        self, run_id: str, name: str, body: str, id: str | None, *, same: Callable[[str], bool] | None = None
    ) -> None:
        """Store a message for a run, and wake the run if it sleeps. See `Signal.send`.

        Args:
            run_id: the run's.
            name: of the signal.
            body: the value as JSON.
            id: of the message; None for a new one.
            same: whether the value that a message of this id was sent with is this one; else it is compared as text.
        """
        run_id = _names.run_id(run_id)
        message_id = str(uuid7()) if id is None else _names.signal_id(id)
        message = {"run_id": run_id, "id": message_id, "name": name, "body": self._payloads.seal(body, run_id)}
        same = body.__eq__ if same is None else same
        if await self._sent(message, same):
            return
        async with self._database.batch(route=run_id):
            await self._database.write(SEND[self._database.dialect], message)
            await self._database.write(ROUSE, {"run": run_id})
            self._database.after_commit(lambda: self.worker.signal(run_id))
        if id is not None:  # another sender may have been faster
            await self._sent(message, same)

    async def _sent(self, message: Mapping[str, str], same: Callable[[str], bool]) -> bool:
        """Whether the message is there.

        Raises:
            SignalConflict: its id is that of another one.
            RunStateError: it is not, and its run has ended.
        """
        run_id, message_id, name = message["run_id"], message["id"], message["name"]
        ((status, there, body),) = await self._database.read(SENT, {"run": run_id, "message": message_id})
        if there is None:
            if status is not None and RunStatus(status).terminal:
                msg = f"signal {name} for run {run_id!r}: it is {status}, so it would never be received"
                raise RunStateError(msg)
            return False
        if there != name or not same(self._payloads.open(body, run_id)):
            what = "another value" if there == name else f"signal {there}"
            msg = f"message {message_id!r} of run {run_id!r} was sent as {what}: an id names one message of its run"
            raise SignalConflict(msg)
        return True

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

    async def health(self) -> Health:
        """Degraded while runs wait for a worker that knows their workflow, or this worker's lease may be lost."""
        return _health(self.worker)

    async def close(self) -> None:
        """End what waits for results."""
        await self._results.close()


def _health(worker: Worker) -> Health:
    details = [f"{worker.queue.parked} runs wait for a person"] if worker.queue.parked else []
    if worker.queue.unknown:
        details.append(f"no worker knows the workflow of {', '.join(worker.queue.unknown)}")
    if worker.serving and not worker.held:
        details.append("this worker's lease has run out: nothing new is begun")
    degraded = bool(worker.queue.unknown) or (worker.serving and not worker.held)
    return Health("degraded" if degraded else "ok", "; ".join(details))


def listed(status: RunStatus | None, limit: int) -> sa.Select[Any]:
    """The query for the newest runs, or for those with this status.

    The index has the runs of one stored state in the order in which they are listed; so the newest of several states
    are those among the newest of each.
    """
    goes_back = runs.c.failure.is_not(None)
    which: list[tuple[RunStatus, sa.ColumnElement[bool]]]
    if status is None:
        shown_only = {RunStatus.WAITING, RunStatus.COMPENSATING}
        which = [(stored, sa.true()) for stored in RunStatus if stored not in shown_only]
    elif status is RunStatus.COMPENSATING:
        which = [(RunStatus.QUEUED, goes_back), (RunStatus.RUNNING, goes_back)]
    elif status is RunStatus.WAITING:
        which = [(RunStatus.QUEUED, sa.and_(ASLEEP, sa.not_(goes_back)))]
    elif status is RunStatus.QUEUED:
        which = [(RunStatus.QUEUED, sa.and_(sa.not_(ASLEEP), sa.not_(goes_back)))]
    else:
        which = [(status, sa.not_(goes_back) if status is RunStatus.RUNNING else sa.true())]
    newest = [
        sa.select(runs.c.id)
        .where(runs.c.status == sa.literal_column(f"'{stored}'"), condition)
        .order_by(runs.c.created_at.desc())
        .limit(limit)
        for stored, condition in which
    ]
    of_each = sa.union_all(*(sa.select(each.subquery().c.id) for each in newest))
    return VIEW.where(runs.c.id.in_(of_each)).order_by(runs.c.created_at.desc()).limit(limit)


def value_of(row: Any, body: str) -> ValueView:
    """What the table of values says."""
    return ValueView(row.name, body, moment(row.at), row.set_by)


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
        created_at=moment(row.created_at),
        ended_at=None if row.ended_at is None else moment(row.ended_at),
        due_at=moment(row.wake_at) if row.status == RunStatus.QUEUED else None,
        parent=row.parent,
    )
