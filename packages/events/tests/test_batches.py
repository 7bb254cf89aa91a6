"""Batch handlers: what is handed over together, in which order, and what becomes of a batch that fails."""

import asyncio
import gc
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from mainstay.core import Context, FullJitter, MainstayError, Retry, current
from mainstay.core.testing import VirtualClock, eventually
from mainstay.events import Event, EventRouter, Metadata
from mainstay.events._batches import Gathering
from mainstay.events._delivery import Assignment, Delivery
from mainstay.events._dispatch import Dispatcher
from mainstay.events._failure import Failures
from mainstay.events._routes import Batching, Route
from mainstay.events._transport import LogRecord
from mainstay.events.testing import in_memory
from packages.events.tests.test_dispatch import Made, record


class Other(Event, type="dispatch.other", version="1.0", key="name"):
    name: str
    number: int


def other(name: str, number: int) -> LogRecord:
    """A record of the type that has a handler for single events."""
    made = record(name, number)
    return made._replace(headers=[("ce_type", b"dispatch.other"), ("ce_dataversion", b"1.0"), *made.headers[2:]])


Handle = Callable[[list[Any], list[Metadata]], Any]


class Bench:
    """A dispatcher with a handler of batches of `Made` and one of single events `Other`."""

    def __init__(
        self,
        handle: Handle | None = None,
        *,
        size: int = 3,
        wait_seconds: float = 1.0,
        by_key: bool = False,
        concurrency: int = 4,
        retry: Retry | None = None,
        handle_other: Callable[[Other], Any] | None = None,
        kind: type[Event] = Made,
    ) -> None:
        self.clock = VirtualClock()
        self.called: list[list[int]] = []
        self.seen: list[int] = []
        self.buried: list[tuple[int, int, str]] = []
        self.given = handle
        self.given_other = handle_other
        policy = Retry(attempts=3, wait=FullJitter(1.0, 1.0)) if retry is None else retry
        batching = Batching(self._handle, size, wait_seconds, by_key)
        self.routes = {"dispatch.made": Route("dispatch.made", "g"), "dispatch.other": Route("dispatch.other", "g")}
        self.routes["dispatch.made"].reads(
            kind, batching.alone, wants_metadata=True, retry=policy, batching=batching
        )  # fmt: skip
        self.routes["dispatch.other"].reads(Other, self._handle_other, wants_metadata=False, retry=policy)
        failures = Failures("g", bury=self._bury, clock=self.clock)
        self.dispatcher = Dispatcher(
            "g", self.routes, concurrency=concurrency, failures=failures, clock=self.clock
        )  # fmt: skip

    async def _handle(self, events: list[Made], metas: list[Metadata]) -> None:
        self.called.append([event.number for event in events])
        if self.given is not None:
            await self.given(events, metas)
        self.seen += [event.number for event in events]

    async def _handle_other(self, event: Other) -> None:
        if self.given_other is not None:
            await self.given_other(event)
        self.seen.append(event.number)

    async def _bury(self, delivery: Delivery, error: Exception) -> None:
        self.buried.append((delivery.record.offset, delivery.attempt, str(error)))
        self.seen.append(delivery.record.offset)

    async def settled(self, *assignments: Assignment) -> None:
        """Let time pass until all of them is finished, and stop."""
        for _ in range(10_000):
            if not any(each.window for each in assignments):
                break
            for _turn in range(20):
                await asyncio.sleep(0)
            self.dispatcher.check()
            await self.clock.advance(0.5)
        assert not any(each.window or each.busy for each in assignments)
        await self.dispatcher.stop()


@pytest.fixture
def partition() -> Assignment:
    """A partition."""
    return Assignment("dispatch", 0)


def fails_at(*bad: int) -> Handle:
    """A handler that cannot do with some events."""

    async def handle(events: list[Made], _metas: list[Metadata]) -> None:
        if any(event.number in bad for event in events):
            msg = "one of these"
            raise RuntimeError(msg)

    return handle


async def test_a_full_batch_is_handed_over_at_once_and_the_rest_when_its_time_has_come(partition: Assignment) -> None:
    """Of eight events of a partition, of any keys: three, three, and two after a second."""
    bench = Bench()
    bench.dispatcher.feed(partition, [record(f"k{n % 5}", n) for n in range(8)])
    await eventually(lambda: len(bench.called) == 2)
    assert bench.called == [[0, 1, 2], [3, 4, 5]]
    await bench.clock.advance(0.9)
    assert len(bench.called) == 2
    assert partition.finished is not None
    assert partition.finished.offset == 5
    await bench.clock.advance(0.2)
    await bench.dispatcher.settle([partition], 5)
    assert bench.called[2] == [6, 7]
    await bench.settled(partition)


async def test_by_key_a_batch_has_one_key_and_keys_are_side_by_side(partition: Assignment) -> None:
    """While the first key's batch runs the second's is called."""
    gate = asyncio.Event()

    async def handle(events: list[Made], _metas: list[Metadata]) -> None:
        if events[0].name == "a":
            await gate.wait()

    bench = Bench(handle, by_key=True)
    names = ["a", "b", "a", "b", "a", "b", "a", "b"]
    bench.dispatcher.feed(partition, [record(name, n) for n, name in enumerate(names)])
    await eventually(lambda: bench.called == [[0, 2, 4], [1, 3, 5]])
    await bench.clock.advance(1.0)
    await eventually(lambda: bench.called == [[0, 2, 4], [1, 3, 5], [7]])
    gate.set()
    await bench.settled(partition)
    assert bench.called[3] == [6]


async def test_a_key_keeps_its_order_through_handlers_of_both_kinds(partition: Assignment) -> None:
    """What is for another handler waits for the batch before it, and what follows of its key waits for that."""
    bench = Bench(size=10)
    gate = asyncio.Event()

    async def handle_other(_event: Other) -> None:
        await gate.wait()

    bench.given_other = handle_other
    bench.dispatcher.feed(
        partition, [record("a", 0), other("a", 1), record("a", 2), record("b", 3), other("c", 4), record("c", 5)]
    )
    await bench.clock.advance(1.0)
    await eventually(lambda: bench.called == [[0, 3]])
    await bench.clock.advance(5.0)
    assert bench.called == [[0, 3]]
    gate.set()
    await bench.settled(partition)
    assert bench.called[0] == [0, 3]
    assert sorted(bench.called[1]) == [2, 5]
    assert bench.seen.index(1) < bench.seen.index(2)
    assert bench.seen.index(4) < bench.seen.index(5)


async def test_the_attempts_are_the_batch_s_and_one_that_keeps_failing_is_halved(partition: Assignment) -> None:
    """Only the bad event becomes a dead letter, after all attempts of its own; the others are handled in order."""
    attempts: list[tuple[int, int]] = []
    bench = Bench(size=8)
    bad = fails_at(5)

    async def handle(events: list[Made], metas: list[Metadata]) -> None:
        attempts.append((len(events), metas[0].attempt))
        await bad(events, metas)

    bench.given = handle
    bench.dispatcher.feed(partition, [record(f"k{n}", n) for n in range(10)])
    await bench.settled(partition)
    assert [call for call in attempts if call[0] == 8] == [(8, 1), (8, 2), (8, 3)]
    assert bench.called[3:] == [[0, 1, 2, 3], [4, 5, 6, 7], [4, 5], [4], [5], [5], [5], [6, 7], [8, 9]]
    assert bench.buried == [(5, 3, "one of these")]
    assert bench.seen == [*range(10)]


async def test_an_error_that_is_not_retryable_halves_at_once(partition: Assignment) -> None:
    """As it would end a single event at once."""

    class Final(MainstayError):
        code = "BIZ_FINAL"
        status = 409
        title = "Final"

    async def handle(events: list[Made], _metas: list[Metadata]) -> None:
        if any(event.number == 2 for event in events):
            raise Final

    bench = Bench(handle, size=4)
    bench.dispatcher.feed(partition, [record("a", n) for n in range(4)])
    await bench.settled(partition)
    assert bench.called == [[0, 1, 2, 3], [0, 1], [2, 3], [2], [3]]
    assert [offset for offset, _, _ in bench.buried] == [2]


async def test_an_outage_postpones_a_batch_and_halves_nothing(partition: Assignment) -> None:
    """It costs no attempt, however long it lasts."""

    class Away(MainstayError):
        code = "EXT_AWAY"
        status = 503
        title = "Away"
        retryable = True
        no_effect = True

    async def handle(_events: list[Made], metas: list[Metadata]) -> None:
        assert metas[0].attempt == 1
        if len(bench.called) < 30:
            raise Away

    bench = Bench(handle)
    bench.dispatcher.feed(partition, [record("a", n) for n in range(3)])
    await bench.settled(partition)
    assert bench.called == [[0, 1, 2]] * 30
    assert bench.buried == []


async def test_what_cannot_be_read_is_a_dead_letter_in_the_order_of_its_key(partition: Assignment) -> None:
    """After what is before it, and before what is behind it; it stops no batch."""
    bench = Bench(size=10)
    records = [record("a", 0), record("a", 1)._replace(value=b"{}"), record("a", 2), record("b", 3), record("b", 4)]
    bench.dispatcher.feed(partition, [*records, record("c", 5)._replace(value=b"{}")])
    await bench.settled(partition)
    assert [offset for offset, _, _ in bench.buried] == [5, 1]
    assert bench.called == [[0, 3, 4], [2]]
    assert bench.seen == [5, 0, 3, 4, 1, 2]


async def test_a_batch_works_in_what_the_contexts_of_its_events_have_in_common(partition: Assignment) -> None:
    """The tenant of all is the tenant; the conversations of several are none, and an event alone has its own."""
    contexts: list[Context] = []

    async def handle(_events: list[Made], metas: list[Metadata]) -> None:
        contexts.append(current())
        assert [meta.correlation_id for meta in metas] == [f"c{meta.offset}" for meta in metas]

    bench = Bench(handle, size=2)
    one = [record("a", 0, ce_tenant=b"acme", ce_actor=b"ann"), record("b", 1, ce_tenant=b"acme", ce_actor=b"bob")]
    bench.dispatcher.feed(partition, [*one, record("c", 2, ce_tenant=b"acme")])
    await bench.settled(partition)
    alone = Context("c2", "00000000-0000-0000-0000-000000000002", tenant="acme")
    assert contexts == [Context(tenant="acme"), alone]


async def test_a_stop_hands_over_what_only_waits_for_more(partition: Assignment) -> None:
    """And waits for it; nothing is begun behind it."""
    bench = Bench(wait_seconds=3600.0, by_key=True, concurrency=1)
    bench.dispatcher.feed(partition, [record("a", 0), record("b", 1), record("a", 2)])
    await asyncio.sleep(0)
    assert bench.called == []
    assert await bench.dispatcher.drain([partition], 10)
    assert bench.called == [[0, 2], [1]]
    assert not partition.window
    await bench.dispatcher.stop()


async def test_at_a_stop_a_batch_that_fails_is_left_to_the_next_owner(partition: Assignment) -> None:
    """The drain does not wait for another attempt."""
    bench = Bench(fails_at(1), wait_seconds=3600.0)
    bench.dispatcher.feed(partition, [record("a", 0), record("b", 1)])
    await asyncio.sleep(0)
    assert await bench.dispatcher.drain([partition], 10)
    assert bench.called == [[0, 1]]
    assert [each.offset for each in partition.window] == [0, 1]
    await bench.dispatcher.stop()


async def test_a_full_window_hands_over_what_waits_for_more(partition: Assignment) -> None:
    """Nothing more can come: waiting would be waiting for itself."""
    bench = Bench(size=100, wait_seconds=3600.0)
    bench.dispatcher.feed(partition, [record("a", n) for n in range(5)])
    await asyncio.sleep(0)
    bench.dispatcher.make_room(partition, parks=False)
    await eventually(lambda: bench.called == [[0, 1, 2, 3, 4]])
    await bench.settled(partition)


async def test_batches_take_turns_with_other_partitions(partition: Assignment) -> None:
    """With one caller, a partition with a backlog of batches does not hold back another one's event."""
    bench = Bench(size=10, concurrency=1)
    late = Assignment("dispatch", 1)

    async def handle(_events: list[Made], _metas: list[Metadata]) -> None:
        if len(bench.called) == 2:
            bench.dispatcher.feed(late, [other("z", 999)])
        await asyncio.sleep(0)

    bench.given = handle
    bench.dispatcher.feed(partition, [record(f"k{n % 7}", n) for n in range(500)])
    await bench.settled(partition, late)
    assert len(bench.called) == 50
    assert bench.seen.index(999) <= 40, "two or three batches before it"


async def test_a_lost_partition_takes_its_batch_along(partition: Assignment) -> None:
    """What runs is cancelled and moves nothing; the same events are handled in the new assignment."""
    gate = asyncio.Event()

    async def handle(_events: list[Made], _metas: list[Metadata]) -> None:
        await gate.wait()

    bench = Bench(handle)
    records = [record("a", n) for n in range(5)]
    bench.dispatcher.feed(partition, records)
    await eventually(lambda: bench.called == [[0, 1, 2]])
    await bench.dispatcher.cancel([partition])
    assert partition.finished is None
    again = Assignment("dispatch", 0)
    gate.set()
    bench.dispatcher.feed(again, records)
    await bench.clock.advance(5.0)
    await bench.settled(again)
    assert bench.called == [[0, 1, 2], [0, 1, 2], [3, 4]]


async def test_a_failing_batch_in_a_full_window_is_halved_before_its_attempts_are_over(partition: Assignment) -> None:
    """It would hold back all others for as long as its policy has patience; now one event does, which can be parked."""
    bench = Bench(fails_at(1), size=4, by_key=True, retry=Retry(attempts=1000, wait=lambda _state: 60.0))
    bench.dispatcher.feed(partition, [record("a", n) for n in range(4)])
    await eventually(lambda: bench.called == [[0, 1, 2, 3]])
    for _ in range(3):
        bench.dispatcher.make_room(partition, parks=True)
        for _turn in range(20):
            await asyncio.sleep(0)
    assert bench.called == [[0, 1, 2, 3], [0, 1], [0], [1]]
    await bench.dispatcher.stop()


async def test_in_memory_an_event_and_its_metadata_arrive_in_lists() -> None:
    """Functions with and without metadata, classes, and several types in one list."""
    events = EventRouter()
    seen: dict[str, list[object]] = {"plain": [], "both": [], "class": []}

    @events.on_batch(Made, Other, group="plain", wait_seconds=0.0)
    async def plain(some: list[Made | Other]) -> None:
        seen["plain"] += [f"{type(event).__name__} {event.number}" for event in some]

    @events.on_batch(Made, group="both", wait_seconds=0.0, by="key", size=2)
    async def both(some: Sequence[Made], metas: Sequence[Metadata]) -> None:
        assert len(some) <= 2
        assert len({meta.key for meta in metas}) == 1
        seen["both"] += [f"{event.number} of {meta.group}" for event, meta in zip(some, metas, strict=True)]

    @events.on_batch(Made, group="class", wait_seconds=0.0)
    class Handler:
        async def handle(self, some: list[Made]) -> None:
            seen["class"] += [event.number for event in some]

    async with in_memory(events, partitions=1) as rehearsal:
        await events.publish_batch([Made(name="a", number=1), Other(name="a", number=2), Made(name="a", number=3)])
        await rehearsal.settled()
    assert seen == {"plain": ["Made 1", "Other 2", "Made 3"], "both": ["1 of both", "3 of both"], "class": [1, 3]}


class Planned(NamedTuple):
    """One event of the model."""

    key: str | None
    kind: str
    """`made`, `bad` (its handler always fails), `shaky` (it fails once), `unreadable` or `other`."""


PLANS = st.lists(
    st.builds(
        Planned,
        st.sampled_from(["a", "a", "b", "c", None]),
        st.sampled_from(["made", "made", "made", "bad", "shaky", "unreadable", "other"]),
    ),
    max_size=24,
)


@settings(max_examples=150, deadline=None)
@given(
    plans=PLANS,
    portions=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    size=st.integers(1, 6),
    by_key=st.booleans(),
    wait_seconds=st.sampled_from([0.0, 1.0]),
    concurrency=st.integers(1, 3),
)
def test_model_each_event_ends_once_and_in_the_order_of_its_key(
    *, plans: list[Planned], portions: list[int], size: int, by_key: bool, wait_seconds: float, concurrency: int
) -> None:
    """After any failures and any way of arriving; batches have their size, their key, and one at a time."""

    async def run() -> None:
        failed: set[int] = set()
        running: list[object] = []

        async def handle(events: list[Made], metas: list[Metadata]) -> None:
            numbers = [event.number for event in events]
            assert len(numbers) <= size
            assert numbers == [meta.offset for meta in metas]
            keys = {meta.key for meta in metas}
            place = keys.pop() if by_key else "partition"
            assert not keys or not by_key, "events of several keys"
            assert place not in running, "two batches of one place at once"
            running.append(place)
            await asyncio.sleep(0)
            running.remove(place)
            shaky = {number for number in numbers if plans[number].kind == "shaky"} - failed
            failed.update(shaky)
            if shaky or any(plans[number].kind == "bad" for number in numbers):
                msg = "fails"
                raise RuntimeError(msg)

        bench = Bench(handle, size=size, by_key=by_key, wait_seconds=wait_seconds, concurrency=concurrency)
        records: list[LogRecord] = []
        for number, plan in enumerate(plans):
            made = (other if plan.kind == "other" else record)(plan.key or "", number)
            if plan.kind == "unreadable":
                made = made._replace(value=b"{}")
            records.append(made._replace(key=None if plan.key is None else plan.key.encode()))
        partition = Assignment("dispatch", 0)
        left = records
        for portion in itertools.cycle(portions):
            bench.dispatcher.feed(partition, left[:portion])
            left = left[portion:]
            for _ in range(portion):
                await asyncio.sleep(0)
            if portion == 1:
                await bench.clock.advance(0.4)
            if not left:
                break
        await bench.settled(partition)
        assert sorted(bench.seen) == list(range(len(plans)))
        for key in ("a", "b", "c"):
            of_key = [number for number in bench.seen if plans[number].key == key]
            assert of_key == sorted(of_key), f"the order of {key}"
        if not by_key and all(plan.kind == "made" for plan in plans):
            assert bench.seen == sorted(bench.seen), "the order of the partition"
        dead = [number for number, plan in enumerate(plans) if plan.kind in {"bad", "unreadable"}]
        assert sorted(offset for offset, _, _ in bench.buried) == dead

    asyncio.run(run())


class Lines(Event, type="dispatch.made", version="1.2", key="name"):
    name: str
    number: int
    lines: list[int] = Field(default_factory=lambda: [1, 2, 3])


async def test_each_attempt_has_the_events_as_they_were_published(partition: Assignment) -> None:
    """What a handler changes in an attempt that fails is not seen by the next one, nor in the halves."""
    seen: list[list[list[int]]] = []

    async def handle(events: list[Lines], metas: list[Metadata]) -> None:
        seen.append([list(event.lines) for event in events])
        for event in events:
            event.lines.clear()
        events.reverse()
        metas.clear()
        if len(seen) < 5:
            msg = "after all was taken out"
            raise RuntimeError(msg)

    bench = Bench(handle, size=4, retry=Retry(attempts=2, wait=FullJitter(1.0, 1.0)), kind=Lines)
    bench.dispatcher.feed(partition, [record("a", n) for n in range(4)])
    await bench.settled(partition)
    assert bench.called[:4] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1], [0]]
    assert bench.buried == []
    assert {tuple(lines) for call in seen for lines in call} == {(1, 2, 3)}


async def test_a_partition_that_was_given_up_leaves_no_timer_behind(partition: Assignment) -> None:
    """What waits for an hour would keep a window of events in memory for as long, at each rebalance."""
    bench = Bench(wait_seconds=3600.0, by_key=True)
    bench.dispatcher.feed(partition, [record(f"k{n}", n) for n in range(5)])
    await asyncio.sleep(0)

    def gathered() -> list[object]:
        """What is still there; the partition holds its own records, and nothing else of it."""
        return [each for each in gc.get_objects() if isinstance(each, Gathering) and each.assignment is partition]

    assert len(gathered()) == 5
    await bench.dispatcher.cancel([partition])
    partition.busy.clear()
    gc.collect()
    assert gathered() == []
    await bench.dispatcher.stop()


async def test_a_second_stop_waits_for_no_batch_that_the_first_left_to_the_next_owner(partition: Assignment) -> None:
    """The process stops while its partition moves: what is left of a gathering is not handed over any more."""
    gate, gate_of_other = asyncio.Event(), asyncio.Event()

    async def handle(_events: list[Made], _metas: list[Metadata]) -> None:
        await gate.wait()

    async def handle_other(_event: Other) -> None:
        await gate_of_other.wait()

    bench = Bench(handle, wait_seconds=3600.0, size=2, handle_other=handle_other)
    bench.dispatcher.feed(partition, [other("z", 9), record("a", 0), record("b", 1), record("c", 2)])
    await eventually(lambda: bench.called == [[0, 1]])
    first = asyncio.ensure_future(bench.dispatcher.drain([partition], 60))
    await eventually(lambda: not partition.open)
    gate.set()
    await eventually(lambda: bench.seen == [0, 1])
    second = asyncio.ensure_future(bench.dispatcher.drain([partition], math.inf))
    await asyncio.sleep(0)
    assert not bench.dispatcher._batches.has_last([partition])
    gate_of_other.set()
    assert all(await asyncio.gather(first, second))
    await bench.dispatcher.stop()
