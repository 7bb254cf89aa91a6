"""The values that a run publishes, as its worker writes them.

What a workflow function sets is a place in the record. What a step sets must cost the step nothing: it is kept here,
from whichever thread, and a task of the run's own writes the newest of each name, one write at a time and at most ten
in a second. While the database is away only that write is repeated. What is left when the run ends, or leaves the
worker, shares that commit, so that the last value is never missing. The fence of the run keeps others from writing.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from mainstay.core import Clock, FullJitter, Outcome, RetryState, spawn
from mainstay.workflow.errors import PayloadNotStored
from mainstay.workflow.tables import SET_VALUE

_log = logging.getLogger("mainstay.workflow")

_PAUSE_SECONDS = 0.1  # between two writes of one run
_BACKOFF = FullJitter(initial_seconds=0.1, max_seconds=5.0)

Row = Mapping[str, Any]
Publish = Callable[[Sequence[Row]], Awaitable[Exception | None]]


class Values:
    """The values of one claim of a run that its steps have set and that are not durable yet.

    Args:
        publish: writes rows of the table; returns the error after which that is worth trying again.
        seal: makes what is stored of a value's JSON.
    """

    def __init__(self, run_id: str, clock: Clock, publish: Publish, *, seal: Callable[[str], str]) -> None:
        self._run_id = run_id
        self._seal = seal
        self._publish = publish
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._newest: dict[str, Row] = {}
        self._sending: dict[str, Row] = {}
        self._busy = False  # a writer is at work, or about to be
        self._closed = False
        self._writer: asyncio.Task[None] | None = None

    def row(self, name: str, body: str, place: str) -> Row:
        """A row of the table; `place` is the key of the step, or of the function's own primitive, that sets it."""
        return {"run_id": self._run_id, "name": name, "body": self._seal(body), "set_by": place}

    def say(self, row: Row) -> None:
        """Keep a step's value, to be written soon; from any thread."""
        with self._lock:
            if self._closed:
                return
            self._newest[row["name"]] = row
            if self._busy:
                return
            self._busy = True
        self._loop.call_soon_threadsafe(self._begin)

    def forget(self, name: str) -> None:
        """A newer value of this name is written otherwise."""
        with self._lock:
            self._newest.pop(name, None)
            self._sending.pop(name, None)

    def left(self) -> list[tuple[Any, Row]]:
        """What is not durable yet, as changes that share the commit by which the run leaves the worker."""
        with self._lock:
            return [(SET_VALUE, row) for row in (self._sending | self._newest).values()]

    def _begin(self) -> None:
        if not self._closed:
            self._writer = spawn(self._write(), name=f"values {self._run_id}")  # in no unit of work of the step's

    async def _write(self) -> None:
        failed = 0
        while self._take():
            error = await self._publish(list(self._sending.values()))
            failed, pause = failed + 1, _PAUSE_SECONDS
            if error is None:
                failed = 0
            else:
                self._put_back()
                pause = _BACKOFF(RetryState(failed, Outcome.of_error(error), 0.0))
            if failed == 1:
                _log.warning("run %s: its values could not be written and will be again: %s", self._run_id, error)
            self._sending = {}
            await self._clock.sleep(pause)

    def _take(self) -> bool:
        with self._lock:
            self._sending, self._newest = self._newest, {}
            self._busy = bool(self._sending)
            return self._busy

    def _put_back(self) -> None:
        with self._lock:
            self._newest = self._sending | self._newest

    async def close(self) -> None:
        """End the writer. What is said from now on, by a thread that outlives its attempt, is dropped."""
        with self._lock:
            self._closed = True
        self._publish = _dropped  # no cycle is left, which only the collector would end
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)


async def _dropped(_rows: Sequence[Row]) -> None:
    return None


class Voice:
    """By which the code of one attempt sets values, until the attempt ends."""

    __slots__ = ("_place", "_values")

    def __init__(self, values: Values, place: str) -> None:
        self._values: Values | None = values
        self._place = place

    def say(self, name: str, body: str) -> None:
        """Set a value; after the end of the attempt nothing."""
        values = self._values
        if values is None:
            return
        try:
            row = values.row(name, body, self._place)
        except PayloadNotStored as error:
            _log.error("value %s of %s is not set: %s", name, self._place, error)
        else:
            values.say(row)

    def end(self) -> None:
        """The attempt has ended; its thread may not have."""
        self._values = None


current_voice: ContextVar[Voice | None] = ContextVar("mainstay_workflow_voice", default=None)
