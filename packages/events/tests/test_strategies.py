"""What becomes of an event that keeps failing, as its handler says: parked, a dead letter, skipped, stopped at."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from prometheus_client import REGISTRY
from pydantic import SecretStr

from mainstay.core import App, ConfigurationError, FullJitter, MainstayError, Retry
from mainstay.core.testing import VirtualClock, eventually
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from mainstay.events import (
    DeadLetter,
    DeadLetters,
    Event,
    EventConsumers,
    EventPublisher,
    EventRouter,
    EventsModule,
    EventsSettings,
    Metadata,
    ParkedKey,
    ParkedKeys,
    RetryLater,
)
from mainstay.events._delivery import Assignment, Delivery, Verdict
from mainstay.events._handled import Handled
from mainstay.events._parking import Parking
from mainstay.events._transport import LogRecord
from mainstay.events.errors import NotHeldError
from mainstay.events.metadata import Outgoing
from mainstay.events.tables import PARKED, PARKED_KEYS
from mainstay.events.testing import in_memory

pytestmark = [
    pytest.mark.usefixtures("aiokafka_garbage"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # see the fixture
]

ONCE = Retry(attempts=1)
AT_ONCE = FullJitter(0.01, 0.01)


class Sent(Event, type="post.sent", key="box"):
    box: str
    number: int


class Loose(Event, type="post.loose"):
    number: int


class Useless(MainstayError):
    """What no further attempt would mend."""

    code = "BIZ_POST_USELESS"
    status = 409
    title = "Post useless"
    retryable = False


class Post:
    """A service whose handler fails for what is `broken`, in the manner of `error`."""

    def __init__(self, group: str, **on: Any) -> None:
        self.group = group
        self.on = on
        self.broken: set[tuple[str, int]] = set()
        self.error: Callable[[], Exception] = lambda: ValueError("no such place")
        self.attempts: list[tuple[str, int, int]] = []
        self.handled: list[tuple[str, int]] = []
        self.keys: list[str | None] = []
        self.events = EventRouter()

    def router(self) -> EventRouter:
        """The handlers of one process."""
        events = self.events = EventRouter()

        @events.on(Sent, group=self.group, **self.on)
        async def deliver(event: Sent, meta: Metadata) -> None:
            await self._deliver(event.box, event.number, meta)

        @events.on(Loose, group=self.group, **self.on)
        async def deliver_loose(event: Loose, meta: Metadata) -> None:
            await self._deliver("", event.number, meta)

        return events

    async def _deliver(self, box: str, number: int, meta: Metadata) -> None:
        self.attempts.append((box, number, meta.attempt))
        self.keys.append(meta.key)
        if (box, number) in self.broken:
            raise self.error()
        self.handled.append((box, number))

    def app(self, url: str, **settings: Any) -> App:
        """A process with a Database."""
        topics = {"post.sent": self.group, "post.loose": self.group}
        return App(
            DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url))),
            EventsModule.for_root(EventsSettings(topics=topics, **{"partitions": 1, **settings})),
            EventsModule.for_feature(self.router()),
        )


async def until_parked(app: App, of: Callable[[ParkedKey], object], wanted: Sequence[object]) -> None:
    """Return once this is so of the parked keys."""

    async def is_so() -> bool:
        return [of(each) for each in await app.get(ParkedKeys).list()] == wanted

    await eventually(is_so, what=f"{wanted} of the parked keys")


async def given_up(app: App, group: str, count: int) -> Sequence[DeadLetter]:
    """The dead letters, once there are so many."""
    letters: list[DeadLetter] = []

    async def are_there() -> bool:
        letters[:] = await app.get(DeadLetters).list(group)
        return len(letters) >= count

    await eventually(are_there, what=f"{count} dead letters")
    return letters


async def is_degraded(app: App) -> bool:
    """Whether health asks for a person."""
    return (await app.get(EventConsumers).health()).status != "ok"


def counted(name: str, group: str) -> float:
    """A metric of a group."""
    return REGISTRY.get_sample_value(f"mainstay_events_{name}", {"group": group}) or 0.0


async def test_what_is_skipped_is_counted_and_named_in_one_line(caplog: pytest.LogCaptureFixture, prefix: str) -> None:
    """After its attempts it is gone, and what follows of its key is handled."""
    post = Post(prefix, retry=Retry(attempts=2, wait=AT_ONCE), on_failure="skip")
    post.broken = {("a", 1)}
    with caplog.at_level(logging.ERROR, "mainstay.events"):
        async with in_memory(post.router()) as rehearsal:
            await rehearsal.publish(Sent(box="a", number=1))
            await rehearsal.publish(Sent(box="a", number=2))
            await rehearsal.settled()
            assert await rehearsal.dead_letters() == []
    assert post.attempts == [("a", 1, 1), ("a", 1, 2), ("a", 2, 1)]
    assert counted("skipped_failures_total", prefix) == 1
    (line,) = [each.getMessage() for each in caplog.records if prefix in each.getMessage()]
    assert line.startswith("post/")
    assert line.endswith(f" in group {prefix} failed, and is skipped, at attempt 2: ValueError: no such place")
    assert all(each.exc_info is None for each in caplog.records)


async def test_what_stops_its_partition_is_named_and_tried_again_without_a_hurry(prefix: str) -> None:
    """Its key waits, other partitions flow, and once it is mended all goes on in order."""
    clock = VirtualClock()
    post = Post(prefix, retry=Retry(attempts=2, wait=lambda _: 60.0), on_failure="stop")
    post.broken = {("a", 1)}
    async with in_memory(post.router(), clock=clock, partitions=8) as rehearsal:
        consumers = rehearsal.app.get(EventConsumers)
        for number in (1, 2):
            await rehearsal.publish(Sent(box="a", number=number))
        await eventually(lambda: len(post.attempts) == 1, what="the first attempt")
        await clock.advance(61.0)
        await eventually(lambda: counted("stopped", prefix) == 1, what="the stop")
        since = clock.now()
        for box in "bcdefghijklmnop":
            await rehearsal.publish(Sent(box=box, number=1))
        await eventually(lambda: len(post.handled) == 15, what="other keys")
        health = await consumers.health()
        assert health.status == "degraded"
        assert f"group {prefix}: it has stopped at post/" in health.detail
        assert f"@0 (post.sent 1.x, key 'a', since {since:%Y-%m-%d %H:}" in health.detail
        assert "ValueError: no such place" in health.detail
        for attempt in (3, 4, 5):
            await clock.advance(50.0)
            assert post.attempts.count(("a", 1, attempt)) == 0, "it is no busy loop"
            await clock.advance(11.0)
            await eventually(lambda attempt=attempt: ("a", 1, attempt) in post.attempts, what="another attempt")
        assert await rehearsal.dead_letters() == []
        post.broken = set()
        await clock.advance(61.0)
        await rehearsal.settled()
        assert [number for box, number in post.handled if box == "a"] == [1, 2]
        assert (await consumers.health()).status == "ok"
        assert counted("stopped", prefix) == 0


async def test_what_has_stopped_its_partition_is_tried_no_sooner_than_its_error_says(prefix: str) -> None:
    """Another service has said how long it wants to be left alone."""
    clock = VirtualClock()
    post = Post(prefix, retry=ONCE, on_failure="stop")
    post.broken = {("a", 1)}
    post.error = lambda: Useless("not now", retry_after_seconds=500.0)
    async with in_memory(post.router(), clock=clock) as rehearsal:
        await rehearsal.publish(Sent(box="a", number=1))
        await eventually(lambda: counted("stopped", prefix) == 1, what="the stop")
        await clock.advance(499.0)
        assert post.attempts == [("a", 1, 1)]
        post.broken = set()
        await clock.advance(2.0)
        await rehearsal.settled()
        assert post.handled == [("a", 1)]


async def test_a_restart_tries_what_has_stopped_its_partition_again(database_url: str, prefix: str) -> None:
    """Also what is unreadable, and with a full window behind it: nothing of its key goes past it, and none is lost."""
    post = Post(prefix, retry=ONCE, on_failure="stop")
    post.broken = {("a", 1)}
    async with post.app(database_url).running(serve=True) as app:
        await post.events.publish_batch([Sent(box="a", number=number) for number in range(1, 1500)])
        await eventually(lambda: counted("stopped", prefix) == 1, what="the stop")
        assert await app.get(ParkedKeys).list() == []
    assert post.handled == []
    assert counted("stopped", prefix) == 0, "it is no partition of this process any more"
    post.broken = set()
    async with post.app(database_url).running(serve=True):
        await eventually(lambda: len(post.handled) == 1499, what="everything")
    assert post.handled == [("a", number) for number in range(1, 1500)]


async def test_without_a_word_a_key_is_parked_with_a_database_and_a_dead_letter_without(
    database_url: str, prefix: str
) -> None:
    """What has no key, or no reader, has no order to keep."""
    post = Post(prefix, retry=ONCE)
    post.broken = {("a", 1), ("", 1)}
    async with post.app(database_url).running(serve=True) as app:
        await post.events.publish_batch([Sent(box="a", number=1), Sent(box="a", number=2), Loose(number=1)])
        await until_parked(app, lambda each: each.waiting, [2])
        letters = await given_up(app, prefix, 1)
        assert [letter.value for letter in letters] == [b'{"number":1}']
        health = await app.get(EventConsumers).health()
        assert health.status == "degraded"
        await eventually(lambda: counted("parked_keys", prefix) == 1 and counted("parked_events", prefix) == 2)
    assert post.handled == []
    post = Post(prefix, retry=ONCE)
    post.broken = {("a", 1)}
    async with in_memory(post.router()) as rehearsal:
        await rehearsal.publish(Sent(box="a", number=1))
        await rehearsal.publish(Sent(box="a", number=2))
        await rehearsal.settled()
        assert len(await rehearsal.dead_letters()) == 1
    assert post.handled == [("a", 2)]


@pytest.mark.parametrize("transport", ["sql", "kafka"])
async def test_what_is_tried_later_lets_its_key_go_on_and_is_a_dead_letter_in_the_end(
    request: pytest.FixtureRequest, database_url: str, prefix: str, transport: str
) -> None:
    """Its attempts are counted on, over a restart too; a dead letter has the record as it was."""
    settings: dict[str, Any] = {"transport": transport}
    if transport == "kafka":
        settings["kafka_servers"] = request.getfixturevalue("kafka")
    post = Post(prefix, retry=Retry(attempts=2, wait=AT_ONCE), on_failure=RetryLater(delays_seconds=(3600, 7200)))
    post.broken = {("a", 1), ("b", 1)}

    async def time_passes(app: App) -> None:
        due = sa.update(PARKED_KEYS).values(due_at=0.0)
        await app.get(Database).write(due, {})

    async with post.app(database_url, **settings).running(serve=True) as app:
        await post.events.publish_batch([Sent(box=box, number=number) for number in (1, 2) for box in "ab"])
        await eventually(lambda: sorted(post.handled) == [("a", 2), ("b", 2)], what="what follows of the keys")
        waiting = await app.get(ParkedKeys).list()
        assert [(each.key, each.alone, each.attempt, each.waiting) for each in waiting] == [
            (b"a", True, 3, 1),
            (b"b", True, 3, 1),
        ] or [each.key for each in waiting] == [b"b", b"a"]
        assert all(each.due is not None and 3500 < (each.due - each.since).total_seconds() < 3700 for each in waiting)
        report = await app.get(EventConsumers).health()
        assert report.status == "ok", "no person is needed"
        assert counted("set_aside_total", prefix) == 2
        assert counted("set_aside_events", prefix) == 2
        assert counted("parked_keys", prefix) == 0
    post.broken.discard(("a", 1))
    async with post.app(database_url, **settings).running(serve=True) as app:
        await time_passes(app)
        await eventually(lambda: ("a", 1) in post.handled, what="the later attempt")
        await until_parked(app, lambda each: each.attempt, [4])
        (last,) = await app.get(ParkedKeys).list()
        assert last.due is not None
        await time_passes(app)
        letters = await given_up(app, prefix, 1)
        await until_parked(app, lambda each: each.id, [])
        assert await app.get(Database).read(sa.select(PARKED.c.id)) == []
        (letter,) = letters
        assert (letter.key, letter.value, letter.attempts) == (b"b", b'{"box":"b","number":1}', 4)
    assert [attempt for box, number, attempt in post.attempts if (box, number) == ("b", 1)] == [1, 2, 3, 4]
    assert set(post.keys) == {"a", "b"}


async def test_out_of_the_queue_of_its_key_it_is_set_aside_alone_and_the_queue_goes_on(
    database_url: str, prefix: str
) -> None:
    """It had waited in there for another reason; a process that has lost the queue sets nothing aside."""
    post = Post(prefix, retry=ONCE, on_failure=RetryLater(delays_seconds=[3600]))
    post.broken = {("a", 1)}
    headers: list[tuple[str, bytes | None]] = [("ce_type", b"post.sent"), ("ce_dataversion", b"1.0"), ("ce_id", b"1")]
    first, second = (
        LogRecord(prefix, 0, 100 + number, b"a", b'{"box":"a","number":%d}' % number, headers) for number in (1, 2)
    )
    waits, later = Verdict(RuntimeError("for a while"), "park", 0.0), Verdict(RuntimeError("for long"), "later", 3600.0)
    async with post.app(database_url) as app:
        database = app.get(Database)
        parking, other = (
            Parking(database, prefix, Handled(database, prefix, ["post.sent 1.x"]), 30.0) for _ in range(2)
        )
        partition, queue = Assignment(prefix, 0), Assignment(prefix, 0, queue=b"a")
        await parking.park(Delivery(partition, first), waits, 0.0, [])
        assert await parking.append(partition, second)
        assert len((await other.claim(1, time.monotonic))[0]) == 1
        with pytest.raises(NotHeldError, match="a queue of topic"):
            await parking.park(Delivery(queue, first), later, 0.0, [])
        await other.release_all()
        assert [(each.alone, each.waiting) for each in await app.get(ParkedKeys).list()] == [(False, 2)]
    async with post.app(database_url).running(serve=True) as app:
        await eventually(lambda: post.handled == [("a", 2)], what="what waited behind it")
        await until_parked(app, lambda each: (each.alone, each.waiting), [(True, 1)])
        post.broken = set()
        await app.get(Database).write(sa.update(PARKED_KEYS).values(due_at=0.0), {})
        await eventually(lambda: post.handled == [("a", 2), ("a", 1)], what="the later attempt")
        await until_parked(app, lambda each: each.id, [])
        assert await app.get(Database).read(sa.select(PARKED.c.id)) == []


async def test_in_the_queue_of_its_key_a_stop_holds_up_that_key_and_health_says_so(
    sqlite_url: str, prefix: str
) -> None:
    """It is tried again by itself, and for ever; what waits behind it stays there."""
    post = Post(prefix, retry=ONCE, on_failure="stop")
    post.broken = {("a", 1)}
    headers: list[tuple[str, bytes | None]] = [("ce_type", b"post.sent"), ("ce_dataversion", b"1.0"), ("ce_id", b"1")]
    async with post.app(sqlite_url, stuck_seconds=0.1).running(serve=True) as app:
        database = app.get(Database)
        parking = Parking(database, prefix, Handled(database, prefix, ["post.sent 1.x"]), 30.0)
        partition = Assignment(prefix, 0)
        records = [
            LogRecord(prefix, 0, 100 + number, b"a", b'{"box":"a","number":%d}' % number, headers) for number in (1, 2)
        ]
        waits = Verdict(RuntimeError("for a while"), "park", 3600.0)
        await parking.park(Delivery(partition, records[0]), waits, 0.0, [])
        assert await parking.append(partition, records[1])
        for attempt in (2, 3):
            await database.write(sa.update(PARKED_KEYS).values(due_at=0.0), {})
            await until_parked(app, lambda each: each.attempt, [attempt])
        (parked,) = await app.get(ParkedKeys).list()
        assert parked.due is not None
        await eventually(lambda: is_degraded(app), what="the health")
        health = await app.get(EventConsumers).health()
        assert f"group {prefix}: 1 parked keys need a person, the oldest since" in health.detail
        assert post.handled == []
        post.broken = set()
        await database.write(sa.update(PARKED_KEYS).values(due_at=0.0), {})
        await eventually(lambda: post.handled == [("a", 1), ("a", 2)], what="the queue")


async def test_what_no_attempt_can_mend_is_not_tried_later(sqlite_url: str, prefix: str) -> None:
    """An error that says so, and bytes that no class reads."""
    post = Post(prefix, retry=Retry(attempts=5, wait=AT_ONCE), on_failure=RetryLater())
    post.broken = {("a", 1)}
    post.error = Useless
    async with post.app(sqlite_url).running(serve=True) as app:
        await post.events.publish(Sent(box="a", number=1))
        headers: list[tuple[str, bytes | None]] = [
            ("ce_type", b"post.sent"), ("ce_dataversion", b"1.0"), ("ce_id", b"1")
        ]  # fmt: skip
        await app.get(EventPublisher)._send([Outgoing(prefix, b"a", b"{", headers)])
        letters = await given_up(app, prefix, 2)
        assert await app.get(ParkedKeys).list() == []
    assert ["DecodeError: post.sent cannot be read" in letter.error for letter in letters].count(True) == 1
    assert post.attempts == [("a", 1, 1)]


async def test_a_person_has_what_waits_for_later_tried_now_or_skips_it(sqlite_url: str, prefix: str) -> None:
    """From its first attempt on, with all its delays again; nothing is lost on the way."""
    post = Post(prefix, retry=ONCE, on_failure=RetryLater(delays_seconds=[3600]))
    post.broken = {("a", 1)}
    async with post.app(sqlite_url).running(serve=True) as app:
        await post.events.publish(Sent(box="a", number=1))
        keys = app.get(ParkedKeys)
        await until_parked(app, lambda each: each.alone, [True])
        found = await keys.list()
        await keys.retry(found[0].id)
        await eventually(lambda: len(post.attempts) == 2, what="another attempt")
        await until_parked(app, lambda each: each.attempt, [2])
        await keys.skip(found[0].id)
        await until_parked(app, lambda each: each.id, [])
        (letter,) = await app.get(DeadLetters).list(prefix)
        assert (letter.key, letter.value) == (b"a", b'{"box":"a","number":1}')


@pytest.mark.parametrize(
    ("on_failure", "handled", "waits"),
    [
        (None, {"b": [1, 2, 3]}, [(b"a", 3)]),
        (RetryLater(delays_seconds=[3600]), {"a": [2, 3], "b": [1, 2, 3]}, [(b"a", 1)]),
        ("skip", {"a": [2, 3], "b": [1, 2, 3]}, []),
        ("dead-letter", {"a": [2, 3], "b": [1, 2, 3]}, []),
        ("stop", {}, []),
    ],
)
async def test_of_a_batch_only_the_event_that_fails_is_dealt_with(
    sqlite_url: str, prefix: str, on_failure: Any, handled: dict[str, list[int]], waits: list[tuple[bytes, int]]
) -> None:
    """As its handler says; others are handled, and what follows of its key as the strategy promises."""
    post = Post(prefix)
    seen: dict[str, list[int]] = {}
    bad = {("a", 1)}

    def router() -> EventRouter:
        events = post.events = EventRouter()

        @events.on_batch(Sent, group=prefix, size=6, wait_seconds=0.2, retry=ONCE, on_failure=on_failure)
        async def deliver(some: list[Sent]) -> None:
            if any((each.box, each.number) in bad for each in some):
                msg = "no such place"
                raise ValueError(msg)
            for each in some:
                seen.setdefault(each.box, []).append(each.number)

        return events

    post.router = router  # type: ignore[method-assign]  # the same service with another handler
    async with post.app(sqlite_url).running(serve=True) as app:
        await post.events.publish_batch([Sent(box=box, number=number) for number in (1, 2, 3) for box in "ab"])
        await eventually(lambda: seen == handled, what=f"{handled}, not {seen}")
        await until_parked(app, lambda each: (each.key, each.waiting), waits)
        assert len(await app.get(DeadLetters).list(prefix)) == (on_failure == "dead-letter")
        bad.clear()
        for parked in await app.get(ParkedKeys).list():
            await app.get(ParkedKeys).retry(parked.id)
        if on_failure in {"skip", "dead-letter"}:
            return
        await eventually(lambda: sorted(seen.get("a", [])) == sorted(seen.get("b", [])) == [1, 2, 3], what="the mended")
        assert seen["a"] == ([2, 3, 1] if isinstance(on_failure, RetryLater) else [1, 2, 3])
        assert seen["b"] == [1, 2, 3]


@pytest.mark.parametrize("delays", [(), (0,), (-1.0,), (float("nan"),), (float("inf"),), ("60",), "60", 60, (True,)])
def test_a_delay_that_is_none_is_refused_where_it_is_written(delays: Any) -> None:
    """With an example of one that is."""
    with pytest.raises(ValueError, match="one positive number of seconds or more, such as"):
        RetryLater(delays_seconds=delays)


@pytest.mark.parametrize("on_failure", ["park", RetryLater()])
def test_what_needs_the_database_is_an_error_of_an_app_without_one(on_failure: Any) -> None:
    """Where it is put together, with the line that is missing; a strategy that is none where it is written."""
    post = Post("mail", on_failure=on_failure)
    settings = EventsSettings(transport="kafka", kafka_servers="127.0.0.1:9", outbox=False)
    with pytest.raises(ConfigurationError, match="requires DatabaseModule"):
        App(EventsModule.for_root(settings), EventsModule.for_feature(post.router()))
    with pytest.raises(ValueError, match=r"it is 'park', 'dead-letter', 'skip', 'stop' or RetryLater\(…\)"):
        Post("mail", on_failure="retry").router()


async def test_what_a_person_discards_while_it_is_called_ends_and_its_key_is_worked_on_again(
    sqlite_url: str, prefix: str
) -> None:
    """It was to be set aside out of a queue that is there no more; the next of its key is in another."""
    events, gate, calls, handled = EventRouter(), asyncio.Event(), list[int](), list[int]()

    @events.on(Sent, group=prefix, retry=ONCE, on_failure=RetryLater(delays_seconds=[3600]))
    async def deliver(event: Sent) -> None:
        calls.append(event.number)
        if event.number == 1:
            await gate.wait()
            msg = "no such place"
            raise ValueError(msg)
        handled.append(event.number)

    headers: list[tuple[str, bytes | None]] = [("ce_type", b"post.sent"), ("ce_dataversion", b"1.0"), ("ce_id", b"1")]
    first, second = (
        LogRecord(prefix, 0, 100 + number, b"a", b'{"box":"a","number":%d}' % number, headers) for number in (1, 2)
    )
    waits = Verdict(RuntimeError("for a while"), "park", 0.0)
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url)))
    root = EventsModule.for_root(EventsSettings(topics={"post.sent": prefix}, partitions=1))
    async with App(database, root, EventsModule.for_feature(events)).running(serve=True) as app:
        (consumer,) = app.get(EventConsumers).consumers
        parking = Parking(app.get(Database), prefix, Handled(app.get(Database), prefix, ["post.sent 1.x"]), 30.0)
        await parking.park(Delivery(Assignment(prefix, 0), first), waits, 0.0, [])
        await eventually(lambda: calls == [1], what="the call")
        (parked,) = await app.get(ParkedKeys).list()
        await app.get(ParkedKeys).discard(parked.id)
        gate.set()
        await eventually(
            lambda: consumer._queues is not None and not consumer._queues.assignments, what="the end of the queue"
        )
        assert await app.get(ParkedKeys).list() == [], "what was discarded is not set aside"
        await parking.park(Delivery(Assignment(prefix, 0), second), waits, 0.0, [])
        await eventually(lambda: handled == [2], what="the next of the key")
        assert calls == [1, 2]
