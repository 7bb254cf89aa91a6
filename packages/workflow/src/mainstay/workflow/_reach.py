"""A cancellation that ends a step's code at once, where the step says `cancellable=True`.

The code is executed in the task of the run's function, so it is cancelled there as `asyncio.timeout` does it: the task
is cancelled, and the cancellation is taken back where the step's code ends. So it ends nothing but the attempt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


class Interrupted(Exception):
    """The end of an attempt whose code was cancelled with its run."""

    def __init__(self) -> None:
        super().__init__("the run was cancelled or ended while it was executed")


class Reach:
    """The attempts of one execution that a cancellation ends at once."""

    def __init__(self) -> None:
        self._attempts: set[_Attempt] = set()

    def interrupt(self) -> None:
        """Cancel what is being executed."""
        loop = asyncio.get_running_loop()
        for attempt in self._attempts:
            # Called later, and so between two steps of the task: the step itself may be the one that cancels its run.
            loop.call_soon(attempt.interrupt)

    async def within(self, call: Callable[[], Awaitable[T]]) -> T:
        """Await an attempt.

        Raises:
            Interrupted: its run was cancelled meanwhile.
        """
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  a coroutine of ours is awaited in one
        attempt = _Attempt(task)
        self._attempts.add(attempt)
        try:
            return await call()
        except asyncio.CancelledError as error:
            if attempt.end() == attempt.cancelled_before:
                raise Interrupted from error
            raise
        finally:
            attempt.end()
            self._attempts.discard(attempt)


class _Attempt:
    def __init__(self, task: asyncio.Task[object]) -> None:
        self.cancelled_before = task.cancelling()
        self._task = task
        self._going_on = True
        self._interrupted = False

    def interrupt(self) -> None:
        if self._going_on and not self._interrupted:
            self._interrupted = True
            self._task.cancel()

    def end(self) -> int:
        """Take the cancellation back; -1 where there was none, else how many others there are of the task."""
        interrupted, self._interrupted, self._going_on = self._interrupted, False, False
        return self._task.uncancel() if interrupted else -1
