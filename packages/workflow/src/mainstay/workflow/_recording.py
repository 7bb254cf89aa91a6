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

The price is a window: steps executed and not yet recorded are executed again after a kill. `Slots` bounds it for the
whole worker, whatever the number of its runs.

Benchmark rows: `workflow/three steps, 1,000 at once` and `workflow/steps repeated by a kill`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from mainstay.core import Clock, FullJitter, Outcome, RetryState
from mainstay.database import CommitUnknown, Database, Fence, FenceLost
from mainstay.workflow._history import Row
from mainstay.workflow.errors import Lost, Parked
from mainstay.workflow.tables import APPEND, APPEND_ONCE, ENTRY

_log = logging.getLogger("mainstay.workflow")
_BACKOFF = FullJitter(initial_seconds=0.05, max_seconds=2.0)

_GRACE_SECONDS = 5.0  # how long a write may keep a cancelled run

Slots = asyncio.Semaphore


def worth_repeating(error: Exception) -> bool:
    """Whether a write that ended so may succeed later, or may even have succeeded."""
    return isinstance(error, CommitUnknown) or bool(getattr(error, "retryable", False))


class Recording:
    """The history of one run, as its worker writes it.

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
        slots: Slots,
    ) -> None:
        self.run_id = run_id
        self._database = database
        self._clock = clock
        self._fence = fence
        self._seq = last_seq
        self._slots = slots
        self._append = APPEND[database.dialect]
        self._buffer: list[Row] = []
        self._held = 0
        self._turn = asyncio.Lock()
        self._flusher: asyncio.Task[None] | None = None

    def row(
        self, kind: str, step: str, *, position: int | None = None, body: str | None = None, info: str | None = None
    ) -> Row:
        """An entry with the next number."""
        self._seq += 1
        return {
            "run_id": self.run_id,
            "seq": self._seq,
            "kind": kind,
            "step": step,
            "position": position,
            "body": body,
            "info": info,
        }

    # Slots: steps that a kill would repeat

    async def take_slot(self) -> None:
        """Wait until this worker may execute one more step whose result is not recorded."""
        await self._slots.acquire()

    def drop_slot(self) -> None:
        """The step ended without a result to record."""
        self._slots.release()

    def settle(self, row: Row, *, slot: bool) -> None:
        """Keep an outcome, to be durable before the next effect; its slot is free once it is."""
        self._buffer.append(row)
        self._held += slot
        asyncio.get_running_loop().call_soon(self._flush_soon)

    # Writing

    async def append(self, row: Row) -> None:
        """Write an entry and whatever is waiting; durable when this returns."""
        self._buffer.append(row)
        await self.flush()

    async def flush(self) -> None:
        """Everything that was kept before this call is durable when it returns.

        Raises:
            Lost: the run belongs to somebody else.
            Parked: the database refuses an entry for good.
        """
        last = self._seq
        while self._buffer and self._buffer[0]["seq"] <= last:
            await self._insist(self._write_buffer)

    async def end(self, statement: Any, values: Mapping[str, Any], row: Row | None = None) -> None:
        """Write what is waiting, `row` and another table's new state in one commit."""

        async def write() -> None:
            async with self._turn:
                rows, held = list(self._buffer), self._held
                async with self._database.batch(fence=self._fence, route=self.run_id):
                    if rows or row is not None:
                        await self._database.write(self._append, rows if row is None else [*rows, row])
                    await self._database.write(statement, [values])
                self._written(rows, held)

        await self._insist(write)

    async def with_effect(self, row: Row, effect: Callable[[], Awaitable[None]]) -> None:
        """Run an effect that only writes to the database; its rows, `row` and what is waiting share one commit.

        Raises:
            Lost: the run belongs to somebody else.
            Exception: the effect's own, or the database's: nothing of it is there.
        """
        async with self._turn:
            rows, held = list(self._buffer), self._held
            try:
                async with self._database.batch(fence=self._fence, route=self.run_id):
                    await effect()
                    await self._database.write(APPEND_ONCE, [*rows, row])
            except FenceLost:
                raise Lost from None
            except Exception:
                # It may have arrived all the same; only the history knows.
                if await self.find(row["seq"]) is None:
                    raise
                # What was kept after that commit was sent is not in it. All of it is written once more, which changes
                # nothing for the others.
                asyncio.get_running_loop().call_soon(self._flush_soon)
            else:
                self._written(rows, held)

    async def within_transaction(self, row: Row) -> None:
        """Write an entry on the unit of work that is open, holding the run's fence until its commit."""
        try:
            await self._database.write(APPEND_ONCE, [row], fence=self._fence, route=self.run_id)
        except FenceLost:
            raise Lost from None

    async def find(self, seq: int) -> Any | None:
        """The entry, if it is in the history."""
        found = await self.read(ENTRY, {"run": self.run_id, "seq": seq})
        return found[0] if found else None

    async def read(self, statement: sa.Executable, parameters: Mapping[str, Any]) -> Sequence[sa.Row[Any]]:
        """The rows of a query, asked until the database answers."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self._database.read(statement, parameters)
            except Exception as error:  # noqa: BLE001  judged by _back_off
                await self._back_off(error, attempt)

    async def _write_buffer(self) -> None:
        async with self._turn:
            rows, held = list(self._buffer), self._held
            if rows:
                await self._database.write(self._append, rows, fence=self._fence, route=self.run_id)
                self._written(rows, held)

    def _written(self, rows: Sequence[Row], held: int) -> None:
        del self._buffer[: len(rows)]
        self._held -= held
        for _ in range(held):
            self._slots.release()
        if self._buffer:  # kept while this was on its way
            asyncio.get_running_loop().call_soon(self._flush_soon)

    async def _insist(self, write: Callable[[], Awaitable[None]]) -> None:
        cancelled: asyncio.CancelledError | None = None
        give_up_at = float("inf")
        attempt = 0
        while True:
            attempt += 1
            try:
                await write()
                break
            except asyncio.CancelledError as error:
                cancelled = error  # what has happened is written first; then the cancellation goes on its way
                give_up_at = min(give_up_at, self._clock.monotonic() + _GRACE_SECONDS)
            except FenceLost:
                raise Lost from None
            except Exception as error:
                if cancelled is not None and self._clock.monotonic() > give_up_at:
                    raise cancelled from error
                try:
                    await self._back_off(error, attempt)
                except asyncio.CancelledError as interrupted:
                    cancelled = interrupted
                    give_up_at = min(give_up_at, self._clock.monotonic() + _GRACE_SECONDS)
        if cancelled is not None:
            raise cancelled

    async def _back_off(self, error: Exception, attempt: int) -> None:
        """Wait before a write or read is repeated."""
        if not worth_repeating(error):
            msg = f"the history cannot be written: {type(error).__name__}: {error}"
            raise Parked(msg) from error
        if attempt == 1:
            _log.warning("run %s: the history could not be written and will be again: %s", self.run_id, error)
        await self._clock.sleep(_BACKOFF(RetryState(attempt, Outcome.of_error(error), 0.0)))

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
        """End the callback's task, and free the slots of what was never written."""
        flusher = self._flusher
        if flusher is not None:
            flusher.cancel()
            await asyncio.gather(flusher, return_exceptions=True)
        for _ in range(self._held):
            self._slots.release()
        self._held = 0
        self._buffer.clear()
