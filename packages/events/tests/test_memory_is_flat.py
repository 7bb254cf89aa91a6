"""What passes through a group leaves nothing behind in memory: many keys, failures and retries in between.

The rows "memory of …: growth from 100,000 events to 1,000,000" of `benchmarks/events` say the same of whole services.
"""

import asyncio
import gc
import tracemalloc
from datetime import UTC, datetime
from uuid import UUID

import pytest

from mainstay.core import SYSTEM_CLOCK, Context, FullJitter, Retry
from mainstay.events import Event
from mainstay.events._delivery import Assignment, Delivery
from mainstay.events._dispatch import Dispatcher
from mainstay.events._failure import Failures
from mainstay.events._routes import Route
from mainstay.events._transport import LogRecord
from mainstay.events.metadata import encode, envelope

EVENTS = 100_000
EARLY = 20_000
BATCH = 500
BYTES = 5
"""What an event may leave behind. A number in a list takes 8, an entry of a dict 100 and more."""


class Passed(Event, type="memory.passed", version="1.0", key="number"):
    number: int


async def _fails_at_times(event: Passed) -> None:
    if not event.number % 100:
        msg = "a hundredth fails"
        raise OSError(msg)


async def test_a_hundred_thousand_events_leave_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    """Each has a key of its own, so that all that is kept for a key would show; so would what is kept for a failure."""
    caplog.set_level("CRITICAL", "mainstay.events")
    buried = 0

    async def bury(_delivery: Delivery, _error: Exception) -> None:
        nonlocal buried
        buried += 1

    route = Route("memory.passed", "flat")
    route.reads(Passed, _fails_at_times, wants_metadata=False, retry=Retry(attempts=2, wait=FullJitter(0.001, 0.001)))
    dispatcher = Dispatcher(
        "flat",
        {"memory.passed": route},
        concurrency=8,
        failures=Failures("flat", bury=bury, clock=SYSTEM_CLOCK),
        clock=SYSTEM_CLOCK,
    )
    assignments = [Assignment("memory", number) for number in range(4)]
    shared = envelope(time=datetime.now(UTC), source="test", context=Context())
    headers = encode(Passed(number=0), id=str(UUID(int=0)), topic="memory", shared=shared).headers

    def record(number: int) -> LogRecord:
        text = b"%d" % number
        return LogRecord("memory", number % 4, number, text, b'{"number":%s}' % text, headers)

    async def passed(start: int, end: int) -> int:
        for first in range(start, end, BATCH):
            batch = [record(number) for number in range(first, first + BATCH)]
            for number, assignment in enumerate(assignments):
                dispatcher.feed(assignment, batch[number::4])
            await dispatcher.settle(assignments, None)
        del batch
        await asyncio.sleep(0)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        early = await passed(0, EARLY)
        grown = await passed(EARLY, EVENTS) - early
    finally:
        tracemalloc.stop()
        await dispatcher.stop()
    assert buried == EVENTS // 100
    assert grown < BYTES * (EVENTS - EARLY), f"{grown / (EVENTS - EARLY):.1f} bytes an event are left behind"
