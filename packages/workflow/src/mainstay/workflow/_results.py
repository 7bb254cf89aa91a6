"""Callers that wait for the ends of runs, in this process or in others.

The end of a run is told at once to those who wait for it where it is executed. Where nobody does, a hint tells other
processes that it has ended; and in between, those who wait look together.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from mainstay.core import Clock, NotBoundError, spawn
from mainstay.database import Database
from mainstay.workflow.errors import RunNotFound
from mainstay.workflow.tables import STATES
from mainstay.workflow.workflow import RunStatus

_log = logging.getLogger("mainstay.workflow")

_ASK_AT_ONCE = 500
_FIRST_LOOK_SECONDS = 0.05
_SLOWEST_LOOK_SECONDS = 1.0
_ENDED = "mainstay_workflow_ended"  # the channel of hints; they name the run


class Results:
    """Tells those who wait: at once about runs of this process, by looking about the others.

    Args:
        executes: whether this process executes the run, and so will tell by itself.
    """

    def __init__(self, database: Database, clock: Clock, *, executes: Callable[[str], bool]) -> None:
        self._database = database
        self._clock = clock
        self._executes = executes
        self._waiters: dict[str, list[asyncio.Future[Mapping[str, Any]]]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._look_now = asyncio.Event()
        self._new: set[str] = set()
        """Runs to be looked at now: those that are waited for since the last look, or were heard of."""
        self._look_at_all = False
        self._listening = ExitStack()
        self._listens = False

    async def of(self, id: str) -> Mapping[str, Any]:
        """Wait for the run to end or to need a person: its status, output, failure and note.

        Raises:
            RunNotFound: it does not exist.
            NotBoundError: the App stopped meanwhile.
        """
        future: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        waiters = self._waiters.setdefault(id, [])
        waiters.append(future)
        self._look_soon(id)
        if self._looking is None or self._looking.done():
            self._looking = spawn(self._look(), name="workflow.results")
        try:
            return await future
        finally:
            waiters.remove(future)
            if not waiters and self._waiters.get(id) is waiters:
                del self._waiters[id]

    def ended(self, id: str, status: RunStatus | None, output: str | None, failure: dict[str, Any] | None) -> None:
        """A run left this process's worker; without a status the database has to be asked what it is now."""
        if id not in self._waiters:
            if status is not None:
                self._database.notify(_ENDED, id)
        elif status is None:
            self._look_soon(id)
        else:
            self._tell(id, {"status": status, "output": output, "failure": failure, "note": None})

    def _heard(self, id: str) -> None:
        """A run has ended elsewhere; without an id, some may have."""
        if id in self._waiters:
            self._look_soon(id)
        elif not id:
            self._look_at_all = True
            self._look_now.set()

    def _look_soon(self, id: str) -> None:
        self._new.add(id)
        self._look_now.set()

    def _tell(self, id: str, state: Mapping[str, Any] | BaseException) -> None:
        for future in self._waiters.get(id, ()):
            if future.done():
                continue
            if isinstance(state, BaseException):
                future.set_exception(state)
            else:
                future.set_result(state)

    async def _look(self) -> None:
        """While anybody waits for runs that other processes execute, ask the database about all of them together."""
        seconds, at = _FIRST_LOOK_SECONDS, self._clock.monotonic()
        while self._waiters:
            self._look_now.clear()
            new, self._new = self._new, set()
            everything = self._look_at_all or self._clock.monotonic() >= at
            ids = [each for each in (self._waiters if everything else new) if self._is_elsewhere(each)]
            if ids:
                self._listen()
            await self._look_at_some(ids)
            if everything:
                self._look_at_all = False
                seconds = min(seconds * 1.5, _SLOWEST_LOOK_SECONDS) if ids else _FIRST_LOOK_SECONDS
                at = self._clock.monotonic() + seconds
            timer = self._clock.call_later(max(0.0, at - self._clock.monotonic()), self._look_now.set)
            try:
                await self._look_now.wait()
            finally:
                timer.cancel()

    def _listen(self) -> None:
        """From the first run of another process on, hints are listened to: going on costs less than beginning anew."""
        if not self._listens:
            self._listens = True
            self._listening.enter_context(self._database.listen(_ENDED, self._heard))

    def _is_elsewhere(self, id: str) -> bool:
        return id in self._waiters and not self._executes(id)

    async def _look_at_some(self, ids: list[str]) -> None:
        try:
            for first in range(0, len(ids), _ASK_AT_ONCE):
                await self._look_at(ids[first : first + _ASK_AT_ONCE])
        except Exception as error:  # noqa: BLE001  it is asked again; who waits has a timeout of their own
            _log.warning("the results of runs could not be looked up and will be again: %s", error)

    async def _look_at(self, ids: list[str]) -> None:
        found = {row.id: row for row in await self._database.read(STATES, {"ids": ids})}
        for asked in ids:
            row = found.get(asked)
            if row is None:
                self._tell(asked, RunNotFound(f"there is no run {asked!r}"))
            elif row.status not in {"queued", "running"}:
                failure = json.loads(row.failure) if row.failure else None
                self._tell(asked, {"status": row.status, "output": row.output, "failure": failure, "note": row.note})

    async def close(self) -> None:
        """Stop looking, and say so to those who wait."""
        self._listening.close()
        looking, self._looking = self._looking, None
        if looking is not None:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
        for waited in list(self._waiters):
            self._tell(waited, NotBoundError("the App stopped before the run ended; it goes on elsewhere"))
