"""The dispatcher and what may be committed, without a transport.

Trap 14, what dispatching costs beyond validating and calling, is a benchmark and no test: the row "dispatch: order by
key, safe commits, context, metrics" of `benchmarks/events`.
"""

import asyncio
import contextvars
from typing import Any

import pytest

from mainstay.core import Context, FullJitter, MainstayError, Retry, current
from mainstay.core.testing import VirtualClock, eventually
from mainstay.events import DecodeError, Event, Metadata
from mainstay.events._delivery import Assignment, Delivery
from mainstay.events._dispatch import Dispatcher
from mainstay.events._failure import Failures
from mainstay.events._routes import Route
from mainstay.events._transport import LogRecord
from mainstay.events.metadata import encode, envelope

LEFT: contextvars.ContextVar[str] = contextvars.ContextVar("left")


class Made(Event, type="dispatch.made", version="1.2", key="name"):
    name: str
    number: int


def record(
    name: str, number: int, *, offset: int | None = None, key: bytes | None = b"", **headers: bytes
) -> LogRecord:
    """A record as a transport hands it out."""
    from datetime import UTC, datetime
    from uuid import UUID

    shared = envelope(time=datetime.now(UTC), source="test", context=Context(correlation_id=f"c{number}"))
    out = encode(Made(name=name, number=number), id=str(UUID(int=number)), topic="dispatch", shared=shared)
    named = [(header, headers.pop(header, value)) for header, value in out.headers]
    return LogRecord(
        "dispatch", 0, number if offset is None else offset, out.key if key == b"" else key, out.value,
        [*named, *headers.items()],
    )  # fmt: skip


class Bench:
    """A dispatcher with one handler."""

    def __init__(
        self, handler: Any, *, retry: Retry | None = None, concurrency: int = 4, metadata: bool = False
    ) -> None:
        self.clock = VirtualClock()
        self.buried: list[tuple[Delivery, Exception]] = []
        self.burying_fails = 0
        self.route = Route("dispatch.made", "g")
        policy = Retry(attempts=3, wait=FullJitter(1.0, 1.0)) if retry is None else retry
        self.route.reads(Made, handler, wants_metadata=metadata, retry=policy)
        failures = Failures("g", bury=self._bury, clock=self.clock)
        self.dispatcher = Dispatcher(
            "g", {"dispatch.made": self.route}, concurrency=concurrency, failures=failures, clock=self.clock
        )

    async def _bury(self, delivery: Delivery, error: Exception) -> None:
        if self.burying_fails:
            self.burying_fails -= 1
            msg = "nowhere to put it"
            raise OSError(msg)
        self.buried.append((delivery, error))


@pytest.fixture
def assignment() -> Assignment:
    """A partition."""
    return Assignment("dispatch", 0)


async def test_trap_02_the_lowest_unfinished_bounds_the_commit_also_over_holes(assignment: Assignment) -> None:
    """Offsets have holes, and the second finishes first: only what lies before the unfinished is committed."""
    gates = {10: asyncio.Event(), 20: asyncio.Event(), 37: asyncio.Event()}

    async def handle(event: Made) -> None:
        await gates[event.number].wait()

    bench = Bench(handle)
    bench.dispatcher.feed(assignment, [record(f"k{n}", n) for n in (10, 20, 37)])
    gates[20].set()
    await bench.dispatcher.progress(5)
    assert assignment.finished is None
    gates[10].set()
    await bench.dispatcher.progress(5)
    assert assignment.finished is not None
    assert assignment.finished.offset == 20
    gates[37].set()
    await bench.dispatcher.settle([assignment], 5)
    assert assignment.finished.offset == 37
    await bench.dispatcher.stop()


async def test_trap_03_work_from_before_a_partition_was_lost_does_not_move_the_new_assignment(
    assignment: Assignment,
) -> None:
    """While old work still runs the partition comes back: neither its end moves the new window, nor its keys wait."""
    gates = {number: asyncio.Event() for number in (5, 6, 7, 9)}

    begun: list[int] = []
    seen: list[int] = []

    async def handle(event: Made) -> None:
        begun.append(event.number)
        await gates[event.number].wait()
        seen.append(event.number)

    bench = Bench(handle)
    bench.dispatcher.feed(assignment, [record("a", 5), record("b", 6)])
    await eventually(lambda: begun == [5, 6])
    assignment.open = False
    again = Assignment("dispatch", 0)
    bench.dispatcher.feed(again, [record("a", 7), record("b", 9)])
    gates[9].set()
    await eventually(lambda: 9 in seen)
    gates[6].set()
    await eventually(lambda: 6 in seen)
    assert again.finished is None, "7 is in flight"
    gates[7].set()
    await eventually(lambda: not again.window)
    assert again.finished is not None
    assert again.finished.offset == 9
    gates[5].set()
    await eventually(lambda: not assignment.window)
    assert again.finished.offset == 9, "the old 5 must not rewind it"
    await bench.dispatcher.stop()


async def test_a_retry_waits_in_a_timer_and_holds_back_its_key_only(assignment: Assignment) -> None:
    """With one worker, a key that waits for its retry leaves the worker to the others, and keeps its own order."""
    seen: list[tuple[str, int, int]] = []

    async def handle(event: Made, meta: Metadata) -> None:
        seen.append((event.name, event.number, meta.attempt))
        if event.number == 0 and meta.attempt < 3:
            msg = "not yet"
            raise RuntimeError(msg)

    bench = Bench(handle, concurrency=1, metadata=True)
    bench.dispatcher.feed(assignment, [record("a", 0), record("a", 1), record("b", 2), record("b", 3)])
    await eventually(lambda: len(seen) == 3)
    assert seen == [("a", 0, 1), ("b", 2, 1), ("b", 3, 1)]
    await bench.clock.advance(1.0)
    await bench.clock.advance(1.0)
    await bench.dispatcher.settle([assignment], 5)
    assert seen[3:] == [("a", 0, 2), ("a", 0, 3), ("a", 1, 1)]
    await bench.dispatcher.stop()


async def test_trap_06_a_dead_letter_is_durable_before_its_event_counts_as_finished(assignment: Assignment) -> None:
    """While the dead letter cannot be stored nothing behind it of its key runs, and nothing may be committed."""
    seen: list[int] = []

    async def handle(event: Made) -> None:
        seen.append(event.number)
        if event.number == 0:
            msg = "never"
            raise RuntimeError(msg)

    bench = Bench(handle, retry=Retry(attempts=1))
    bench.burying_fails = 2
    bench.dispatcher.feed(assignment, [record("a", 0), record("a", 1)])
    await eventually(lambda: bench.burying_fails == 1)
    await bench.clock.advance(1.0)
    await eventually(lambda: bench.burying_fails == 0)
    assert assignment.finished is None
    assert seen == [0], "the handler is not called again, and the next waits"
    await bench.clock.advance(2.0)
    await bench.dispatcher.settle([assignment], 5)
    assert seen == [0, 1]
    assert [str(error) for _, error in bench.buried] == ["never"]
    await bench.dispatcher.stop()


async def test_what_certainly_did_not_happen_and_will_pass_costs_no_attempt(assignment: Assignment) -> None:
    """An open breaker or a database that is away postpones an event as long as it takes, by the error's own hint."""

    class Away(MainstayError):
        code = "EXT_AWAY"
        status = 503
        title = "Away"
        retryable = True
        no_effect = True
        retry_after_seconds = 7.0

    outage = 20
    attempts: list[int] = []

    async def handle(event: Made, meta: Metadata) -> None:
        attempts.append(meta.attempt)
        if len(attempts) <= outage:
            raise Away

    bench = Bench(handle, retry=Retry(attempts=2, wait=FullJitter(0.1, 0.1)), metadata=True)
    bench.dispatcher.feed(assignment, [record("a", 0)])
    await eventually(lambda: len(attempts) == 1)
    await bench.clock.advance(6.9)
    assert len(attempts) == 1
    for _ in range(outage):
        await bench.clock.advance(7.0)
    await bench.dispatcher.settle([assignment], 5)
    assert attempts == [1] * (outage + 1)
    assert bench.buried == []
    await bench.dispatcher.stop()


async def test_an_error_that_is_not_retryable_is_not_tried_again(assignment: Assignment) -> None:
    """The default policy asks the error."""

    class Final(MainstayError):
        code = "BIZ_FINAL"
        status = 409
        title = "Final"

    calls = 0

    async def handle(event: Made) -> None:
        nonlocal calls
        calls += 1
        raise Final

    bench = Bench(handle)
    bench.dispatcher.feed(assignment, [record("a", 0)])
    await bench.dispatcher.settle([assignment], 5)
    assert calls == 1
    assert isinstance(bench.buried[0][1], Final)
    await bench.dispatcher.stop()


async def test_a_cancellation_from_inside_a_handler_is_its_failure(assignment: Assignment) -> None:
    """A handler that awaits something cancelled, or cancels its own task, fails; the worker lives on."""
    seen: list[int] = []

    async def handle(event: Made) -> None:
        if event.number == 0:
            raise asyncio.CancelledError
        if event.number == 1:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)
        seen.append(event.number)

    bench = Bench(handle, retry=Retry(attempts=1), concurrency=1)
    bench.dispatcher.feed(assignment, [record("a", number) for number in range(4)])
    await bench.dispatcher.settle([assignment], 5)
    assert seen == [2, 3]
    assert all("cancelled from inside" in str(error) for _, error in bench.buried)
    await bench.dispatcher.stop()


async def test_a_group_of_errors_with_a_cancellation_is_a_failure(assignment: Assignment) -> None:
    """It is no `Exception`, and ends no caller all the same."""
    seen: list[int] = []

    async def handle(event: Made) -> None:
        if event.number == 0:
            msg = "two"
            raise BaseExceptionGroup(msg, [asyncio.CancelledError(), ValueError("wrong")])
        seen.append(event.number)

    bench = Bench(handle, retry=Retry(attempts=1), concurrency=1)
    bench.dispatcher.feed(assignment, [record("a", number) for number in range(3)])
    await bench.dispatcher.settle([assignment], 5)
    assert seen == [1, 2]
    ((_, error),) = bench.buried
    assert isinstance(error.__cause__, BaseExceptionGroup)
    await bench.dispatcher.stop()


async def test_every_event_gets_its_own_context(assignment: Assignment) -> None:
    """Correlation is carried on, the cause is the event, and what a handler leaves in a variable reaches nobody."""
    contexts: list[Context] = []
    left: list[str] = []

    async def handle(event: Made) -> None:
        contexts.append(current())
        left.append(LEFT.get("nothing"))
        LEFT.set(f"by {event.number}")

    bench = Bench(handle, concurrency=1)
    bench.dispatcher.feed(assignment, [record("same", number) for number in range(3)])
    await bench.dispatcher.settle([assignment], 5)
    assert left == ["nothing"] * 3
    assert [context.correlation_id for context in contexts] == ["c0", "c1", "c2"]
    assert [context.causation_id for context in contexts] == [
        f"00000000-0000-0000-0000-00000000000{n}" for n in range(3)
    ]
    await bench.dispatcher.stop()


async def test_malformed_context_is_dropped_not_believed(assignment: Assignment) -> None:
    """Ids with line breaks, or longer than ids are, do not get into logs."""
    contexts: list[Context] = []

    async def handle(event: Made) -> None:
        contexts.append(current())

    bench = Bench(handle, concurrency=1)
    bench.dispatcher.feed(
        assignment,
        [
            record("a", 0, ce_correlationid=b"two\nlines"),
            record("a", 1, ce_correlationid=b"x" * 129),
            record("a", 2, ce_actor=b"ann", ce_tenant=b"not\x00so", ce_id=b"\xff"),
        ],
    )
    await bench.dispatcher.settle([assignment], 5)
    assert contexts[0].correlation_id is None
    assert contexts[1].correlation_id is None
    assert contexts[2] == Context(correlation_id="c2", actor="ann")
    await bench.dispatcher.stop()


async def test_an_unreadable_event_names_the_field_and_never_the_value(assignment: Assignment) -> None:
    """The dead letter says what is wrong; the value may be anybody's secret."""

    async def handle(event: Made) -> None:
        raise AssertionError

    bench = Bench(handle)
    bench.dispatcher.feed(
        assignment,
        [
            record("a", 0)._replace(value=b'{"name": "hunter2", "number": "hunter2"}'),
            record("a", 1)._replace(value=None),
            record("a", 2, ce_dataversion=b"3.0"),
            record("a", 3)._replace(headers=[]),
        ],
    )
    await bench.dispatcher.settle([assignment], 5)
    errors = [str(error) for _, error in bench.buried]
    assert errors[0].startswith("dispatch.made cannot be read: number: ")
    assert "hunter2" not in errors[0]
    assert all(isinstance(error, DecodeError) for _, error in bench.buried)
    assert "has version '3.0'; this group reads 1.x" in errors[2]
    assert "no header ce_type" in errors[3]
    await bench.dispatcher.stop()


async def test_a_drain_starts_nothing_more_and_waits_for_what_runs(assignment: Assignment) -> None:
    """Of a hundred events the one that runs is finished; the others are left for the next owner."""
    gate = asyncio.Event()
    seen: list[int] = []

    async def handle(event: Made) -> None:
        await gate.wait()
        seen.append(event.number)

    bench = Bench(handle, concurrency=1)
    bench.dispatcher.feed(assignment, [record(f"k{number}", number) for number in range(100)])
    await asyncio.sleep(0)
    draining = asyncio.create_task(bench.dispatcher.drain([assignment], 10))
    await asyncio.sleep(0)
    gate.set()
    assert await draining
    assert seen == [0]
    assert assignment.finished is not None
    assert assignment.finished.offset == 0
    await bench.dispatcher.stop()


async def test_what_outlasts_the_drain_is_cancelled_and_not_finished(assignment: Assignment) -> None:
    """A handler that goes on after the deadline is cancelled, and its event is nobody's success."""
    cancelled = asyncio.Event()

    async def handle(event: Made) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    bench = Bench(handle)
    bench.dispatcher.feed(assignment, [record("a", 0)])
    await asyncio.sleep(0)
    assert not await bench.dispatcher.drain([assignment], 0)
    await bench.dispatcher.cancel([assignment])
    assert cancelled.is_set()
    assert assignment.finished is None
    other = Assignment("dispatch", 1)
    seen: list[int] = []

    async def fine(event: Made) -> None:
        seen.append(event.number)

    bench.route.reads(Made, fine, wants_metadata=False, retry=Retry())
    bench.dispatcher.feed(other, [record("b", 1)])
    assert await bench.dispatcher.settle([other], 5)
    assert seen == [1], "other partitions go on with a new worker"
    await bench.dispatcher.stop()


async def test_trap_05_the_oldest_in_flight_shows_a_handler_that_hangs(assignment: Assignment) -> None:
    """Its age grows with the clock although everything else is handled."""

    async def handle(event: Made) -> None:
        if event.number == 0:
            await asyncio.Event().wait()

    bench = Bench(handle)
    bench.dispatcher.feed(assignment, [record("a", 0)])
    await bench.clock.advance(60.0)
    bench.dispatcher.feed(assignment, [record("b", 1)])
    await bench.dispatcher.progress(5)
    assert bench.dispatcher.ages.oldest_seconds([assignment]) == 60.0
    assert not await bench.dispatcher.settle([assignment], 0)
    await bench.dispatcher.stop()


async def test_no_more_calls_at_once_than_workers_and_keyless_events_side_by_side(assignment: Assignment) -> None:
    """Events without a key wait for nobody, but there are never more than `concurrency` of them at work."""
    running = most = 0
    gate = asyncio.Event()

    async def handle(event: Made) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await gate.wait()
        running -= 1

    bench = Bench(handle, concurrency=3)
    bench.dispatcher.feed(assignment, [record("same", number, key=None) for number in range(10)])
    await eventually(lambda: running == 3)
    gate.set()
    await bench.dispatcher.settle([assignment], 5)
    assert most == 3
    await bench.dispatcher.stop()


async def test_a_defect_of_the_worker_is_not_silent(assignment: Assignment) -> None:
    """What is no handler's error stops the consumer, which says so and starts anew."""

    async def handle(event: Made) -> None:
        raise KeyboardInterrupt

    bench = Bench(handle)
    bench.route.seconds = None  # type: ignore[assignment]  # a defect to find
    bench.route.reads(Made, _nothing, wants_metadata=False, retry=Retry())
    bench.dispatcher.feed(assignment, [record("a", 0)])
    with pytest.raises(AttributeError):
        await bench.dispatcher.settle([assignment], 5)
    await bench.dispatcher.stop()


async def _nothing(event: Made) -> None:
    pass


async def test_a_handler_that_swallows_its_cancellation_strands_no_other_event() -> None:
    """Its caller ends with it: what the other partition has is handled by another one, whole."""
    log: list[str] = []
    gate = asyncio.Event()

    async def handle(event: Made) -> None:
        log.append(f"begins {event.name}")
        if event.name == "a":
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                return
        await gate.wait()
        log.append(f"ends {event.name}")

    bench = Bench(handle, concurrency=1)
    going, staying = Assignment("dispatch", 0), Assignment("dispatch", 1)
    bench.dispatcher.feed(going, [record("a", 0)])
    await eventually(lambda: "begins a" in log)
    bench.dispatcher.feed(staying, [record("b", 1), record("c", 2)])
    await bench.dispatcher.cancel([going])
    gate.set()
    assert await bench.dispatcher.settle([staying], None)
    assert log == ["begins a", "begins b", "ends b", "begins c", "ends c"]
    assert staying.finished is not None
    assert staying.finished.offset == 2
    await bench.dispatcher.stop()


async def test_an_events_age_begins_with_its_first_call(assignment: Assignment) -> None:
    """However long it waited behind others: neither its retries nor the health count that."""
    calls: list[int] = []
    gate = asyncio.Event()

    async def handle(event: Made) -> None:
        calls.append(event.number)
        if event.number == 1:
            await gate.wait()
        elif calls.count(2) < 3:
            raise LookupError(event.number)

    retry = Retry(attempts=9, wait=FullJitter(1.0, 1.0), stop=lambda state: state.seconds_since_start > 30)
    bench = Bench(handle, retry=retry)
    bench.dispatcher.feed(assignment, [record("a", 1), record("a", 2)])
    await eventually(lambda: calls == [1])
    await bench.clock.advance(40)
    assert bench.dispatcher.ages.oldest_seconds([assignment]) == pytest.approx(40)
    gate.set()
    await eventually(lambda: calls == [1, 2])
    assert bench.dispatcher.ages.oldest_seconds([assignment]) == pytest.approx(0)
    await bench.clock.advance(5)
    assert await bench.dispatcher.settle([assignment], None)
    assert calls == [1, 2, 2, 2]
    assert bench.buried == []
    assert bench.dispatcher.ages.oldest_seconds([assignment]) == 0.0
    await bench.dispatcher.stop()


async def test_an_outage_is_a_few_lines(assignment: Assignment, caplog: pytest.LogCaptureFixture) -> None:
    """One with its traceback a minute for each kind, and how many others there were."""

    class Away(MainstayError):
        code = "EXT_AWAY"
        status = 503
        title = "Away"
        no_effect = True
        retryable = True

    away = True
    tried = 0

    async def handle(event: Made) -> None:
        nonlocal tried
        tried += 1
        if away:
            raise Away

    bench = Bench(handle, concurrency=50)
    bench.dispatcher.feed(assignment, [record(f"k{n}", n) for n in range(50)])
    await eventually(lambda: tried == 50)
    for _ in range(5):
        await bench.clock.advance(20)
    away = False
    while not await bench.dispatcher.settle([assignment], 0):
        await bench.clock.advance(20)
    lines = [each.getMessage() for each in caplog.records if "failed at attempt" in each.getMessage()]
    assert 2 <= len(lines) <= 3
    assert "others meanwhile" in lines[-1]
    await bench.dispatcher.stop()


async def test_a_partition_does_not_wait_for_the_backlog_of_others() -> None:
    """What comes last is handled after a portion of each other partition, and each keeps its order."""
    seen: list[str] = []

    async def handle(event: Made) -> None:
        seen.append(event.name)
        await asyncio.sleep(0)

    bench = Bench(handle, concurrency=2)
    backlogs = [Assignment("dispatch", number) for number in range(3)]
    for number, backlog in enumerate(backlogs):
        bench.dispatcher.feed(backlog, [record(f"backlog-{number}-{n}", n) for n in range(500)])
    late = Assignment("dispatch", 3)
    bench.dispatcher.feed(late, [record(f"late-{n}", n) for n in range(20)])
    assert await bench.dispatcher.settle([*backlogs, late], None)
    assert seen.index("late-0") < 100
    assert seen.index("late-19") < 200
    for number in range(3):
        mine = [name for name in seen if name.startswith(f"backlog-{number}-")]
        assert mine == [f"backlog-{number}-{n}" for n in range(500)]
    await bench.dispatcher.stop()
