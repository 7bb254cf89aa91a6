"""Dead letters as what a person works with: found, mended, tried, sent again once, or given up for a reason."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from aiokafka import AIOKafkaProducer
from pydantic import SecretStr

from mainstay.cli import main
from mainstay.core import App, ConfigurationError, Retry, bind
from mainstay.core.testing import eventually
from mainstay.database import CommitUnknown, Database, DatabaseModule, DatabaseSettings
from mainstay.events import (
    DeadLetter,
    DeadLetters,
    DecodeError,
    Event,
    EventPublisher,
    EventRouter,
    EventsModule,
    EventsSettings,
    Metadata,
    RedriveError,
)
from mainstay.events.foreign import Plain
from mainstay.events.tables import DEAD_LETTERS, INBOX
from mainstay.events.testing import in_memory

pytestmark = [
    pytest.mark.usefixtures("aiokafka_garbage"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # see the fixture
]

NOTES = sa.Table("notes", sa.MetaData(), sa.Column("text", sa.Text, primary_key=True))
NOTE = sa.insert(NOTES)


class Billed(Event, type="bill.sent", version="1.0", key="customer"):
    customer: str
    cents: int


class Cancelled(Event, type="bill.cancelled", version="1.0", key="customer"):
    customer: str


class Office:
    """Whose handlers fail while it is closed."""

    def __init__(self, url: str, group: str, *, inbox: bool = True) -> None:
        self.closed = True
        self.handled: list[int] = []
        self.others: list[int] = []
        self.events = events = EventRouter()
        self.group = group
        self.database: Database | None = None

        @events.on(Billed, group=group, retry=Retry(attempts=1), inbox=inbox, on_failure="dead-letter")
        async def bill(event: Billed) -> None:
            if self.database is not None:
                await self.database.write(NOTE, {"text": f"{event.customer} {event.cents}"})
            if self.closed or event.cents < 0:
                msg = f"closed for {event.customer}"
                raise RuntimeError(msg)
            self.handled.append(event.cents)

        @events.on(Cancelled, group=group, retry=Retry(attempts=1), inbox=inbox, on_failure="dead-letter")
        async def cancel(event: Cancelled) -> None:
            msg = "never"
            raise RuntimeError(msg)

        @events.on(Billed, group=f"{group}-other", on_failure="dead-letter")
        async def other(event: Billed) -> None:
            self.others.append(event.cents)

        self.app = App(
            DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url))),
            EventsModule.for_root(EventsSettings(partitions=1)),
            EventsModule.for_feature(events),
        )

    @asynccontextmanager
    async def open(self) -> AsyncIterator[DeadLetters]:
        """The App, serving, with a table for notes."""
        async with self.app.running(serve=True):
            self.database = self.app.get(Database)
            async with self.database.transaction() as session:
                await session.execute(sa.schema.CreateTable(NOTES, if_not_exists=True))
            yield self.app.get(DeadLetters)

    async def letters(self, count: int) -> Sequence[DeadLetter]:
        """The dead letters that wait, once there are so many."""
        found: list[DeadLetter] = []

        async def there() -> bool:
            found[:] = await self.app.get(DeadLetters).list(self.group)
            return len(found) == count

        await eventually(there, what=f"{count} dead letters")
        return found


@pytest.fixture
def office(database_url: str, prefix: str) -> Office:
    """On either database."""
    return Office(database_url, prefix)


async def test_they_are_found_by_what_is_known_of_them(office: Office) -> None:
    """Type, key, conversation, time and state."""
    async with office.open() as letters:
        publish = office.events.publish
        with bind(correlation_id="call-7"):
            await publish(Billed(customer="ann", cents=1))
        await publish(Billed(customer="bob", cents=2))
        await publish(Cancelled(customer="ann"))
        await office.letters(3)

        async def keys(**wanted: Any) -> list[tuple[str, bytes | None]]:
            return sorted((each.type, each.key) for each in await letters.list(**wanted))

        now = datetime.now(UTC)
        assert await keys(type="bill.sent") == [("bill.sent", b"ann"), ("bill.sent", b"bob")]
        assert await keys(key="ann") == [("bill.cancelled", b"ann"), ("bill.sent", b"ann")]
        assert await keys(correlation_id="call-7") == [("bill.sent", b"ann")]
        assert await keys(until=now - timedelta(hours=1)) == []
        assert len(await keys(since=now - timedelta(hours=1), until=now + timedelta(hours=1))) == 3
        assert await keys(state="redriven") == []
        with pytest.raises(ValueError, match=r"since=.* has no zone"):
            await letters.list(since=datetime(2026, 1, 1))  # noqa: DTZ001  that is what is refused


async def test_one_is_redriven_once_by_whoever_is_first_and_stays_on_record(office: Office) -> None:
    """To its group only, with the id that it had; the second is told who was first, and when."""
    async with office.open() as letters:
        await office.events.publish(Billed(customer="ann", cents=1))
        (letter,) = await office.letters(1)
        await eventually(lambda: office.others == [1])
        office.closed = False
        with bind(actor="mia"):
            results = await asyncio.gather(*(letters.redrive(letter.id) for _ in range(3)), return_exceptions=True)
        assert sum(isinstance(each, RedriveError) for each in results) == 2
        assert all("was redriven on" in str(each) and "by mia" in str(each) for each in results if each != letter)
        await eventually(lambda: office.handled == [1])
        assert office.others == [1]
        assert await letters.list() == []
        (kept,) = await letters.list(state="redriven")
        assert (kept.id, kept.value, kept.headers, kept.changed_by) == (letter.id, letter.value, letter.headers, "mia")
        with pytest.raises(RedriveError, match="was redriven"):
            await letters.discard(letter.id, reason="too late")
        with pytest.raises(RedriveError, match="was redriven"):
            await letters.edit(letter.id, b'{"customer":"ann","cents":2}')


async def test_one_whose_event_was_handled_after_all_is_a_duplicate_to_the_inbox(office: Office) -> None:
    """A redrive changes nothing then."""
    async with office.open() as letters:
        await office.events.publish(Billed(customer="ann", cents=1))
        (letter,) = await office.letters(1)
        assert office.database is not None
        headers = dict(letter.headers)
        name = b"%b\n%b" % (headers["ce_source"] or b"", headers["ce_id"] or b"")
        noted = {"group_name": office.group, "event_id": name.decode()}
        await office.database.write(sa.insert(INBOX), noted)
        office.closed = False
        await letters.redrive(letter.id)
        await office.events.publish(Billed(customer="ann", cents=2))
        await eventually(lambda: office.handled == [2], what="what is behind it")


async def test_one_is_edited_through_its_class_and_keeps_what_was_received(office: Office) -> None:
    """A value that the class does not read, or that belongs to another key, is refused and changes nothing."""
    async with office.open() as letters:
        await office.events.publish(Billed(customer="ann", cents=-1))
        (letter,) = await office.letters(1)
        with pytest.raises(DecodeError, match="cents"):
            await letters.edit(letter.id, b'{"customer":"ann","cents":"many"}')
        with pytest.raises(ValueError, match="has another key"):
            await letters.edit(letter.id, b'{"customer":"bob","cents":1}')
        assert await letters.get(letter.id) == letter
        await letters.edit(letter.id, b'{"customer":"ann", "cents":4}', by="mia")
        edited = await letters.edit(letter.id, b'{"customer":"ann", "cents":5}', by="mia")
        assert (edited.edited, edited.value, edited.received) == (True, b'{"customer":"ann", "cents":5}', letter.value)
        assert edited.state == "waiting"
        office.closed = False
        await letters.redrive(letter.id)
        await eventually(lambda: office.handled == [5])


async def test_one_is_discarded_with_a_reason_and_may_be_redriven_all_the_same(office: Office) -> None:
    """Until the record of it is forgotten."""
    async with office.open() as letters:
        await office.events.publish(Billed(customer="ann", cents=1))
        (letter,) = await office.letters(1)
        with pytest.raises(ValueError, match="reason"):
            await letters.discard(letter.id, reason=" ")
        await letters.discard(letter.id, reason="a test order", by="mia")
        (kept,) = await letters.list(state="discarded")
        assert (kept.reason, kept.changed_by) == ("a test order", "mia")
        with pytest.raises(RedriveError, match=r"was discarded on .* by mia"):
            await letters.discard(letter.id, reason="again")
        office.closed = False
        await letters.redrive(letter.id)
        await eventually(lambda: office.handled == [1])


async def test_a_dry_run_reads_and_calls_and_leaves_nothing(office: Office) -> None:
    """What the handler writes is rolled back, what it raises is raised, and the letter waits on."""
    async with office.open() as letters:
        await office.events.publish(Billed(customer="ann", cents=1))
        (letter,) = await office.letters(1)
        assert await letters.dry_run(letter.id) == Billed(customer="ann", cents=1)
        with pytest.raises(RuntimeError, match="closed for ann"):
            await letters.dry_run(letter.id, handler=True)
        office.closed = False
        await letters.dry_run(letter.id, handler=True)
        assert office.handled == [1]
        assert office.database is not None
        assert await office.database.read(sa.select(NOTES)) == []
        assert [each.id for each in await letters.list()] == [letter.id]
        await letters.redrive(letter.id)
        await eventually(lambda: office.handled == [1, 1], what="the real call, which no note of the other stops")


async def test_what_was_settled_long_ago_is_forgotten_and_what_waits_is_not(sqlite_url: str, prefix: str) -> None:
    """The sweep at a start looks at nothing else."""
    office = Office(sqlite_url, prefix)
    async with office.open() as letters:
        for cents in range(3):
            await office.events.publish(Billed(customer="ann", cents=cents))
        first, second, third = await office.letters(3)
        await letters.discard(first.id, reason="old")
        await letters.discard(second.id, reason="new")
        assert office.database is not None
        old = datetime.now(UTC) - timedelta(days=31)
        await office.database.write(
            sa.update(DEAD_LETTERS).where(DEAD_LETTERS.c.id == sa.bindparam("one")).values(changed_at=old),
            {"one": first.id},
        )
        await office.database.write(sa.update(DEAD_LETTERS).values(time=old), {})
    async with Office(sqlite_url, prefix).open() as letters:

        async def left() -> bool:
            return {each.id for each in await letters.list(state=None)} == {second.id, third.id}

        await eventually(left, what="the sweep")


async def test_an_app_without_the_handler_says_which_one_to_name(sqlite_url: str, prefix: str) -> None:
    """A dead letter is read by the class that its group handles, and that is in the service's App."""
    office = Office(sqlite_url, prefix)
    async with office.open():
        await office.events.publish(Billed(customer="ann", cents=1))
        (letter,) = await office.letters(1)
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url)))
    async with App(database, EventsModule.for_root(EventsSettings())) as app:
        with pytest.raises(ConfigurationError, match=r"no handler for bill.sent in group .* with --app"):
            await app.get(DeadLetters).dry_run(letter.id)


async def test_without_a_table_they_are_edited_and_discarded_too(kafka: str, prefix: str) -> None:
    """In the compacted topic of a service on Kafka without a Database; there what is settled is gone."""
    events = EventRouter()
    handled: list[int] = []

    @events.on(Billed, group=prefix, retry=Retry(attempts=1))
    async def bill(event: Billed) -> None:
        if event.cents < 0:
            msg = "closed"
            raise RuntimeError(msg)
        handled.append(event.cents)

    settings = EventsSettings(
        transport="kafka", kafka_servers=kafka, outbox=False, source=prefix, topics={"bill.sent": prefix}, partitions=1
    )
    async with App(EventsModule.for_root(settings), EventsModule.for_feature(events)).running(serve=True) as app:
        letters = app.get(DeadLetters)
        with bind(correlation_id="call-7"):
            await app.get(EventPublisher).publish(Billed(customer="ann", cents=-1))
        await app.get(EventPublisher).publish(Billed(customer="bob", cents=-2))

        async def two() -> bool:
            return len(await letters.list()) == 2

        await eventually(two, every_seconds=0.2, what="the dead letters")
        (ann,) = await letters.list(correlation_id="call-7")
        (bob,) = await letters.list(key="bob")
        with pytest.raises(DecodeError):
            await letters.edit(ann.id, b"{}")
        edited = await letters.edit(ann.id, b'{"customer":"ann","cents":1}', by="mia")
        assert (edited.edited, edited.changed_by, edited.headers) == (True, "mia", ann.headers)
        with pytest.raises(ConfigurationError, match="rolled back"):
            await letters.dry_run(ann.id, handler=True)
        await letters.redrive(ann.id)
        await letters.discard(bob.id, reason="a test order")
        await eventually(lambda: handled == [1])
        assert await letters.list(state=None) == []


async def test_without_a_table_a_record_of_others_keeps_its_identity_through_edits(
    kafka: str, prefix: str, client: str
) -> None:
    """An inbox of another service, or a handler that looks at the id, takes it for the same event."""

    class Counted(Event, type="stock.counted", topic=prefix, key="item", decoder=Plain("stock.counted")):
        item: str
        amount: int

    events = EventRouter()
    seen: list[tuple[int, str, str | None]] = []

    @events.on(Counted, group=prefix, retry=Retry(attempts=1))
    async def count(event: Counted, meta: Metadata) -> None:
        seen.append((event.amount, meta.id, meta.correlation_id))
        if event.amount < 0:
            msg = "less than none"
            raise RuntimeError(msg)

    settings = EventsSettings(
        transport="kafka", kafka_servers=kafka, kafka_client=client, outbox=False, source=prefix, partitions=1
    )
    async with AIOKafkaProducer(bootstrap_servers=kafka) as producer:
        await producer.send_and_wait(prefix, b'{"item": "84406", "amount": -1}', key=b"84406")
    async with App(EventsModule.for_root(settings), EventsModule.for_feature(events)).running(serve=True) as app:
        letters = app.get(DeadLetters)
        await eventually(letters.list, every_seconds=0.2, what="the dead letter")
        (letter,) = await letters.list()
        for amount in (2, 3):
            edited = await letters.edit(letter.id, b'{"item": "84406", "amount": %d}' % amount)
        assert edited.correlation_id == letter.correlation_id == seen[0][1]
        await letters.redrive(letter.id)
        await eventually(lambda: len(seen) == 2)
        assert seen[1] == (3, seen[0][1], seen[0][2])


async def test_an_edit_of_a_structured_event_names_the_same_event() -> None:
    """Its id is part of its value, so that an edit could change it, and what has seen the event would not know it."""
    events = EventRouter()

    @events.on(Billed, group="office", retry=Retry(attempts=1))
    async def bill(event: Billed) -> None:
        raise RuntimeError

    def written(id: str, cents: int) -> bytes:
        data = {"customer": "ann", "cents": cents}
        return json.dumps({"specversion": "1.0", "type": "bill.sent", "source": "x", "id": id, "data": data}).encode()

    async with in_memory(events) as rehearsal:
        headers = [("content-type", b"application/cloudevents+json")]
        await rehearsal.receive("bill", written("100", -1), key=b"ann", headers=headers)
        await rehearsal.settled()
        (letter,) = await rehearsal.dead_letters()
        letters = rehearsal.app.get(DeadLetters)
        with pytest.raises(ValueError, match="has another id: edited it would be another event"):
            await letters.edit(letter.id, written("101", 1))
        await letters.edit(letter.id, written("100", 1))


async def test_in_memory_they_have_the_same_states() -> None:
    """So a test of what a service does with them needs nothing else."""
    events = EventRouter()

    @events.on(Billed, group="office", retry=Retry(attempts=1))
    async def bill(event: Billed) -> None:
        if event.cents < 0:
            msg = "closed"
            raise RuntimeError(msg)

    async with in_memory(events) as rehearsal:
        for cents in (-1, -2):
            await rehearsal.publish(Billed(customer="ann", cents=cents))
        await rehearsal.settled()
        letters = rehearsal.app.get(DeadLetters)
        first, second = await letters.list()
        await letters.edit(first.id, b'{"customer":"ann","cents":1}')
        await letters.redrive(first.id)
        await letters.discard(second.id, reason="a test order")
        await rehearsal.settled()
        assert [each.state for each in await letters.list(state=None)] == ["redriven", "discarded"]
        assert (await letters.get(first.id)).received == b'{"customer":"ann","cents":-1}'
        for again in (letters.redrive(first.id), letters.edit(first.id, b'{"customer":"ann","cents":1}')):
            with pytest.raises(RedriveError, match="was redriven"):
                await again
        with pytest.raises(RedriveError, match="was discarded"):
            await letters.discard(second.id, reason="again")


async def test_a_commit_in_doubt_is_tried_again_as_any_failure() -> None:
    """It was a dead letter at its first attempt; an event may always be handled once more."""
    events = EventRouter()
    attempts: list[int] = []

    @events.on(Billed, group="office", retry=Retry(attempts=3, wait=lambda _: 0.0))
    async def bill(event: Billed) -> None:
        attempts.append(event.cents)
        if event.cents == 1 or len(attempts) == 1:
            msg = "the connection was lost while committing"
            raise CommitUnknown(msg)

    async with in_memory(events) as rehearsal:
        await rehearsal.publish(Billed(customer="ann", cents=0))
        await rehearsal.settled()
        assert attempts == [0, 0]
        await rehearsal.publish(Billed(customer="ann", cents=1))
        await rehearsal.settled()
        assert attempts == [0, 0, 1, 1, 1]
        (letter,) = await rehearsal.dead_letters()
        assert letter.attempts == 3


SERVICE = """
from mainstay.core import App
from mainstay.database import DatabaseModule
from mainstay.events import Event, EventRouter, EventsModule

events = EventRouter()

class Billed(Event, type="bill.sent", version="1.0", key="customer"):
    customer: str
    cents: int

@events.on(Billed, group="{group}", on_failure="dead-letter")
async def bill(event: Billed) -> None:
    if event.cents < 0:
        raise ValueError("below nothing")

app = App(DatabaseModule.for_root(), EventsModule.for_root(), EventsModule.for_feature(events))
"""


async def test_the_whole_way_on_the_command_line(
    sqlite_url: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tried and edited by the App that has the handler, then sent again, or discarded for a reason."""

    async def run(*arguments: str) -> str:
        status = await asyncio.to_thread(main, ["events", "dead-letters", *arguments])
        said = capsys.readouterr()
        return said.out if status == 0 else f"{status}: {said.err}"

    name = f"service_{prefix}"
    (tmp_path / f"{name}.py").write_text(SERVICE.format(group=prefix))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MAINSTAY_DATABASE_URL", sqlite_url)
    office = Office(sqlite_url, prefix)
    async with office.open():
        await office.events.publish(Billed(customer="ann", cents=-1))
        await office.events.publish(Billed(customer="bob", cents=-2))
        ann, bob = await office.letters(2)
    assert "no App is named" in await run("try", str(ann.id))
    monkeypatch.setenv("MAINSTAY_APP", f"{name}:app")
    assert "Billed(customer='ann', cents=-1)" in await run("try", str(ann.id))
    assert "below nothing" in await run("try", "--handler", str(ann.id))
    value = tmp_path / "mended.json"
    value.write_text('{"customer":"ann","cents":7}')
    page = await run("edit", str(ann.id), str(value), "--by", "mia")
    assert "by mia" in page
    assert 'received  {"customer":"ann","cents":-1}' in page
    assert "handled: Billed(customer='ann', cents=7)" in await run("try", "--handler", str(ann.id))
    assert await run("redrive", str(ann.id)) == f"sent again: {ann.id} to group {prefix}\n"
    assert await run("discard", str(bob.id), "--reason", "a test order") == f"discarded: {bob.id} of group {prefix}\n"
    assert await run("list") == "no dead letters\n"
    assert "a test order" in await run("show", str(bob.id))
    rows = json.loads(await run("list", "--state", "all", "--type", "bill.sent", "--json"))
    assert {UUID(row["id"]): row["state"] for row in rows} == {ann.id: "redriven", bob.id: "discarded"}
    assert json.loads(await run("list", "--state", "all", "--until", "2026-01-01", "--json")) == []
