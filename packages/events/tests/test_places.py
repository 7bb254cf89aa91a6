"""Handlers with few places, and handlers that care for no order."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from mainstay.core import FullJitter, Retry
from mainstay.core.testing import VirtualClock, eventually
from mainstay.events import Event
from mainstay.events._delivery import Assignment, Delivery
from mainstay.events._dispatch import Dispatcher
from mainstay.events._failure import Failures
from mainstay.events._routes import Limits, Route
from packages.events.tests.test_batches import other
from packages.events.tests.test_dispatch import Made, record


class Other(Event, type="dispatch.other", version="1.0", key="name"):
    name: str
    number: int


class Bench:
    """A dispatcher whose handler of `Made` has limits, and whose handler of `Other` has none."""

    def __init__(
        self,
        handle: Callable[[Made], Any],
        limits: Limits,
        *,
        handle_other: Callable[[Other], Any] | None = None,
        concurrency: int = 10,
    ) -> None:
        self.clock = VirtualClock()
        self.running = self.most = 0
        self.seen: list[int] = []
        self._given, self._given_other = handle, handle_other
        routes = {"dispatch.made": Route("dispatch.made", "g"), "dispatch.other": Route("dispatch.other", "g")}
        retry = Retry(attempts=2, wait=FullJitter(1.0, 1.0))
        routes["dispatch.made"].reads(Made, self._handle, wants_metadata=False, retry=retry, limits=limits)
        routes["dispatch.other"].reads(Other, self._handle_other, wants_metadata=False, retry=retry)
        failures = Failures("g", bury=self._bury, clock=self.clock)
        self.dispatcher = Dispatcher("g", routes, concurrency=concurrency, failures=failures, clock=self.clock)

    async def _handle(self, event: Made) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self._given(event)
        finally:
            self.running -= 1
        self.seen.append(event.number)

    async def _handle_other(self, event: Other) -> None:
        if self._given_other is not None:
            await self._given_other(event)
        self.seen.append(event.number)

    async def _bury(self, delivery: Delivery, _error: Exception) -> None:
        self.seen.append(delivery.record.offset)


@pytest.fixture
def partition() -> Assignment:
    """A partition."""
    return Assignment("dispatch", 0)


async def test_a_handler_with_few_places_leaves_the_callers_to_others(partition: Assignment) -> None:
    """Two of its twenty events run, eight callers are free, and those without a place keep their order by key."""
    gate = asyncio.Event()

    async def handle(_event: Made) -> None:
        await gate.wait()

    bench = Bench(handle, Limits(2, in_order=True))
    mine = [record(f"k{n % 7}", n) for n in range(20)]
    bench.dispatcher.feed(partition, [*mine, *(other(f"o{n}", n) for n in range(20, 30))])
    await eventually(lambda: bench.seen == list(range(20, 30)))
    assert bench.running == 2
    gate.set()
    assert await bench.dispatcher.settle([partition], None)
    assert bench.most == 2
    for key in range(7):
        assert [n for n in bench.seen if n % 7 == key and n < 20] == list(range(key, 20, 7))
    await bench.dispatcher.stop()


async def test_what_waits_for_its_next_attempt_has_no_place(partition: Assignment) -> None:
    """Nor does what was cancelled with its partition keep one."""
    never = asyncio.Event()

    async def handle(event: Made) -> None:
        if event.number == 0:
            msg = "never"
            raise RuntimeError(msg)
        if event.number == 2:
            await never.wait()

    bench = Bench(handle, Limits(1, in_order=True))
    bench.dispatcher.feed(partition, [record("a", 0), record("b", 1), record("c", 2), record("d", 3)])
    await eventually(lambda: bench.seen == [1] and bench.running == 1)
    await bench.dispatcher.cancel([partition])
    again = Assignment("dispatch", 0)
    bench.dispatcher.feed(again, [record("d", 3), record("e", 4)])
    assert await bench.dispatcher.settle([again], None)
    assert bench.seen == [1, 3, 4]
    await bench.dispatcher.stop()


async def test_without_order_equal_keys_are_side_by_side(partition: Assignment) -> None:
    """Also with what is tried again, and no more than the places; what was finished can be committed."""
    gate = asyncio.Event()

    async def handle(event: Made) -> None:
        if event.number == 1:
            msg = "always"
            raise RuntimeError(msg)
        await gate.wait()

    bench = Bench(handle, Limits(3, in_order=False))
    bench.dispatcher.feed(partition, [record("a", n) for n in range(6)])
    await eventually(lambda: bench.running == 3)
    gate.set()
    await eventually(lambda: sorted(bench.seen) == [0, 2, 3, 4, 5])
    assert partition.finished is not None
    assert partition.finished.offset == 0
    await bench.clock.advance(1.0)
    assert await bench.dispatcher.settle([partition], None)
    assert bench.most == 3
    assert bench.seen[5] == 1
    assert partition.finished.offset == 5
    assert not partition.busy
    await bench.dispatcher.stop()


async def test_an_event_of_a_handler_with_order_waits_for_those_with_it(partition: Assignment) -> None:
    """The others have given their order up, it has not."""
    gate = asyncio.Event()

    async def handle(_event: Made) -> None:
        await gate.wait()

    bench = Bench(handle, Limits(None, in_order=False))
    bench.dispatcher.feed(partition, [other("a", 0), record("a", 1), other("a", 2), other("a", 3), record("a", 4)])
    await eventually(lambda: bench.seen == [0, 2, 3])
    assert bench.running == 2
    gate.set()
    assert await bench.dispatcher.settle([partition], None)
    await bench.dispatcher.stop()


async def test_a_place_that_is_offered_to_a_lost_partition_is_offered_to_the_next(partition: Assignment) -> None:
    """Otherwise the next would wait until another event of this handler has come and gone, perhaps for ever."""
    gates = [asyncio.Event() for _ in range(3)]
    busy = asyncio.Event()

    async def handle(event: Made) -> None:
        await gates[event.number].wait()

    async def handle_other(_event: object) -> None:
        await busy.wait()

    bench = Bench(handle, Limits(1, in_order=True), handle_other=handle_other, concurrency=2)
    lost = Assignment("dispatch", 1)
    bench.dispatcher.feed(partition, [record("a", 0), other("a", 3)])
    await eventually(lambda: bench.running == 1)
    bench.dispatcher.feed(lost, [record("b", 1)])
    await eventually(lambda: not lost.unread)
    bench.dispatcher.feed(partition, [record("c", 2)])
    await eventually(lambda: not partition.unread)
    bench.dispatcher.feed(partition, [other("d", 4)])
    await eventually(lambda: not partition.unread)
    gates[0].set()  # the place is free, and no caller is: one goes on with the key, the other is busy
    await eventually(lambda: bench.seen == [0])
    await bench.dispatcher.cancel([lost])
    busy.set()
    gates[2].set()
    await eventually(lambda: sorted(bench.seen) == [0, 2, 3, 4])
    await bench.dispatcher.stop()


async def test_what_waits_for_a_place_is_called_before_what_came_later(partition: Assignment) -> None:
    """A key with a backlog does not keep the place for itself."""
    gate = asyncio.Event()

    async def handle(_event: Made) -> None:
        await gate.wait()

    bench = Bench(handle, Limits(1, in_order=True))
    hot = [record("hot", n) for n in range(10)]
    bench.dispatcher.feed(partition, [*hot, record("cold", 10), record("cool", 11)])
    await eventually(lambda: bench.running == 1)
    gate.set()
    assert await bench.dispatcher.settle([partition], None)
    assert bench.seen[:4] == [0, 10, 11, 1]
    await bench.dispatcher.stop()
