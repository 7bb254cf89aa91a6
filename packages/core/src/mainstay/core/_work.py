"""The tasks of an App: each has one owner, which logs its crash at once and does not end before it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

from mainstay.core.clock import Clock
from mainstay.core.drain import Drain
from mainstay.core.tasks import cancelled_from_outside, spawn

_log = logging.getLogger("mainstay.core")

Work = Callable[[Drain], Awaitable[None]]
"""Work in the background of an App.

When its drain begins it takes nothing new, finishes what it has, and returns; at the end of the drain time it is
cancelled.
"""

_GRACE_SECONDS = 5.0  # how long a cancelled task may take to end


class Crew:
    """The tasks that begin and end together: those of one module, or those that serve.

    Args:
        clock: what their drains pause by.
        crashed: told at once about a task that ended before its drain began, and how.
    """

    def __init__(self, clock: Clock, crashed: Callable[[str, BaseException], None]) -> None:
        self._clock = clock
        self._crashed = crashed
        self._tasks: dict[asyncio.Task[None], Drain] = {}

    def start(self, name: str, work: Work) -> None:
        """Run `work` in a task of its own, with an empty context."""
        drain = Drain(self._clock)
        self._tasks[spawn(self._run(name, work, drain), name=name)] = drain

    async def _run(self, name: str, work: Work, drain: Drain) -> None:
        try:
            await work(drain)
            if drain.begun:
                return
            msg = f"{name} returned although its drain had not begun"
            raise RuntimeError(msg)
        except BaseException as error:
            if drain.begun and cancelled_from_outside(error):
                raise  # the end of the drain time; before it, a cancellation is a crash like any other
            _log.critical("%s stopped: the App no longer does all of its work", name, exc_info=error)
            self._crashed(name, error)

    async def cancel(self) -> list[str]:
        """End the tasks at once; the names of those that have not ended a short while after that."""
        return await ended(list(self._tasks), _GRACE_SECONDS)

    async def end(self, seconds: float) -> list[str]:
        """Drain for `seconds`, then cancel; the names of the tasks that have not ended a short while after that.

        None is left running without being named, also when this wait itself is cancelled.
        """
        tasks = list(self._tasks)
        for drain in self._tasks.values():
            drain.begin()
        stuck: list[str] = []
        try:
            if tasks:
                _, late = await asyncio.wait(tasks, timeout=seconds)
                for task in late:
                    _log.warning("%s did not finish within %g s and is cancelled", task.get_name(), seconds)
        finally:
            stuck = await ended(tasks, _GRACE_SECONDS)
        return stuck


@asynccontextmanager
async def ended_by(event: asyncio.Event) -> AsyncGenerator[None, None]:
    """Cancel the block when the event is set; the code behind the block goes on either way."""

    async def wait() -> None:
        await event.wait()
        limit.reschedule(asyncio.get_running_loop().time())

    limit = asyncio.timeout(None)
    try:
        async with limit:
            waiting = spawn(wait(), name="mainstay.core end of the start")
            try:
                yield
                await asyncio.sleep(0)  # takes a cancellation that came too late, which would end what comes next
            finally:
                waiting.cancel()
    except TimeoutError:
        if not limit.expired():
            raise


async def ended(tasks: list[asyncio.Task[None]], seconds: float) -> list[str]:
    """Cancel `tasks`; the names of those that have not ended after `seconds`, each of which is logged."""
    for task in tasks:
        task.cancel()
    if not any(not task.done() for task in tasks):
        return []
    _, stuck = await asyncio.wait(tasks, timeout=seconds)
    for task in stuck:
        where = _where(task)
        _log.error("%s does not end, although it was cancelled %g s ago: it is at %s", task.get_name(), seconds, where)
    return sorted(task.get_name() for task in stuck)


def _where(task: asyncio.Task[None]) -> str:
    frames = task.get_stack(limit=1)
    return f"{frames[-1].f_code.co_filename}:{frames[-1].f_lineno}" if frames else "an unknown place"
