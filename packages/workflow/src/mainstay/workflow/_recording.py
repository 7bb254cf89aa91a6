"""How a run writes its history, and why that is fast.

Every step has to be recorded twice: that it may begin, before its effect, and what came of it, before the *next*
effect. Done plainly that is two commits a step. Three things make it cheap:

- **A result rides along.** What came of a step is put into a buffer and goes out with the next intent, or with the
  run's end, in one entry: one commit a step. Should the workflow function do something else first, a callback that the
  loop runs next writes the buffer by itself, so that nothing stays in it for longer than a turn.
- **Nothing is read.** A run that its own worker started knows that its history is empty; numbers are given out here,
  and the fence on the run's row is the only thing that the database has to check.
- **Writes are one statement.** Entries of all kinds have the same columns and go through the same insert, so that those
  of hundreds of runs become one statement of one group commit.

The price is a window: steps executed and not yet recorded are executed again after a kill. The worker's
`Places` for unrecorded results bound it for all of its runs together: while none is free, no further step begins.

Benchmark rows: `workflow/three steps, 1,000 at once` and `workflow/steps repeated by a kill`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from mainstay.core import Clock
from mainstay.database import Conflict, Database, Fence, FenceLost
from mainstay.workflow._execution import Wait
from mainstay.workflow._history import Kind, Row, StepRecord, StepState
from mainstay.workflow._insistence import Insistence, worth_repeating
from mainstay.workflow._payloads import Payloads
from mainstay.workflow._values import Values
from mainstay.workflow.errors import CancelRequested, ControlFlow, Lost, Parked
from mainstay.workflow.tables import APPEND, APPEND_ONCE, CLAIM, ENTRY, FORGET, SET_VALUE

_log = logging.getLogger("mainstay.workflow")


class Places:
    """A number of places that the runs of one worker share.

    Attributes:
        limit: how many there are. More may be taken where that is not to be prevented.
        taken: how many are.
        waiting: the waits of those who want one, in their order.
    """

    __slots__ = ("_waking", "limit", "taken", "waiting")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0
        self.waiting: dict[Wait, None] = {}
        self._waking = False

    @property
    def full(self) -> bool:
        """Whether none is free; who wants one then waits by `Execution.turn`."""
        return self.taken >= self.limit

    def give_back(self, number: int = 1) -> None:
        """Free places."""
        self.taken -= number
        if self.waiting and not self._waking:
            self._wake()

    def _wake(self) -> None:
        """Wake as many as there are places, turn by turn: one that needs its place only later is not waited for."""
        free = self.limit - self.taken
        self._waking = free > 0 and bool(self.waiting)
        if self._waking:
            for wait in list(self.waiting)[:free]:
                del self.waiting[wait]
                wait.end()
            asyncio.get_running_loop().call_soon(self._wake)


class Recording:
    """The history of one run, and the values that it publishes, as its worker writes them.

    A write is repeated until it is durable, however long the database is away: only the write, never the effect. The
    fence makes that safe at any time. It gives up when the run belongs to somebody else; and a cancellation waits for
    it, but not for ever, since a process that stops may find the database gone.
    """

    def __init__(
        self,
        database: Database,
        clock: Clock,
        run_id: str,
        fence: Fence,
        last_seq: int,
        *,
        unrecorded: Places,
        payloads: Payloads,
    ) -> None:
        self.run_id = run_id
        self._payloads = payloads
        self._database = database
        self._clock = clock
        self._fence = fence
        self._seq = last_seq
        self._unrecorded = unrecorded
        self._append = APPEND[database.dialect]
        self._buffer: list[Row] = []
        self._outdated: list[int] = []
        self._held = 0
        self._turn = asyncio.Lock()
        self._insist = Insistence(run_id, clock)
        self._flusher: asyncio.Task[None] | None = None
        self.values = Values(run_id, clock, self._publish, seal=lambda body: payloads.seal(body, run_id))

    def row(
        self,
        kind: Kind,
        step: str,
        *,
        position: int | None = None,
        body: str | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> Row:
        """An entry with the next number."""
        self._seq += 1
        return self.filled(
            {"run_id": self.run_id, "seq": self._seq, "kind": kind, "step": step, "position": position}, body, info
        )

    def filled(self, row: Row, body: str | None, info: Mapping[str, Any] | None) -> Row:
        """The entry with its payloads, as they are stored."""
        if info is not None and info.get("input") is not None:
            info = {**info, "input": self.sealed(info["input"])}
        row["body"] = self.sealed(body)
        row["info"] = None if info is None else json.dumps(info)
        return row

    def sealed(self, payload: str | None, run_id: str | None = None) -> str | None:
        """A payload as it is stored, of this run or of another one.

        Raises:
            Parked: it cannot be stored.
        """
        return None if payload is None else self._payloads.seal_or_park(payload, run_id or self.run_id)

    def opened(self, stored: str | None, run_id: str | None = None) -> str | None:
        """A stored payload, of this run or of another one.

        Raises:
            Parked: it cannot be read.
        """
        return None if stored is None else self._payloads.open_or_park(stored, run_id or self.run_id)

    def settle(self, row: Row, *, executed: bool) -> None:
        """Keep an outcome, to be durable before the next effect.

        Args:
            row: the entry.
            executed: a kill before it is durable makes the next worker execute the step again; it takes a place.
        """
        self._buffer.append(row)
        self._held += executed
        self._unrecorded.taken += executed
        asyncio.get_running_loop().call_soon(self._flush_soon)

    def drop(self) -> None:
        """Forget what is still to be written."""
        self._written(list(self._buffer), self._held)

    def outdate(self, numbers: Sequence[int]) -> None:
        """Leave these entries out of the history: the next one says all that they say."""
        self._outdated.extend(numbers)

    # Writing

    def append(self, row: Row) -> Coroutine[Any, Any, None]:
        """Write an entry and whatever is waiting; durable when this returns. Raises what `flush` does."""
        self._buffer.append(row)
        return self.flush()

    async def flush(self) -> None:
        """Everything that was kept before this call is durable when it returns.

        Raises:
            Lost: the run belongs to somebody else.
            Parked: the database refuses an entry for good.
        """
        last = self._seq
        while self._buffer and self._buffer[0]["seq"] <= last:
            try:
                await self._write_buffer()
            except BaseException as error:  # noqa: BLE001  judged there
                await self._insist.on(self._write_buffer, failed=error)

    async def end(
        self, *changes: tuple[Any, Mapping[str, Any]], row: Row | None = None, unless_cancelled: bool = False
    ) -> None:
        """Write what is waiting, `row`, changes of other tables and the steps' newest values in one commit.

        Args:
            changes: statements with their values.
            row: an entry.
            unless_cancelled: there is no way back from it, so it is refused once a cancellation was accepted.

        Raises:
            CancelRequested: one was.
            Lost: the run belongs to somebody else.
            Parked: the database refuses it for good.
        """
        fence = replace(self._fence, unflagged=unless_cancelled)

        async def write() -> None:
            async with self._turn:
                rows, held = list(self._buffer), self._held
                async with self._database.batch(fence=fence, route=self.run_id):
                    if rows or row is not None:
                        await self._database.write(self._append, rows if row is None else [*rows, row])
                    for statement, values in [*changes, *self.values.left()]:
                        await self._database.write(statement, [values])
                self._written(rows, held)

        async def lost(again: bool) -> ControlFlow | None:  # noqa: FBT001  whether it was tried before
            found = await self._claimed()
            if again and found is not None and found.status != "running":
                return None  # this was the claim's last word
            return await self.refused(unless_cancelled=unless_cancelled)

        await self._insist.on(write, lost=lost)

    async def publish(self, record: StepRecord, name: str) -> None:
        """Set a value of the run to the input of a record, in one commit with the entry that says so."""
        body = record.input or "null"
        row = self.row(Kind.DONE, record.key, position=record.position, info={"input": body})
        record.in_doubt = row  # a cancellation may come while the commit is on its way
        self.values.forget(name)
        await self.end((SET_VALUE, self.values.row(name, body, record.key)), row=row)
        record.state, record.seq, record.in_doubt = StepState.DONE, row["seq"], None

    async def _publish(self, rows: Sequence[Mapping[str, Any]]) -> Exception | None:
        """Write values of steps, beside the record; the error, where it is worth trying again."""
        try:
            await self._database.write(SET_VALUE, rows, fence=self._fence, route=self.run_id)
        except FenceLost:
            return None  # they are another worker's to write by now
        except Exception as error:  # noqa: BLE001  a value fails nothing
            if worth_repeating(error):
                return error
            _log.error("run %s: its values cannot be written: %s", self.run_id, error)
        return None

    async def _claimed(self) -> sa.Row[Any] | None:
        """The run's row, while it is at the epoch of this claim."""
        found = await self.read(CLAIM, {"run": self.run_id})
        return found[0] if found and found[0].epoch == self._fence.epoch else None

    async def refused(self, *, unless_cancelled: bool) -> ControlFlow:
        """Why the fence refused a write."""
        found = await self._claimed() if unless_cancelled else None
        cancelled = found is not None and found.status == "running" and found.cancel_requested
        return CancelRequested() if cancelled else Lost()

    async def with_effect(self, row: Row, effect: Callable[[], Awaitable[None]]) -> None:
        """Run an effect that only writes to the database; its rows, `row` and what is waiting share one commit.

        Raises:
            Lost: the run belongs to somebody else.
            Exception: the effect's own, or the database's: nothing of it is there.
        """
        async with self._turn:
            rows, held = list(self._buffer), self._held
            executed = False
            try:
                async with self._database.batch(fence=self._fence, route=self.run_id):
                    await effect()
                    executed = True
                    await self._database.write(APPEND_ONCE, [*rows, row])
            except Exception as error:
                if isinstance(error, FenceLost) and executed:  # before that it is of a fence of the effect's own
                    raise Lost from None
                # It may have arrived all the same; only the history knows.
                if await self.find(row["seq"]) is None:
                    raise
                # What was kept after that commit was sent is not in it. All of it is written once more, which changes
                # nothing for the others.
                asyncio.get_running_loop().call_soon(self._flush_soon)
            else:
                self._written(rows, held)

    async def claim(self, row: Row, *changes: tuple[Any, Mapping[str, Any]]) -> bool:
        """Write an entry and changes, which another writer may exclude; whether they are there, not that writer's."""
        await self.flush()
        taken = False

        async def write() -> None:
            nonlocal taken
            try:
                async with self._database.batch(fence=self._fence, route=self.run_id):
                    await self._database.write(APPEND_ONCE, [row])
                    for statement, values in changes:
                        await self._database.write(statement, [values])
            except Conflict:
                taken = True

        await self._insist.on(write)
        if not taken:
            return True
        found = await self.find(row["seq"])
        return found is not None and found[0] == row["kind"]

    async def within_transaction(self, row: Row, *, unless_cancelled: bool) -> None:
        """Write an entry on the unit of work that is open, holding the run's fence until its commit.

        Raises:
            FenceLost: `refused` says why, after the transaction.
        """
        fence = replace(self._fence, unflagged=unless_cancelled)
        await self._database.write(APPEND_ONCE, [row], fence=fence, route=self.run_id)

    async def find(self, seq: int) -> tuple[str, str | None] | None:
        """Kind and body of the entry, if it is in the history."""
        found = await self.read(ENTRY, {"run": self.run_id, "seq": seq})
        return (found[0].kind, self.opened(found[0].body)) if found else None

    async def read(self, statement: sa.Executable, parameters: Mapping[str, Any]) -> Sequence[sa.Row[Any]]:
        """The rows of a query, asked until the database answers."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self._database.read(statement, parameters)
            except Exception as error:  # noqa: BLE001  judged by _back_off
                await self._insist.back_off(error, attempt)

    async def _write_buffer(self) -> None:
        async with self._turn:
            rows, held, outdated = list(self._buffer), self._held, list(self._outdated)
            if outdated:
                async with self._database.batch(fence=self._fence, route=self.run_id):
                    await self._database.write(self._append, rows)
                    await self._database.write(FORGET, [{"run": self.run_id, "outdated": seq} for seq in outdated])
                del self._outdated[: len(outdated)]
                self._written(rows, held)
            elif rows:
                await self._database.write(self._append, rows, fence=self._fence, route=self.run_id)
                self._written(rows, held)

    def _written(self, rows: Sequence[Row], held: int) -> None:
        del self._buffer[: len(rows)]
        if held:
            self._held -= held
            self._unrecorded.give_back(held)
        if self._buffer:  # kept while this was on its way
            asyncio.get_running_loop().call_soon(self._flush_soon)

    def _flush_soon(self) -> None:
        if self._buffer and not self._turn.locked() and self._flusher is None:
            self._flusher = asyncio.get_running_loop().create_task(self._flush_alone(), name=f"flush {self.run_id}")

    async def _flush_alone(self) -> None:
        try:
            await self.flush()
        except (Lost, Parked):
            pass  # the run meets the same at its next write
        finally:
            self._flusher = None

    async def close(self) -> None:
        """End the tasks that write, and free the places of what was never written."""
        await self.values.close()
        flusher = self._flusher
        if flusher is not None:
            flusher.cancel()
            await asyncio.gather(flusher, return_exceptions=True)
        if self._held:
            self._unrecorded.give_back(self._held)
            self._held = 0
        self._buffer.clear()
