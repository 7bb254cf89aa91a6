"""One lease of a worker, and the runs that are executed under it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from mainstay.core import Context, bind, spawn
from mainstay.database import FenceLost, Lease
from mainstay.workflow import _metrics
from mainstay.workflow._history import History
from mainstay.workflow._isolation import Isolation
from mainstay.workflow._recording import Recording
from mainstay.workflow._run import Run
from mainstay.workflow._surroundings import Surroundings
from mainstay.workflow._verdict import describe, error_text, plain_text
from mainstay.workflow.errors import ControlFlow, Lost
from mainstay.workflow.tables import CLAIMED_AT_ONCE, OF_WORKER, PARK, REQUEUE, RUN_FENCE
from mainstay.workflow.workflow import AnyWorkflow, RunStatus

_log = logging.getLogger("mainstay.workflow")

Ended = Callable[[str, RunStatus | None, str | None, dict[str, Any] | None], None]
Executing = tuple[Run, asyncio.Task[None]]


class Identity:
    """One lease of a worker, and the runs that are executed under it.

    Args:
        lease: what the database knows the worker by.
        surroundings: what its runs share.
        isolation: keeps suspects apart.
        workflows: those that the App has, by name and version.
        ended: told about every run that leaves, with its status if it has ended.
        left: told afterwards whether the run has ended.

    Attributes:
        closed: nothing else is begun: suspects are executed, or wait until nothing is.
        runs: those that are executed, by id.
        surroundings: what they share.
        reserved: places that a claim, or a start, on its way may fill.
    """

    def __init__(
        self,
        lease: Lease,
        *,
        surroundings: Surroundings,
        isolation: Isolation,
        workflows: Mapping[tuple[str, int], AnyWorkflow],
        ended: Ended,
        left: Callable[[bool], None],
    ) -> None:
        self.lease = lease
        self.isolation = isolation
        self.closed = False
        self.runs: dict[str, Executing] = {}
        self.reserved = 0
        self.surroundings = surroundings
        self._workflows = workflows
        self._ended = ended
        self._left = left
        # Runs that the database says are executed here, and are not: after a start whose commit was not seen.
        self._strays: set[tuple[str, int]] = set()
        # Executions that have given their run back, do not know it yet, and of whose run this worker has the next one.
        self._leaving: list[Executing] = []
        # Epoch of the runs that broke off and are not back in the queue yet, and how.
        self._broken: dict[str, tuple[int, str]] = {}

    @property
    def executing(self) -> list[Executing]:
        """All that has not ended."""
        return [*self.runs.values(), *self._leaving]

    def find(self, id: str) -> Run | None:
        """The run, where it is executed here."""
        entry = self.runs.get(id)
        return None if entry is None else entry[0]

    def make_room(self) -> None:
        """Let runs that only wait leave for those in the queue, such as the children that they wait for."""
        for run, _ in list(self.runs.values())[:CLAIMED_AT_ONCE]:
            run.make_room()

    def stop(self, signal: Callable[[], ControlFlow]) -> None:
        """Tell every execution to stop at its next boundary."""
        for run, _ in self.executing:
            run.stop(signal())

    def launch(self, row: Mapping[str, Any], history: History) -> Run:
        """Begin to execute a claim of a run."""
        fence = RUN_FENCE.at(row["id"], row["epoch"], self.lease.name)
        around = self.surroundings
        run = Run(
            row,
            workflow=self._workflows[row["workflow"], row["version"]],
            history=history,
            recording=Recording(
                around.database,
                around.clock,
                row["id"],
                fence,
                history.last_seq,
                unrecorded=around.unrecorded,
                payloads=around.payloads,
            ),
            held=lambda: self.lease.held,
            surroundings=around,
        )
        task = spawn(self._execute(run, row["context"]), name=f"run {row['id']}")
        if row["id"] in self.runs:
            self._leaving.append(self.runs[row["id"]])
        self.runs[row["id"]] = (run, task)
        task.add_done_callback(_seen)
        _metrics.RUNS_ACTIVE.inc()
        return run

    async def _execute(self, run: Run, context: str) -> None:
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
            self._broken[run.id] = (run.epoch, note)
        finally:
            _metrics.RUNS_ACTIVE.dec()
            entry = self.runs.get(run.id)
            if entry is not None and entry[0] is run:
                del self.runs[run.id]
            self._leaving = [each for each in self._leaving if each[0] is not run]
            self._left(end is not None)
            self._ended(run.id, *(end or (None, None, None)))

    async def park(self, row: Mapping[str, Any], note: str) -> None:
        """Leave a run that was claimed to a person."""
        _log.error("run %s is parked: %s", row["id"], note)
        values = {"run": row["id"], "at_epoch": row["epoch"], "status": RunStatus.PARKED, "note": note}
        fence = RUN_FENCE.at(row["id"], row["epoch"], self.lease.name)
        await self.surroundings.database.write(PARK, {**values, "cancellable": False}, fence=fence, route=row["id"])
        self._ended(row["id"], None, None, None)

    async def is_lost(self) -> bool:
        """Whether somebody else has the lease; without an answer from the database it is unknown."""
        nothing = {"run": "", "owner": "", "at_epoch": -1, "note": None}
        try:
            await self.surroundings.database.write(REQUEUE, nothing, fence=self.lease.fence)
        except FenceLost:
            _log.error(
                "this worker's lease is lost, its %d runs belong to others by now: it goes on under a new one",
                len(self.runs),
            )
            self.stop(Lost)
            return True
        return False

    async def look_at_mine(self) -> bool:
        """Compare the database with what is executed here; whether runs went back into the queue."""
        went_back = False
        strays: set[tuple[str, int]] = set()
        before = {run_id: run for run_id, (run, _) in self.runs.items()}
        rows = await self.surroundings.database.read(OF_WORKER, {"owner": self.lease.name})
        # A run that was ours before the question and is not in the answer has been ended by a person, or just left.
        for run_id in before.keys() - {row.id for row in rows}:
            if run_id in self.runs and self.runs[run_id][0] is before[run_id]:
                before[run_id].stop(Lost())
                self._ended(run_id, None, None, None)
        for row in rows:
            entry = self.runs.get(row.id)
            if entry is None:
                strays.add((row.id, row.epoch))
            elif row.cancel_requested:
                entry[0].cancel()
        # Seen twice: not just about to begin, nor just ended.
        for run_id, epoch in strays & self._strays:
            if run_id not in self.runs:
                _log.warning("run %s is ours and not executed: back into the queue", run_id)
                await self._give_back(run_id, epoch)
                went_back = True
        self._strays = strays
        return went_back

    async def _give_back(self, run_id: str, epoch: int) -> None:
        _, note = self._broken.get(run_id, (epoch, "its worker had it and did not execute it"))
        values = {"run": run_id, "owner": self.lease.name, "at_epoch": epoch, "note": note}
        await self.surroundings.database.write(REQUEUE, values)
        self._broken.pop(run_id, None)

    async def give_back_broken(self) -> None:
        """Keep how runs broke off; without this they would be those of a worker that died."""
        for run_id, (epoch, _) in list(self._broken.items()):
            try:
                await self._give_back(run_id, epoch)
            except Exception as error:  # noqa: BLE001  another worker takes it over
                _log.warning("run %s broke off and could not be given back: %s", run_id, error)


def _seen(task: asyncio.Task[None]) -> None:
    """What ends a run's task is told by the run; asyncio need not complain that it was not awaited."""
    if not task.cancelled():
        task.exception()
