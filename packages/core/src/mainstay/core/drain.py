"""The way a piece of background work learns that it is to end, and the one way in which it waits."""

from __future__ import annotations

import asyncio

from mainstay.core.clock import SYSTEM_CLOCK, Clock

__all__ = ["Drain"]


class Drain:
    """Handed to background work: says when to end, and pauses it until then.

    Work is a loop over it:

        async def sweep(drain: Drain) -> None:
            while not drain.begun:
                await delete_what_is_old()
                await drain.pause(60.0)

    When the drain has begun, work takes nothing new, finishes what it has and returns; at the end of the drain time it
    is cancelled.

    Args:
        clock: measures the pauses; the App's.
    """

    __slots__ = ("_began", "_clock", "_waiting", "_woken")

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._began = asyncio.Event()
        self._woken = False
        self._waiting: dict[asyncio.Future[None], bool] = {}  # each pause, and whether `wake` ends it

    @property
    def begun(self) -> bool:
        """Whether the work is to end."""
        return self._began.is_set()

    def begin(self) -> None:
        """Tell the work to end. The App calls this; a test that runs work by hand does too."""
        self._began.set()
        for pause in self._waiting:
            _end(pause)

    def wake(self) -> None:
        """End the wakeable pause that is under way, or the next one where there is none: there is something to do."""
        self._woken = True
        for pause, wakeable in self._waiting.items():
            if wakeable:
                _end(pause)

    async def pause(self, seconds: float, *, wakeable: bool = False) -> None:
        """Wait on the App's clock, until the time is up or the drain begins.

        Args:
            seconds: how long at most; `math.inf` for no limit.
            wakeable: whether `wake` ends it too. The pause between looks for work is; the one after a failure is not.
        """
        if self.begun or (wakeable and self._woken) or seconds <= 0:
            self._woken = self._woken and not wakeable
            await asyncio.sleep(0)  # a loop that never really pauses must not keep the others from running
            return
        pause: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = None if seconds == float("inf") else self._clock.poll_later(seconds, lambda: _end(pause))
        self._waiting[pause] = wakeable
        try:
            await pause
        finally:
            del self._waiting[pause]
            self._woken = self._woken and not wakeable
            if timer is not None:
                timer.cancel()

    async def wait(self) -> None:
        """Wait until the drain begins; `wake` does not end this."""
        await self._began.wait()


def _end(pause: asyncio.Future[None]) -> None:
    if not pause.done():
        pause.set_result(None)
