"""What a run waits for: a time, a signal, the end of a child.

A wait is recorded when it begins, and so is its end. Meanwhile the run may leave the worker's memory. What is new for
a run raises the number of its `news`; a run that is put to sleep says which number it has seen, and anything newer
wakes it at once. So nothing that arrives between a look and the sleep is missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from mainstay.core import Clock
from mainstay.workflow._execution import Execution
from mainstay.workflow._history import Kind, StepRecord, StepState
from mainstay.workflow._recording import Recording
from mainstay.workflow._verdict import EXPIRED, step_failed
from mainstay.workflow.tables import CHILD, NEXT_SIGNAL, RECEIVE
from mainstay.workflow.workflow import ENDS

_LOOK_SECONDS = 0.5  # news from other processes
_DAY_SECONDS = 86_400.0

Look = Callable[[], Awaitable[bool]]


class Waits:
    """The waits of one execution of a run.

    Args:
        news: how much was new for the run when it was claimed.

    Attributes:
        seen: what this execution has seen of that, at least.
    """

    def __init__(self, run_id: str, *, execution: Execution, recording: Recording, clock: Clock, news: int) -> None:
        self._run_id = run_id
        self._execution = execution
        self._recording = recording
        self._clock = clock
        self._news = news
        self._looks: dict[str, int] = {}
        self._receiving = asyncio.Lock()

    @property
    def seen(self) -> int:
        """What every wait has seen; a run that waits for nothing new has seen what was there when it was claimed."""
        return min(self._looks.values(), default=self._news)

    async def sleep(self, record: StepRecord, seconds: float) -> None:
        """Let time pass, by the database's clock from the moment that is recorded."""
        await self.begin(record, seconds)
        while record.rest_seconds > 0:
            await self._execution.wait(record.rest_seconds)
            record.rest_seconds = 0.0
        self._end(record, None)

    async def receive(self, record: StepRecord, name: str, seconds: float | None) -> None:
        """Wait for a message and take it: that it is taken, and by whom, is one commit.

        Raises:
            StepFailed: nothing came in time.
        """
        await self.begin(record, seconds)
        if not await self.until(lambda: self.take(record, name), record, limited=seconds is not None):
            error = EXPIRED | {"detail": f"no signal {name} within {seconds:g} s"}
            row = self._recording.row(Kind.FAILED, record.key, position=record.position, info={"error": error})
            record.state, record.seq, record.error = StepState.FAILED, row["seq"], error
            self._recording.settle(row, executed=False)
            label = f"@signal {name}"
            raise step_failed(label, record.key, StepState.FAILED, error)

    async def take(self, record: StepRecord, name: str) -> bool:
        """Take the next message of a name, if there is one."""
        async with self._receiving:  # or two branches could take the same one
            (found,) = await self._recording.read(NEXT_SIGNAL, {"run": self._run_id, "name": name})
            self._looks[record.key] = found.news
            if found.number is None:
                return False
            body = self._recording.opened(found.body)
            row = self._recording.row(Kind.DONE, record.key, position=record.position, body=body)
            taken = {"run": self._run_id, "message": found.number, "by": record.key}
            record.in_doubt = row  # a cancellation may come while the commit is on its way
            await self._recording.end((RECEIVE, taken), row=row)
            record.state, record.seq, record.output = StepState.DONE, row["seq"], body
            record.in_doubt = None
            return True

    async def child(self, child_id: str, key: str) -> Any:
        """Wait for a child to end, and return its row. The caller records its outcome."""
        ended: Any = None

        async def look() -> bool:
            nonlocal ended
            (ended,) = await self._recording.read(CHILD, {"run": self._run_id, "child": child_id})
            self._looks[key] = ended.news
            return ended.status in ENDS

        await self.until(look, StepRecord(key, None), limited=False)
        return ended

    async def begin(self, record: StepRecord, seconds: float | None, *changes: tuple[Any, Mapping[str, Any]]) -> None:
        """Record that a wait begins, and make changes with it; nothing where it has begun before."""
        if record.seq == 0:
            record.rest_seconds = _DAY_SECONDS if seconds is None else seconds
            info = {"rest_seconds": record.rest_seconds}
            row = self._recording.row(Kind.WAIT, record.key, position=record.position, body=record.input, info=info)
            record.seq, record.waits = row["seq"], True
            if changes:
                await self._recording.end(*changes, row=row)
            else:
                await self._recording.append(row)

    def _end(self, record: StepRecord, body: str | None) -> None:
        row = self._recording.row(Kind.DONE, record.key, position=record.position, body=body)
        record.state, record.seq, record.output = StepState.DONE, row["seq"], body
        self._recording.settle(row, executed=False)

    async def until(self, look: Look, record: StepRecord, *, limited: bool) -> bool:
        """Look whenever there may be something new; whether it was there before the wait was over."""
        began = self._clock.monotonic()
        try:
            while True:
                await self._execution.boundary()
                if await look():
                    return True
                left = record.rest_seconds - (self._clock.monotonic() - began) if limited else _DAY_SECONDS
                if left <= 0:
                    return False
                await self._execution.wait(left, since=began, look_seconds=_LOOK_SECONDS)
        finally:
            if self._execution.stopped is None:
                self._looks.pop(record.key, None)
