"""Writes of a run's history that are repeated until they are durable, also where the run is cancelled meanwhile.

After a first try they are repeated in a task of their own. The run's own may be cancelled at each of its turns (by a
cancel scope of anyio, for example, which does so until the code has left it), and nothing could be awaited there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from mainstay.core import Clock, FullJitter, Outcome, RetryState, cancelled_from_outside
from mainstay.database import CommitUnknown, FenceLost
from mainstay.workflow.errors import ControlFlow, Lost, Parked

_log = logging.getLogger("mainstay.workflow")
_BACKOFF = FullJitter(initial_seconds=0.05, max_seconds=2.0)
_GRACE_SECONDS = 5.0

T = TypeVar("T")


def worth_repeating(error: Exception) -> bool:
    """Whether a write that ended so may succeed later, or may even have succeeded."""
    return isinstance(error, CommitUnknown) or bool(getattr(error, "retryable", False))


class _Patience:
    """How long a write may keep a cancelled run."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until = float("inf")

    def ends(self) -> None:
        """The run is cancelled; the first time counts."""
        self._until = min(self._until, self._clock.monotonic() + _GRACE_SECONDS)

    @property
    def is_over(self) -> bool:
        """Whether it has lasted long enough."""
        return self._clock.monotonic() > self._until


async def undisturbed(work: Coroutine[Any, Any, T], *, ends: Callable[[], bool]) -> T:
    """Await work in a task of its own, which a cancellation of this one reaches only where that is to end it.

    Some libraries cancel a task again at each of its turns until it has left a scope of theirs. What the function of
    a run has given up is recorded all the same, and it leaves the scope afterwards.

    Args:
        work: what is done.
        ends: whether a cancellation that has just come is to end the work.
    """
    task = asyncio.create_task(work)
    ended = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            if ends() and not ended:
                ended = True
                task.cancel()
    return task.result()


class Insistence:
    """Repeats writes and reads of one run for as long as the database is away."""

    def __init__(self, run_id: str, clock: Clock) -> None:
        self._run_id = run_id
        self._clock = clock

    async def on(
        self,
        write: Callable[[], Awaitable[None]],
        *,
        lost: Callable[[bool], Awaitable[ControlFlow | None]] | None = None,
        failed: BaseException | None = None,
    ) -> None:
        """Repeat a write until it is durable.

        Args:
            write: may be repeated as often as is needed.
            lost: what it means that the fence refuses the write, given whether an earlier try ended in doubt; None
                where that try is durable. Without it another worker has the run.
            failed: how a first try ended.
        """
        if failed is None:
            try:
                await write()
            except BaseException as error:  # noqa: BLE001  judged below
                failed = error
            else:
                return
        patience = _Patience(self._clock)
        cancelled = failed if isinstance(failed, asyncio.CancelledError) else None
        if cancelled is not None:
            patience.ends()
        again = asyncio.create_task(self._again(write, lost, failed, patience), name=f"write {self._run_id}")
        while not again.done():
            try:
                await asyncio.wait([again])
            except asyncio.CancelledError as error:
                cancelled = error  # what has happened is written first; then the cancellation goes on its way
                patience.ends()
        problem = again.exception()
        if cancelled is not None and not isinstance(problem, ControlFlow):
            raise cancelled from problem
        if problem is not None:
            raise problem

    async def _again(
        self,
        write: Callable[[], Awaitable[None]],
        lost: Callable[[bool], Awaitable[ControlFlow | None]] | None,
        failed: BaseException,
        patience: _Patience,
    ) -> None:
        attempt = 1
        while True:
            if isinstance(failed, FenceLost):
                signal = Lost() if lost is None else await lost(attempt > 1)
                if signal is None:
                    return
                raise signal from None
            if isinstance(failed, Exception):
                if patience.is_over:
                    raise failed
                await self.back_off(failed, attempt)
            elif not isinstance(failed, asyncio.CancelledError):
                raise failed
            attempt += 1
            try:
                await write()
            except BaseException as error:
                if cancelled_from_outside(error):  # the loop is being closed
                    raise
                failed = error
            else:
                return

    async def back_off(self, error: Exception, attempt: int) -> None:
        """Wait before a write or read is repeated."""
        if not worth_repeating(error):
            msg = f"the history cannot be written: {type(error).__name__}: {error}"
            raise Parked(msg) from error
        if attempt == 1:
            _log.warning("run %s: the history could not be written and will be again: %s", self._run_id, error)
        await self._clock.sleep(_BACKOFF(RetryState(attempt, Outcome.of_error(error), 0.0)))
