"""Two releases of a service share a group while one is rolled out: what only the new one handles is lost by neither."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from mainstay.cli import main
from mainstay.core import App
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from mainstay.events import DeadLetters, EventPublisher, EventsModule, ParkedKeys
from mainstay.events._delivery import Assignment, Delivery, Verdict
from mainstay.events._handled import Handled
from mainstay.events._parking import Parking
from mainstay.events._transport import LogRecord
from mainstay.events.tables import HANDLED, PARKED, PARKED_KEYS
from mainstay_servers.frozen import frozen
from packages.events.tests.test_faults import effects, options, prepare, processes, wait_for
from packages.events.tests.worker import Leap, LongStep, Step, recorder, service

__all__ = ["options"]  # a fixture

pytestmark = [
    pytest.mark.usefixtures("aiokafka_garbage"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # see the fixture
]

KEYS = [f"k{number}" for number in range(8)]


async def publish(app: App, numbers: range) -> None:
    """Publish for every key these numbers in turn, of each kind in turn, and with each number one without a key."""
    for number in numbers:
        kinds: list[Any] = [
            lambda key, number: Step(key=key, number=number),
            lambda key, number: LongStep(key=key, number=number, metres=1.5),
            lambda key, number: Leap(key=key, number=number),
        ]
        loose = Leap(key=None, number=number) if number % 2 else LongStep(key=None, number=number, metres=0.5)
        await app.get(EventPublisher).publish_batch([*(kinds[number % 3](key, number) for key in KEYS), loose])


async def all_once_and_in_order(app: App, count: int) -> None:
    """Assert that every key has the numbers once, in order, that those without a key are there, and that none waits."""
    done = await wait_for(app, count * (len(KEYS) + 1))
    by_key: dict[str | None, list[int]] = {}
    for key, number in done:
        by_key.setdefault(key, []).append(number)
    assert sorted(by_key.pop(None, [])) == list(range(count))
    assert by_key == {key: list(range(count)) for key in KEYS}
    async with asyncio.timeout(30):
        while await app.get(ParkedKeys).list() or await app.get(Database).read(sa.select(PARKED.c.id)):  # noqa: ASYNC110  another process does it
            await asyncio.sleep(0.05)
    assert await app.get(DeadLetters).list() == []
    assert len(await effects(app)) == count * (len(KEYS) + 1)


async def test_a_rolling_deploy_loses_nothing_and_keeps_each_keys_order(options: dict[str, Any]) -> None:
    """Old processes hold partitions from the first event to the last, and one of each release is killed under way."""
    publisher = service(options)
    async with publisher, processes() as start:
        await prepare(publisher)
        old = [await start({**options, "release": "old"}) for _ in range(2)]
        new = await start({**options, "release": "new"})
        await publish(publisher, range(6))
        old[0].kill()
        await publish(publisher, range(6, 12))
        new.kill()
        await publish(publisher, range(12, 18))
        await start({**options, "release": "new"})
        await publish(publisher, range(18, 24))
        await all_once_and_in_order(publisher, 24)


async def test_a_process_that_stood_still_with_claimed_keys_doubles_and_reorders_nothing(
    options: dict[str, Any],
) -> None:
    """It works on keys of an old process' partitions, is frozen past its lease, and wakes up beside another."""
    lease_seconds = 7.0 if options["events"]["transport"] == "kafka" else 2.5  # a broker's sessions are longer
    publisher = service(options)
    async with publisher, processes() as start:
        await prepare(publisher)
        await start({**options, "release": "old"})
        new = await start({**options, "release": "new", "pause": 0.05})
        await publish(publisher, range(12))
        await wait_for(publisher, 3 * len(KEYS))
        async with frozen(new.pid, options["url"]):
            await start({**options, "release": "new"})
            await asyncio.sleep(lease_seconds)  # the lease runs out: the time is what is tested
        await all_once_and_in_order(publisher, 12)


async def test_what_only_a_release_that_is_gone_handles_waits_until_it_is_back(options: dict[str, Any]) -> None:
    """The old release alone skips nothing of it and gives nothing up; health says what waits."""
    publisher = service(options)
    async with publisher, processes() as start:
        await prepare(publisher)
        (await start({**options, "release": "new"})).kill()
        await publish(publisher, range(1))
        await start({**options, "release": "old"})
        await publish(publisher, range(1, 6))
        await wait_for(publisher, len(KEYS))
        async with asyncio.timeout(60):
            while len(keys := await publisher.get(ParkedKeys).list()) < len(KEYS) + 6:  # noqa: ASYNC110  another process does it
                await asyncio.sleep(0.05)
        assert {each.kind for each in keys} == {"fault.step 2.x", "fault.leap 1.x"}
        assert len([each for each in keys if each.key is None]) == 6
        assert await publisher.get(DeadLetters).list() == []
        await start({**options, "release": "new"})
        await all_once_and_in_order(publisher, 6)


def parking(app: App, group: str, *mine: str) -> Parking:
    """What a process that handles these has of the group's parked keys."""
    database = app.get(Database)
    return Parking(database, group, Handled(database, group, mine), 30.0)


def delivery(number: int, key: bytes | None, version: str = "1.0") -> Delivery:
    """A record of a type that a release does not know."""
    headers = [("ce_type", b"fault.leap"), ("ce_dataversion", version.encode())]
    return Delivery(Assignment("t", 0), LogRecord("t", 0, number, key, b"%d" % number, headers))


async def claimed_by(parking: Parking) -> list[Any]:
    """What it claims."""
    return list((await parking.claim(10, time.monotonic))[0])


HANDED_OVER = Verdict(RuntimeError("no handler here"), "park", due_seconds=0.0)


async def place_of_first(parking: Parking) -> int:
    """Of the queue of the key k."""
    row = await parking.first("t", b"k")
    assert row is not None
    position: int = row.position
    return position


@pytest.fixture
async def app(database_url: str) -> AsyncIterator[App]:
    """An App with the tables."""
    app = App(DatabaseModule.for_root(DatabaseSettings(url=SecretStr(database_url))), EventsModule.for_root())
    async with app:
        yield app


async def test_one_look_answers_all_that_ask_meanwhile_and_none_that_was_fetched_later(app: App, prefix: str) -> None:
    """An answer counts for what was fetched before the question; those who ask together wait for it together."""
    old, new = parking(app, prefix).handled, parking(app, prefix, "fault.leap 1.x").handled
    assert await asyncio.gather(*(old.is_somebodys("fault.leap 1.x") for _ in range(3))) == [False] * 3
    assert old.is_nobodys("fault.leap 1.x")
    await new.note()
    assert not await old.is_somebodys("fault.leap 1.x"), "fetched before: the group did not handle it then"
    old.fetched()
    assert not old.is_nobodys("fault.leap 1.x")
    assert await asyncio.gather(*(old.is_somebodys("fault.leap 1.x") for _ in range(3))) == [True] * 3
    assert not await old.is_somebodys("fault.leap 2.x")


async def test_a_note_counts_for_a_month_after_the_last_process_that_made_it(app: App, prefix: str) -> None:
    """A release that is away for weeks finds its events; what no release handles any more ends."""
    handled = parking(app, prefix, "fault.leap 1.x").handled
    await handled.note()
    for days, counts in ((29, True), (31, False)):
        seen_at = sa.update(HANDLED).values(seen_at=HANDLED.c.seen_at - sa.bindparam("seconds", type_=sa.Double))
        await app.get(Database).write(seen_at, {"seconds": days * 86_400.0})
        handled.fetched()
        assert await handled.is_somebodys("fault.leap 1.x") is counts
        await handled.note()


async def test_a_key_is_claimed_by_one_process_at_a_time_that_handles_its_first_event(app: App, prefix: str) -> None:
    """Others get it when the lease is over, and what the first one writes then is void."""
    old = parking(app, prefix, "fault.step 1.x")
    one, other = (parking(app, prefix, "fault.leap 1.x") for _ in range(2))
    await one.handled.note()
    first = delivery(1, b"k")
    await old.park(first, HANDED_OVER, 0.0, [])
    assert await old.append(first.assignment, delivery(2, b"k").record)
    await old.park(delivery(3, None), HANDED_OVER, 0.0, [])
    assert await claimed_by(old) == [], "it has no handler for them"
    claimed = await claimed_by(one)
    assert len(claimed) == 2
    assert await claimed_by(other) == []
    (key,) = [row for row in claimed if row.key == b"k"]
    await one.prolong([key.id], time.monotonic)
    await one.release([row.id for row in claimed if row is not key])
    assert len(await claimed_by(other)) == 1, "the one without a key"
    assert await claimed_by(other) == []
    over = sa.update(PARKED_KEYS).where(PARKED_KEYS.c.key == b"k").values(claimed_until=1.0)
    await app.get(Database).write(over, {})
    assert [row.key for row in await claimed_by(other)] == [b"k"]
    position = await place_of_first(one)
    assert await one.finished("t", b"k", position), "no more to do"
    await one.keep(Delivery(Assignment("t", 0, queue=b"k"), first.record), HANDED_OVER, 0.0)
    assert await place_of_first(other) == position, "nothing was written by the one that had lost it"
    assert not await other.finished("t", b"k", position)
    assert await other.finished("t", b"k", await place_of_first(other))
    assert await old.keys_of("t") == set()


async def test_what_the_group_has_forgotten_is_taken_by_any_process(app: App, prefix: str) -> None:
    """An event for which no process has noted a handler is claimed by one that has none, and skipped there."""
    old = parking(app, prefix, "fault.step 1.x")
    await old.park(delivery(1, b"k"), HANDED_OVER, 0.0, [])
    assert [row.key for row in await claimed_by(old)] == [b"k"]


async def test_an_app_that_only_publishes_notes_what_its_handlers_are_for(database_url: str, prefix: str) -> None:
    """It notes before anything is published, so that no old process skips it before a new one serves."""
    options = {"url": database_url, "topic": prefix, "group": prefix, "events": {}, "release": "new"}
    holder: list[App] = []
    async with service(options, recorder(options, holder)) as app:
        noted = await app.get(Database).read(sa.select(HANDLED.c.kind).order_by(HANDLED.c.kind))
        assert [row.kind for row in noted] == ["fault.leap 1.x", "fault.step 1.x", "fault.step 2.x"]


async def test_a_handler_that_was_removed_for_good_is_forgotten_by_a_person(
    sqlite_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then its events are what they are for a group that never had it, and what waits behind them goes on."""

    async def forget(kind: str) -> int:
        return await asyncio.to_thread(main, ["events", "parked", "forget", "--group", prefix, kind])

    monkeypatch.setenv("MAINSTAY_DATABASE_URL", sqlite_url)
    options = {"url": sqlite_url, "topic": prefix, "group": prefix, "events": {}}
    options["on"] = {"on_failure": "dead-letter"}
    holder: list[App] = []
    app = service(options, recorder(options, holder))
    holder.append(app)
    async with app.running(serve=True):
        await prepare(app)
        await parking(app, prefix, "fault.leap 1.x", "fault.step 2.x").handled.note()
        batch = [
            Leap(key="a", number=1),
            LongStep(key="b", number=1, metres=1),
            Step(key="a", number=2),
            Step(key="b", number=2),
        ]
        await app.get(EventPublisher).publish_batch(batch)
        async with asyncio.timeout(60):
            while sum(key.waiting for key in await app.get(ParkedKeys).list()) < 4:  # noqa: ASYNC110  another task does it
                await asyncio.sleep(0.05)
        assert await forget("fault.leap 1.x") == 2
        assert "had a handler for fault.leap 1.x" in capsys.readouterr().err
        assert await forget("fault.jump 1.x") == 2
        assert "it handles fault.leap 1.x, fault.step 1.x, fault.step 2.x" in capsys.readouterr().err
        await app.get(Database).write(sa.update(HANDLED).values(seen_at=HANDLED.c.seen_at - 100.0), {})
        for kind in ("fault.leap 1.x", "fault.step 2.x"):
            assert await forget(kind) == 0
            assert f"forgotten: {kind} in group {prefix}" in capsys.readouterr().out
        assert sorted(await wait_for(app, 2)) == [("a", 2), ("b", 2)]
        async with asyncio.timeout(30):
            while await app.get(ParkedKeys).list():  # noqa: ASYNC110  another task does it
                await asyncio.sleep(0.05)
        (letter,) = await app.get(DeadLetters).list()
        assert "fault.step has version '2.0'" in letter.error


async def test_health_names_what_waits_when_no_process_that_handles_it_serves(sqlite_url: str, prefix: str) -> None:
    """Degraded, with type and version, once the last process that had a handler has not been seen for a while."""
    options = {"url": sqlite_url, "topic": prefix, "group": prefix, "events": {}}
    holder: list[App] = []
    app = service(options, recorder(options, holder))
    async with app.running(serve=True):
        new = parking(app, prefix, "fault.leap 1.x")
        await new.handled.note()
        await new.park(delivery(1, b"k"), HANDED_OVER, 0.0, [])
        health = await app.health()
        assert health["events.EventConsumers"].status == "ok"
        assert re.search(rf"group {prefix}: \d+ partitions, 1 keys parked", health["events.EventConsumers"].detail)
        long_ago = (
            sa.update(HANDLED).where(HANDLED.c.kind == "fault.leap 1.x").values(seen_at=HANDLED.c.seen_at - 100.0)
        )
        await app.get(Database).write(long_ago, {})
        health = await app.health()
        assert health["events.EventConsumers"].status == "degraded"
        assert "events of fault.leap 1.x wait, and no process" in health["events.EventConsumers"].detail
