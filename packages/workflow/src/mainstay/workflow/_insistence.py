"""Writes of a run's history that are repeated until they are durable."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from mainstay.core import Clock, FullJitter, Outcome, RetryState
from mainstay.database import CommitUnknown, FenceLost
from mainstay.workflow.errors import ControlFlow, Lost, Parked

_log = logging.getLogger("mainstay.workflow")
_BACKOFF = FullJitter(initial_seconds=0.05, max_seconds=2.0)
_GRACE_SECONDS = 5.0  # how long a write may keep a cancelled run


def worth_repeating(error: Exception) -> bool:
    """Whether a write that ended so may succeed later, or may even have succeeded."""
    return isinstance(error, CommitUnknown) or bool(getattr(error, "retryable", False))


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
        cancelled: asyncio.CancelledError | None = None
        give_up_at = float("inf")
        attempt = 0
        while True:
            attempt += 1
            try:
                if attempt == 1 and failed is not None:
                    raise failed
                await write()
                break
            except asyncio.CancelledError as error:
                cancelled = error  # what has happened is written first; then the cancellation goes on its way
                give_up_at = min(give_up_at, self._clock.monotonic() + _GRACE_SECONDS)
            except FenceLost:
                signal = Lost() if lost is None else await lost(attempt > 1)
                if signal is None:
                    break
                raise signal from None
            except Exception as error:
                if cancelled is not None and self._clock.monotonic() > give_up_at:
                    raise cancelled from error
                try:
                    await self.back_off(error, attempt)
                except asyncio.CancelledError as interrupted:
                    cancelled = interrupted
                    give_up_at = min(give_up_at, self._clock.monotonic() + _GRACE_SECONDS)
        if cancelled is not None:
            raise cancelled

    async def back_off(self, error: Exception, attempt: int) -> None:
        """Wait before a write or read is repeated."""
        if not worth_repeating(error):
            msg = f"the history cannot be written: {type(error).__name__}: {error}"
            raise Parked(msg) from error
        if attempt == 1:
            _log.warning("run %s: the history could not be written and will be again: %s", self._run_id, error)
        await self._clock.sleep(_BACKOFF(RetryState(attempt, Outcome.of_error(error), 0.0)))
