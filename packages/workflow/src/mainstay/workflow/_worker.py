"""The worker: claims runs and executes them.

A worker serves under one lease at a time. Its runs name it, and nothing else keeps them: when the lease ends, whoever
gets it next puts the runs back into the queue with a new epoch (`_takeover.py`), so that the old worker, should it only
have been asleep, can write nothing more. Once that has happened the worker serves on under a new lease at once. What it
was executing is stopped; a step that is in the middle of something ends when it ends, and takes a place until then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from mainstay.core import Clock, Drain, Timer, cancelled_from_outside, spawn, uuid7
from mainstay.database import Database, Lease
from mainstay.workflow._history import History
from mainstay.workflow._identity import Ended, Executing, Identity
from mainstay.workflow._isolation import Isolation
from mainstay.workflow._payloads import Payloads
from mainstay.workflow._queue import Queue
from mainstay.workflow._recording import Places
from mainstay.workflow._run import Run
from mainstay.workflow._surroundings import Surroundings
from mainstay.workflow._takeover import Takeover
from mainstay.workflow.errors import Lost, Released
from mainstay.workflow.settings import DAY_SECONDS, WorkflowSettings
from mainstay.workflow.step import AnyStep
from mainstay.workflow.tables import (
    CLAIMED_AT_ONCE,
)
from mainstay.workflow.workflow import AnyWorkflow

_log = logging.getLogger("mainstay.workflow")

_LEASE = "mainstay-workflow "
NEWS = "mainstay_workflow_news"
"""The channel for hints that there is something in the queue, or news of the run that a hint names."""


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
        self._steps = steps
        self._payloads = payloads
        self._identity: Identity | None = None
        self._lost: list[Identity] = []  # their leases are others' by now, and some of their steps have yet to end
        self._takeover = Takeover(
            database=database,
            settings=settings,
            mine=lambda: None if self._identity is None else self._identity.lease.name,
            wake=self.wake,
        )
        self._draining = False
        self._full = False
        self._drain: Drain | None = None
        self._due: Timer | None = None
        self._look_at = float("-inf")
        self.queue = Queue(
            database=database,
            workflows={known: workflow.timeout_seconds for known, workflow in workflows.items()},
            payloads=payloads,
            max_attempts=settings.max_attempts,
        )

    def _new_identity(self, lease: Lease) -> Identity:
        # Steps of an identity that was lost keep no places from those of the next.
        surroundings = Surroundings(
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
        isolation = Isolation(database=self._database, clock=self._clock, seconds=self._settings.lease_seconds)
        return Identity(
            lease,
            surroundings=surroundings,
            isolation=isolation,
            workflows=self._workflows,
            ended=self._ended,
            left=self._left,
        )

    def _left(self, ended: bool) -> None:  # noqa: FBT001  whether it did
        """A run has left this worker."""
        self._lost = [each for each in self._lost if each.runs]
        # Another run waits for this place, or this one was put to sleep, and when it is due must be seen at once: a
        # virtual clock would go past that moment before the next look.
        if self._full or not ended:
            self.wake()

    def _run(self, id: str) -> Run | None:
        """The run, where it is executed here."""
        return None if self._identity is None else self._identity.find(id)

    # What the engine asks

    def executes(self, id: str) -> bool:
        """Whether the run is executed here at the moment, and so its end will be told here."""
        run = self._run(id)
        return run is not None and not isinstance(run.told, Lost)

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
        if (run := self._run(id)) is not None:
            run.look()
            self._look_at = float("-inf")  # it may be a cancellation
        self.wake()

    def cancel(self, id: str) -> None:
        """The run is to be cancelled; where it is not executed here, another worker is told to look."""
        if (run := self._run(id)) is not None:
            run.cancel()
        else:
            self.announce(id)

    def lose(self, id: str) -> None:
        """The run was ended by a person: its execution stops at its next boundary, and writes nothing more."""
        if (run := self._run(id)) is not None:
            run.stop(Lost())

    def signal(self, id: str) -> None:
        """A message for the run has arrived."""
        if (run := self._run(id)) is not None:
            run.look()
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
        self._draining, self._drain = False, drain
        watch = spawn(self._watch(drain), name="workflow.worker.drain")
        takeover = spawn(self._takeover.work(drain), name="workflow.worker.takeover")
        listening = ExitStack()
        listening.enter_context(self._database.listen(NEWS, self._heard))
        try:
            while not drain.begun:
                take = partial(self._database.lease, f"{_LEASE}{uuid7()}", seconds=self._settings.lease_seconds)
                lease = await self._safely(take, drain)
                if lease is None:
                    await drain.pause(self._settings.poll_seconds)
                    continue
                self._identity = self._new_identity(lease)
                if await self._serve(self._identity, drain):
                    self._lost.append(self._identity)
                    self._identity = None
        finally:
            try:
                await self._leave()
            finally:
                listening.close()
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
            self._identity.stop(Released)

    async def _serve(self, identity: Identity, drain: Drain) -> bool:
        """Claim and look around until the drain begins, or the lease is lost; whether it is."""
        self._look_at = float("-inf")
        while not drain.begun:
            if not identity.lease.held:
                if await self._safely(identity.is_lost, drain):
                    return True
            else:
                more = await self._safely(lambda: self._claim(identity), drain)
                if self._clock.monotonic() >= self._look_at:
                    self._look_at = self._clock.monotonic() + self._settings.lease_seconds / 3
                    if await self._safely(identity.look_at_mine, drain):
                        self.wake()
                    await self._safely(self.queue.measure, drain)
                if more:
                    continue
                await self._safely(self._expect_the_next, drain)
            await drain.pause(self._settings.poll_seconds, wakeable=True)
        return False

    async def _expect_the_next(self) -> None:
        """Look again at the moment at which the next run is due, where that is sooner than the next look."""
        seconds = await self.queue.next_due_seconds()
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if seconds is not None:
            self._due = self._clock.call_later(seconds, self.wake)

    async def _safely(self, look: Callable[[], Awaitable[Any]], drain: Drain) -> Any:
        """The loop goes on also when the database does not answer; None then."""
        try:
            return await look()
        except Exception as error:  # noqa: BLE001  a worker that ends would leave its runs behind
            _log.warning("the worker's look at the database failed and will be repeated: %s", error)
            await drain.pause(min(1.0, self._settings.poll_seconds))
            return None

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
            if self._identity is not None:
                await self._identity.give_back_broken()
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

    def _executing(self) -> list[Executing]:
        mine = [] if self._identity is None else [self._identity]
        return [each for identity in (*self._lost, *mine) for each in identity.executing]

    # Claiming

    async def _claim(self, identity: Identity) -> bool:
        """Take what is due, as far as there is room; whether there may be more."""
        others, company = await self.queue.waiting()
        if await identity.isolation.lasts(identity.runs):
            self._full = True
            if others or company is not None:
                identity.make_room()  # a suspect that only waits does nothing that could kill the worker
            return False
        room = min(self._room(identity), CLAIMED_AT_ONCE)
        identity.closed = company is not None
        if company is not None:
            # Whoever is busy takes no others, or a worker that always has something to do would never get to these.
            if identity.runs or identity.reserved:
                room = 0
            room = min(room, Isolation.most(company))
        self._full = room <= 0
        if not (others or identity.closed):
            return False
        if self._full:
            identity.make_room()
            return False
        identity.reserved += room
        try:
            return await self.queue.take(identity, room, company, begin=self._launch)
        finally:
            identity.reserved -= room

    def _room(self, identity: Identity) -> int:
        lost = sum(len(each.runs) for each in self._lost)
        return self._settings.max_runs - len(identity.runs) - identity.reserved - lost

    def _launch(self, identity: Identity, row: Mapping[str, Any], history: History) -> None:
        run = identity.launch(row, history)
        if self._draining:
            run.stop(Released())
