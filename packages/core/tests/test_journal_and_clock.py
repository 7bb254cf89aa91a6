"""The journal seam and the clocks."""

import asyncio
from datetime import UTC, datetime

import pytest

from mainstay.core import SYSTEM_CLOCK, bind_journal, once
from mainstay.core.testing import VirtualClock


async def test_outside_a_run_an_effect_simply_runs():
    """There is no key to derive ids from, and errors come through."""
    keys = []

    async def effect(key):
        keys.append(key)

    await once("publish:x", effect, transactional=True)
    assert keys == [None]


async def test_inside_a_run_the_journal_decides():
    """The journal gets all that there is to know of an effect; unbinding hides it from step code."""

    class Recording:
        def __init__(self):
            self.names = []

        async def once(self, name, effect, *, transactional, arguments=None):
            self.names.append((name, transactional, arguments and arguments()))
            await effect(f"run-1:{name}")

    journal, keys = Recording(), []

    async def effect(key):
        keys.append(key)

    with bind_journal(journal):
        await once("a", effect, transactional=False, arguments=lambda: 7)
        with bind_journal(None):
            await once("b", effect, transactional=True)
    await once("c", effect, transactional=True)
    assert journal.names == [("a", False, 7)]
    assert keys == ["run-1:a", None, None]


async def test_the_system_clock_tells_the_time():
    """Wall time is aware and in UTC; monotonic time moves with sleep, block and timers."""
    assert SYSTEM_CLOCK.now().tzinfo is UTC
    before = SYSTEM_CLOCK.monotonic()
    await SYSTEM_CLOCK.sleep(0.002)
    SYSTEM_CLOCK.block(0.002)
    fired = asyncio.Event()
    SYSTEM_CLOCK.call_later(0.002, fired.set)
    await fired.wait()
    assert SYSTEM_CLOCK.monotonic() - before >= 0.006


async def test_virtual_time_moves_only_when_told():
    """Sleepers wake in the order of their times, also those that sleep again on the way."""
    clock, log = VirtualClock(datetime(2030, 1, 1, tzinfo=UTC)), []

    async def sleeper(name, *naps):
        for nap in naps:
            await clock.sleep(nap)
            log.append((name, clock.monotonic()))

    async with asyncio.TaskGroup() as group:
        group.create_task(sleeper("a", 2, 2))
        group.create_task(sleeper("b", 3, 0))
        await clock.advance(2.5)
        assert log == [("a", 2)]
        await clock.advance(2.5)
    assert log == [("a", 2), ("b", 3), ("b", 3), ("a", 4)]
    assert clock.now() == datetime(2030, 1, 1, 0, 0, 5, tzinfo=UTC)
    clock.block(1)
    assert clock.monotonic() == 6


async def test_a_cancelled_timer_never_fires():
    """Neither a cancelled callback nor a cancelled sleeper comes back."""
    clock, log = VirtualClock(), []
    clock.call_later(1, lambda: log.append("late")).cancel()
    task = asyncio.create_task(clock.sleep(1))
    await clock.advance(0.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await clock.advance(5)
    assert log == []
