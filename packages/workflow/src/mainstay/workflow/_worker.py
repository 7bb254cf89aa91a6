"""The worker: claims runs and executes them.

A worker serves under one lease at a time. Its runs name it, and nothing else keeps them: when the lease ends, whoever
gets it next puts the runs back into the queue with a new epoch (`_takeover.py`), so that the old worker, should it only
have been asleep, can write nothing more. Once that has happened the worker serves on under a new lease at once. What it
was executing is stopped; a step that is in the middle of something ends when it ends, and takes a place until then.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import sqlalchemy as sa

from mainstay.core import Clock, Context, Drain, Timer, bind, cancelled_from_outside, spawn, uuid7
from mainstay.database import Database, FenceLost, Lease
from mainstay.workflow import _metrics
from mainstay.workflow._history import History, recall
from mainstay.workflow._isolation import Isolation
from mainstay.workflow._payloads import Payloads
from mainstay.workflow._recording import Places, Recording
from mainstay.workflow._run import Run
from mainstay.workflow._surroundings import Surroundings
from mainstay.workflow._takeover import Takeover
from mainstay.workflow._verdict import describe, error_text, plain_text
from mainstay.workflow.errors import Lost, PayloadUnreadable, Released
from mainstay.workflow.settings import DAY_SECONDS, WorkflowSettings
from mainstay.workflow.step import AnyStep
from mainstay.workflow.tables import (
    CLAIMED_AT_ONCE,
    ENTRIES,
    OF_WORKER,
    PARK,
    PARKED,
    REQUEUE,
    RUN_FENCE,
    Claims,
)
from mainstay.workflow.workflow import AnyWorkflow, RunStatus

_log = logging.getLogger("mainstay.workflow")

_LEASE = "mainstay-workflow "
NEWS = "mainstay_workflow_news"
"""The channel for hints that there is something in the queue, or news of the run that a hint names."""

Ended = Callable[[str, RunStatus | None, str | None, dict[str, Any] | None], None]


@dataclass(slots=True)
class Identity:
    """One lease, and the runs that are executed under it."""

    lease: Lease
    surroundings: Surroundings
    isolation: Isolation
    closed: bool = False
    """Nothing else is begun: suspects are executed, or wait until nothing is."""
    runs: dict[str, tuple[Run, asyncio.Task[None]]] = field(default_factory=dict)
    reserved: int = 0
    """Places that a claim on its way may fill."""
    strays: set[tuple[str, int]] = field(default_factory=set)
    """Runs that the database says are executed here, and are not: after a start whose commit was not seen."""
    leaving: list[tuple[Run, asyncio.Task[None]]] = field(default_factory=list)
    """Executions that have given their run back, do not know it yet, and of whose run this worker has the next one."""
    broken: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Epoch of the runs that broke off and are not back in the queue yet, and how."""


class Worker:
    """What a serving process does for its runs.

    Args:
        ended: told about every run that leaves this worker, with its status if it has ended.
    """

    def __init__(
        self,
        *,
        database: Database,
        clock: Clock,
        settings: WorkflowSettings,
        workflows: Mapping[tuple[str, int], AnyWorkflow],
        steps: Mapping[str, AnyStep],
        payloads: Payloads,
        ended: Ended,
    ) -> None:
        self._database = database
        self._clock = clock
        self._settings = settings
        self._workflows = workflows
        self._ended = ended
        self._claims = Claims(list(workflows))
        self._steps = steps
        self._payloads = payloads
        self._identity: Identity | None = None
        self._lost: list[Identity] = []  # their leases are others' by now, and some of their steps have yet to end
        self._takeover = Takeover(database=database, settings=settings, mine=self._name, wake=self.wake)
        self._draining = False
        self._full = False
        self._drain: Drain | None = None
        self._due: Timer | None = None
        self._look_at = float("-inf")
        self.unknown: list[str] = []
        self.parked = 0

    def _surroundings(self) -> Surroundings:
        """What the runs of one identity share: steps of a lost one keep no places from those of the next."""
        return Surroundings(
            database=self._database,
            clock=self._clock,
            executing=Places(self._settings.max_executing),
            unrecorded=Places(self._settings.max_unrecorded),
            suspend_after_seconds=self._settings.suspend_after_seconds,
            keep_signals_seconds=self._settings.keep_signals_days * DAY_SECONDS,
            steps=self._steps,
            payloads=self._payloads,
            wake=self.signal,
            cancel=self.cancel,
        )

    def _isolation(self) -> Isolation:
        return Isolation(database=self._database, clock=self._clock, seconds=self._settings.lease_seconds)

    # What the engine asks

    def executes(self, id: str) -> bool:
        """Whether the run is executed here at the moment, and so its end will be told here."""
        entry = None if self._identity is None else self._identity.runs.get(id)
        return entry is not None and not isinstance(entry[0].told, Lost)

    @property
    def serving(self) -> bool:
        """Whether this process executes runs, or means to."""
        return self._identity is not None

    @property
    def held(self) -> bool:
        """Whether the worker's lease is good."""
        return self._identity is not None and self._identity.lease.held

    def wake(self) -> None:
        """There is something in the queue."""
        if self._drain is not None:
            self._drain.wake()

    def announce(self, id: str = "") -> None:
        """There is something in the queue, or news of a run: this worker and those of other processes look at once."""
        self._database.notify(NEWS, id)

    def _heard(self, id: str) -> None:
        """Something was announced, here or by another process."""
        if self._identity is not None and id in self._identity.runs:
            self._identity.runs[id][0].look()
            self._look_at = float("-inf")  # it may be a cancellation
        self.wake()

    def cancel(self, id: str) -> None:
        """The run is to be cancelled; where it is not executed here, another worker is told to look."""
        if self._identity is not None and id in self._identity.runs:
            self._identity.runs[id][0].cancel()
        else:
            self.announce(id)

    def lose(self, id: str) -> None:
        """The run was ended by a person: its execution stops at its next boundary, and writes nothing more."""
        if self._identity is not None and id in self._identity.runs:
            self._identity.runs[id][0].stop(Lost())

    def signal(self, id: str) -> None:
        """A message for the run has arrived."""
        if self._identity is not None and id in self._identity.runs:
            self._identity.runs[id][0].look()
        else:
            self.announce(id)

    def takes(self) -> Identity | None:
        """The identity under which a run may be executed here from its start, without going through the queue."""
        identity = self._identity
        if identity is None or self._draining or not identity.lease.held:
            return None
        if self._room(identity) > 0 and not identity.closed:
            return identity
        self._full = True
        return None

    def begin(self, identity: Identity, row: Mapping[str, Any]) -> None:
        """Execute a run that was started as this identity's."""
        if identity is self._identity and not self._draining and row["id"] not in identity.runs:
            self._launch(identity, row, History())
        # Otherwise its lease has been given up, and the run is found as any dead worker's.

    # The loop

    async def work(self, drain: Drain) -> None:
        """Serve until the drain begins, then give back the runs that are not finished."""
        with self._database.listen(NEWS, self._heard):
            await self._work(drain)

    async def _work(self, drain: Drain) -> None:
        self._draining, self._drain = False, drain
        watch = spawn(self._watch(drain), name="workflow.worker.drain")
        takeover = spawn(self._takeover.work(drain), name="workflow.worker.takeover")
        try:
            while not drain.begun:
                lease = await self._safely(self._take_lease, drain)
                if lease is None:
                    await drain.pause(self._settings.poll_seconds)
                    continue
                # Steps of a lost lease keep their places, but not those of results that are yet to be recorded.
                self._identity = Identity(lease, self._surroundings(), self._isolation())
                if await self._serve(self._identity, drain):
                    self._lost.append(self._identity)
                    self._identity = None
        finally:
            try:
                await self._leave()
            finally:
                self._drain = None
                if self._due is not None:
                    self._due.cancel()
                watch.cancel()
                if not drain.begun or cancelled_from_outside():
                    takeover.cancel()  # else it ends by itself, and not in the middle of a transaction
                await asyncio.gather(watch, takeover, return_exceptions=True)

    async def _watch(self, drain: Drain) -> None:
        await drain.wait()
        self._draining = True
        if self._identity is not None:
            for run, _ in self._identity.runs.values():
                run.stop(Released())

    async def _take_lease(self) -> Lease | None:
        return await self._database.lease(f"{_LEASE}{uuid7()}", seconds=self._settings.lease_seconds)

    async def _serve(self, identity: Identity, drain: Drain) -> bool:
        """Claim and look around until the drain begins, or the lease is lost; whether it is."""
        self._look_at = float("-inf")
        while not drain.begun:
            if not identity.lease.held:
                if await self._safely(lambda: self._is_lost(identity), drain):
                    return True
            else:
                more = await self._safely(lambda: self._claim(identity), drain)
                if self._clock.monotonic() >= self._look_at:
                    self._look_at = self._clock.monotonic() + self._settings.lease_seconds / 3
                    await self._safely(lambda: self._look_around(identity), drain)
                if more:
                    continue
                await self._safely(self._expect_the_next, drain)
            await drain.pause(self._settings.poll_seconds, wakeable=True)
        return False

    async def _expect_the_next(self) -> None:
        """Look again at the moment at which the next run is due, where that is sooner than the next look."""
        rows = await self._database.read(self._claims.next_due)
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if rows:
            self._due = self._clock.call_later(max(0.0, rows[0].seconds), self.wake)

    async def _safely(self, look: Callable[[], Awaitable[Any]], drain: Drain) -> Any:
        """The loop goes on also when the database does not answer; None then."""
        try:
            return await look()
        except Exception as error:  # noqa: BLE001  a worker that ends would leave its runs behind
            _log.warning("the worker's look at the database failed and will be repeated: %s", error)
            await drain.pause(min(1.0, self._settings.poll_seconds))
            return None

    async def _is_lost(self, identity: Identity) -> bool:
        """Whether somebody else has the lease; without an answer from the database it is unknown."""
        nothing = {"run": "", "owner": "", "at_epoch": -1, "note": None}
        try:
            await self._database.write(REQUEUE, nothing, fence=identity.lease.fence)
        except FenceLost:
            _log.error(
                "this worker's lease is lost, its %d runs belong to others by now: it goes on under a new one",
                len(identity.runs),
            )
            for run, _ in identity.runs.values():
                run.stop(Lost())
            return True
        return False

    async def _leave(self) -> None:
        """Let every execution end: released at its next boundary, or cancelled with this task."""
        self._draining = True
        for run, _ in self._executing():
            run.stop(Released())
        try:
            if cancelled_from_outside():
                raise asyncio.CancelledError  # the time to drain is over already
            while tasks := [task for _, task in self._executing()]:
                await asyncio.wait(tasks)
            await self._give_back_broken()
        except asyncio.CancelledError:
            tasks = [task for _, task in self._executing()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        finally:
            self._draining = False
            identity, self._identity, self._lost = self._identity, None, []
            if identity is not None:
                await identity.lease.release()

    async def _give_back_broken(self) -> None:
        """Keep how runs broke off; without this they would be those of a worker that died."""
        identity = self._identity
        if identity is None:
            return
        for run_id, (epoch, _) in list(identity.broken.items()):
            try:
                await self._give_back(identity, run_id, epoch)
            except Exception as error:  # noqa: BLE001  another worker takes it over
                _log.warning("run %s broke off and could not be given back: %s", run_id, error)

    def _executing(self) -> list[tuple[Run, asyncio.Task[None]]]:
        mine = [] if self._identity is None else [self._identity]
        return [each for identity in (*self._lost, *mine) for each in (*identity.runs.values(), *identity.leaving)]

    def _name(self) -> str | None:
        return None if self._identity is None else self._identity.lease.name

    # Claiming

    async def _claim(self, identity: Identity) -> bool:
        """Take what is due, as far as there is room; whether there may be more."""
        if await identity.isolation.lasts(identity.runs):
            self._full = True
            return False
        (queue,) = await self._database.read(self._claims.waiting)
        room = min(self._room(identity), CLAIMED_AT_ONCE)
        values: dict[str, Any] = {"owner": identity.lease.name}
        identity.closed = queue.company is not None
        if identity.closed:
            # Whoever is busy takes no others, or a worker that always has something to do would never get to these.
            if identity.runs or identity.reserved:
                room = 0
            room = min(room, Isolation.most(queue.company))
            values["together"] = queue.company
        self._full = room <= 0
        if not (queue.others or identity.closed):
            return False
        if self._full:
            self._make_room(identity)
            return False
        identity.reserved += room
        try:
            claim = self._claims.claim_suspects if identity.closed else self._claims.claim
            return await self._fill(identity, claim, {**values, "most": room})
        finally:
            identity.reserved -= room

    def _make_room(self, identity: Identity) -> None:
        """Let runs that only wait leave for those in the queue, such as the children that they wait for."""
        for run, _ in list(identity.runs.values())[:CLAIMED_AT_ONCE]:
            run.make_room()

    def _room(self, identity: Identity) -> int:
        lost = sum(len(each.runs) for each in self._lost)
        return self._settings.max_runs - len(identity.runs) - identity.reserved - lost

    async def _fill(self, identity: Identity, claim: sa.UpdateBase, values: Mapping[str, Any]) -> bool:
        async with self._database.transaction() as session:
            result = await session.execute(claim, values)
            rows = [dict(row) for row in result.mappings()]
        if suspects := identity.isolation.begin(rows):
            _log.warning("workers died under %d runs without these getting further: executed by themselves", suspects)
        histories = await self._histories([row["id"] for row in rows if row["epoch"] > 1])
        for row in rows:
            try:
                if row["attempts"] > self._settings.max_attempts:
                    await self._park(identity, row, _claimed_in_vain(row))
                else:
                    opened = partial(self._payloads.open, run_id=row["id"])
                    self._launch(identity, row, recall(histories.get(row["id"], ()), opened))
            except PayloadUnreadable as error:
                await self._park(identity, row, f"{error}. Then resume it")
            except Exception:  # noqa: BLE001  one run that cannot be begun must not keep the others from it
                _log.exception("run %s could not be begun", row["id"])
        return bool(len(rows) == values["most"])

    async def _histories(self, ids: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        if not ids:
            return {}
        entries = await self._database.read(ENTRIES, {"ids": ids})
        by_run = groupby((dict(entry._mapping) for entry in entries), key=lambda entry: entry["run_id"])
        return {run_id: list(own) for run_id, own in by_run}

    async def _park(self, identity: Identity, row: Mapping[str, Any], note: str) -> None:
        _log.error("run %s is parked: %s", row["id"], note)
        values = {"run": row["id"], "at_epoch": row["epoch"], "status": RunStatus.PARKED, "note": note}
        fence = RUN_FENCE.at(row["id"], row["epoch"], identity.lease.name)
        await self._database.write(PARK, {**values, "cancellable": False}, fence=fence, route=row["id"])
        self._ended(row["id"], None, None, None)

    def _launch(self, identity: Identity, row: Mapping[str, Any], history: History) -> None:
        fence = RUN_FENCE.at(row["id"], row["epoch"], identity.lease.name)
        around = identity.surroundings
        run = Run(
            row,
            workflow=self._workflows[row["workflow"], row["version"]],
            history=history,
            recording=Recording(
                self._database,
                self._clock,
                row["id"],
                fence,
                history.last_seq,
                unrecorded=around.unrecorded,
                payloads=self._payloads,
            ),
            held=lambda: identity.lease.held,
            surroundings=around,
        )
        task = spawn(self._execute(identity, run, row["context"]), name=f"run {row['id']}")
        if row["id"] in identity.runs:
            identity.leaving.append(identity.runs[row["id"]])
        identity.runs[row["id"]] = (run, task)
        task.add_done_callback(_seen)
        _metrics.RUNS_ACTIVE.inc()
        if self._draining:
            run.stop(Released())

    async def _execute(self, identity: Identity, run: Run, context: str) -> None:
        end = None
        try:
            with bind(Context.from_dict(json.loads(context)), causation_id=run.id):
                end = await run.execute()
            if end is not None:
                _metrics.count_end(run.workflow.name, end[0])
        except asyncio.CancelledError:
            raise
        except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001  a bug of ours; it must not end the worker
            # The run stays ours in the database, and is put back into the queue as a stray.
            _log.exception("run %s broke off", run.id)
            note = plain_text(f"the last that broke off did so with {error_text(describe(error))}")
            identity.broken[run.id] = (run.epoch, note)
        finally:
            _metrics.RUNS_ACTIVE.dec()
            entry = identity.runs.get(run.id)
            if entry is not None and entry[0] is run:
                del identity.runs[run.id]
            identity.leaving = [each for each in identity.leaving if each[0] is not run]
            self._lost = [each for each in self._lost if each.runs]
            # Another run waits for this place, or this one was put to sleep, and when it is due must be seen at once: a
            # virtual clock would go past that moment before the next look.
            if self._full or end is None:
                self.wake()
            self._ended(run.id, *(end or (None, None, None)))

    # Looking around

    async def _look_around(self, identity: Identity) -> None:
        await self._look_at_mine(identity)
        self.parked = (await self._database.read(PARKED))[0][0]
        _metrics.RUNS_PARKED.set(self.parked)
        unknown = await self._database.read(self._claims.unknown)
        _metrics.RUNS_UNKNOWN.set(sum(row.waiting for row in unknown))
        names = [f"{row.waiting} of {row.workflow!r} version {row.version}" for row in unknown]
        if names and names != self.unknown:
            _log.warning("runs wait for a worker that knows their workflow: %s", ", ".join(names))
        self.unknown = names

    async def _look_at_mine(self, identity: Identity) -> None:
        strays: set[tuple[str, int]] = set()
        before = {run_id: run for run_id, (run, _) in identity.runs.items()}
        rows = await self._database.read(OF_WORKER, {"owner": identity.lease.name})
        # A run that was ours before the question and is not in the answer has been ended by a person, or just left.
        for run_id in before.keys() - {row.id for row in rows}:
            if run_id in identity.runs and identity.runs[run_id][0] is before[run_id]:
                before[run_id].stop(Lost())
                self._ended(run_id, None, None, None)
        for row in rows:
            entry = identity.runs.get(row.id)
            if entry is None:
                strays.add((row.id, row.epoch))
            elif row.cancel_requested:
                entry[0].cancel()
        # Seen twice: not just about to begin, nor just ended.
        for run_id, epoch in strays & identity.strays:
            if run_id not in identity.runs:
                _log.warning("run %s is ours and not executed: back into the queue", run_id)
                await self._give_back(identity, run_id, epoch)
                self.wake()
        identity.strays = strays

    async def _give_back(self, identity: Identity, run_id: str, epoch: int) -> None:
        _, note = identity.broken.get(run_id, (epoch, "its worker had it and did not execute it"))
        values = {"run": run_id, "owner": identity.lease.name, "at_epoch": epoch, "note": note}
        await self._database.write(REQUEUE, values)
        identity.broken.pop(run_id, None)


def _claimed_in_vain(row: Mapping[str, Any]) -> str:
    times = row["attempts"] - 1
    why = row["note"] or "how these claims ended is not on record"
    return f"claimed {times} times without getting any further: {why}. Find out why, then resume or cancel it"


def _seen(task: asyncio.Task[None]) -> None:
    """What ends a run's task is told by the run; asyncio need not complain that it was not awaited."""
    if not task.cancelled():
        task.exception()
