"""Drain, the one way to wait in a loop, and a virtual clock that moves a whole App."""

import asyncio
import math
import threading
from datetime import datetime

import pytest

from mainstay.core import Drain
from mainstay.core.testing import VirtualClock, eventually


async def looks(drain, log, clock, seconds):
    while not drain.begun:
        log.append(clock.monotonic())
        await drain.pause(seconds, wakeable=True)


async def test_a_pause_ends_when_the_drain_begins():
    """A loop that waits for an hour ends at once when it is told to."""
    clock = VirtualClock()
    log: list[float] = []
    drain = Drain(clock)
    async with asyncio.TaskGroup() as group:
        group.create_task(looks(drain, log, clock, 3600))
        waiting = group.create_task(drain.wait())
        await clock.settle()
        assert not waiting.done()
        drain.begin()
    assert log == [0]
    assert drain.begun
    await drain.pause(math.inf)  # and no pause begins after that


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
async def test_a_clock_is_moved_forward_by_a_finite_time(seconds):
    """With anything else it would never stop, or never move again; it stands where it was."""
    clock = VirtualClock()
    with pytest.raises(ValueError, match="cannot be moved"):
        await asyncio.wait_for(clock.advance(seconds), 5)
    with pytest.raises(ValueError, match="cannot be moved"):
        clock.tick(seconds)
    assert clock.monotonic() == 0


def test_a_clock_starts_at_a_moment_with_a_timezone():
    """A naive one would be compared with aware ones, somewhere else and later."""
    with pytest.raises(ValueError, match="tzinfo=UTC"):
        VirtualClock(datetime(2026, 1, 1))  # noqa: DTZ001  the mistake


async def test_a_wake_ends_the_pause_or_the_next_one():
    """A hint that comes while the loop works is not lost."""
    clock = VirtualClock()
    log: list[float] = []
    drain = Drain(clock)
    drain.wake()
    task = asyncio.create_task(looks(drain, log, clock, math.inf))
    await clock.settle()
    assert log == [0, 0]
    drain.wake()
    await clock.settle()
    assert log == [0, 0, 0]
    drain.begin()
    await task


async def test_a_pause_after_a_failure_is_not_cut_short():
    """Otherwise every new event would be a new attempt at a broker that is away; the hint is kept for later."""
    clock = VirtualClock()
    drain = Drain(clock)
    drain.wake()
    pause = asyncio.create_task(drain.pause(5))
    await clock.settle()
    drain.wake()
    await clock.advance(4)
    assert not pause.done()
    await clock.advance(1)
    await pause
    await asyncio.wait_for(drain.pause(math.inf, wakeable=True), 30)


async def test_a_pause_of_no_length_lets_others_run():
    """A loop that never really waits does not keep the event loop for itself."""
    drain = Drain(VirtualClock())
    ran: list[bool] = []
    asyncio.get_running_loop().call_soon(ran.append, True)
    await drain.pause(0)
    assert ran == [True]


async def test_virtual_time_does_not_stop_for_looks_at_a_queue():
    """Fourteen days are not a million polls; at every moment at which something is due, each looks once."""
    clock = VirtualClock()
    log: list[float] = []
    timers: list[float] = []
    drain = Drain(clock)
    task = asyncio.create_task(looks(drain, log, clock, 0.5))
    day = 86_400.0
    clock.call_later(3 * day, lambda: timers.append(clock.monotonic()))
    await clock.advance(14 * day)
    assert log == [0, 3 * day, 14 * day]
    assert timers == [3 * day]
    drain.begin()
    await task


async def test_virtual_time_stands_still_while_real_work_goes_on():
    """A result that comes from a thread arrives before the clock moves on."""
    clock = VirtualClock()
    log: list[tuple[str, float]] = []
    release, working = threading.Event(), [True]

    def work():
        release.wait(30)
        working.clear()
        return "result"

    async def waits():
        log.append((await asyncio.to_thread(work), clock.monotonic()))

    task = asyncio.create_task(waits())
    with clock.held_by(lambda: "the thread" if working else None):
        asyncio.get_running_loop().call_later(0.05, release.set)
        await clock.advance(5)
    await task
    assert log == [("result", 0)]


async def test_work_that_never_ends_is_named(monkeypatch):
    """Rather an error that says what goes on than a test that hangs."""
    monkeypatch.setattr("mainstay.core.testing._PATIENCE_SECONDS", 0.05)
    clock = VirtualClock()
    with clock.held_by(lambda: "a slow query"), pytest.raises(TimeoutError, match="a slow query has gone on for"):
        await clock.advance(1)


async def test_eventually_waits_for_a_condition_and_names_it():
    """It takes plain and async conditions, and gives up in words."""
    answers = iter([False, False, True])

    async def later():
        return next(answers)

    await eventually(later, every_seconds=0)
    with pytest.raises(TimeoutError, match="the moon did not come true within 0 s"):
        await eventually(lambda: False, seconds=0, what="the moon")


async def test_what_falls_due_at_the_last_moment_is_done_too():
    """Work that is woken at the end, and asks for no time at all, is not left waiting."""
    clock = VirtualClock()
    done: list[str] = []
    clock.poll_later(9.5, lambda: clock.call_later(0.0, lambda: done.append("at the end")))
    await clock.advance(10)
    assert done == ["at the end"]
    assert clock.monotonic() == 10
