"""The commands that look, at what others write and in a terminal: as their classes read it, until Ctrl-C."""

import asyncio
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from pydantic import SecretStr

from mainstay.cli import main
from mainstay.core import App
from mainstay.core.drain import Drain
from mainstay.core.testing import VirtualClock, eventually
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from mainstay.events import EventLog, EventsModule, EventsSettings, _in_hand
from mainstay.events import log as log_file
from mainstay.events._decoding import Decoders, Foreign, NoSchemas
from mainstay.events._sql import SqlTransport
from mainstay.events._transport import LogRecord
from mainstay.events.foreign import Plain
from mainstay.events.metadata import Outgoing

from .registry import registry

SERVICE = """
from decimal import Decimal
from typing import Any

from mainstay.core import App
from mainstay.database import DatabaseModule
from mainstay.events import Event, EventRouter, EventsModule
from mainstay.events.foreign import Debezium, Plain

events = EventRouter()

class BillChanged(Event, type="bill.changed", topic="bills", key="id", decoder=Debezium("bill")):
    id: int
    amount: Decimal

class Poured(Event, type="tea.poured", version="2.0", topic="tea", key="cup"):
    cup: str
    spoons: int

class Measured(Event, type="acme.Measured", topic="measures", decoder=Plain(format="avro")):
    n: int

@events.upcast(Poured, from_=1)
def with_sugar(old: dict[str, Any]) -> dict[str, Any]:
    return {**old, "spoons": 2}

@events.on(BillChanged, Poured, Measured, group="office")
async def handle(event: Event) -> None: ...

app = App(DatabaseModule.for_root(), EventsModule.for_root(), EventsModule.for_feature(events))
"""


async def _run(*arguments: str) -> int:
    """The command makes a loop of its own, so it runs in a thread."""
    return await asyncio.to_thread(main, ["events", *arguments])


@pytest.fixture
def named_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str, sqlite_url: str) -> str:
    """A service that reads topics of others, as the commands are told of it, on SQLite."""
    (tmp_path / f"{prefix}.py").write_text(textwrap.dedent(SERVICE))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)  # where a process of its own looks for it
    monkeypatch.setenv("MAINSTAY_DATABASE_URL", sqlite_url)
    monkeypatch.setenv("MAINSTAY_EVENTS_PARTITIONS", "1")
    monkeypatch.setenv("MAINSTAY_EVENTS_REGISTRY_URL", "http://127.0.0.1:1")
    return f"{prefix}:app"


async def written(url: str, *records: Outgoing) -> None:
    """Have records in the log."""
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url)))
    async with App(database, EventsModule.for_root(EventsSettings())) as app:
        await app.get(SqlTransport).send(records)


def row(amount: str) -> bytes:
    """A change of Debezium."""
    return f'{{"op": "u", "after": {{"id": 7, "amount": {amount}}}}}'.encode()


async def test_what_others_write_is_shown_as_its_class_reads_it(
    named_app: str, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its decoder and upcasters, with all digits; what cannot be read has its reason, and nothing ends `tail`."""
    old = [("ce_type", b"tea.poured"), ("ce_dataversion", b"1.0"), ("ce_id", b"1")]
    odd = [*old[:1], ("ce_id", b"2"), ("ce_dataversion", b"x"), ("ce_time", b"0001-01-01T00:00:00+14:00")]
    deep = b"[" * 100_000
    with registry() as server:
        server.fails = 0
        monkeypatch.setenv("MAINSTAY_EVENTS_REGISTRY_URL", server.url)
        await written(
            sqlite_url,
            Outgoing("bills", b'{"id": 7}', row("12345678901234567.89"), []),
            Outgoing("bills", b'{"id": 7}', None, []),
            Outgoing("bills", b'{"id": 7}', b"\x1b[2J\xff", []),
            Outgoing("tea", b"a", b'{"cup": "a"}', old),
            Outgoing("tea", b"a", b"{}", odd),
            Outgoing("tea", b"a", deep, old),
            *[Outgoing("measures", b"a", b"\0\0\0\0\1\x0e", [])] * 3,
        )
        assert await _run("tail", "bills", "tea", "--app", named_app) == 0
        page = capsys.readouterr().out
        assert "BillChanged(id=7, amount=Decimal('12345678901234567.89'))" in page
        assert "bill.changed 1.0  key 7" in page
        assert "Poured(cup='a', spoons=2)" in page
        assert "the value is no JSON: it is not UTF-8" in page
        assert "version 'x' must be two numbers" in page
        assert "\x1b" not in page
        assert await _run("tail", "bills", "tea", "--app", named_app, "--json") == 0
        told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert next(each["value"] for each in told if each["type"] == "bill.changed") == {
            "id": 7,
            "amount": "12345678901234567.89",
        }
        assert [each["event"] for each in told if each["offset"] == 4] == [{"cup": "a", "spoons": 2}]
        assert [each["value"] for each in told if each["offset"] == 6] == [deep.decode()]
        (gone,) = [each for each in told if each["offset"] == 2]
        assert (gone["type"], gone["value"], gone["event"], gone["unreadable"]) == ("", None, None, None)
        # Without the App nothing is known of it, and it is shown as it is kept.
        assert await _run("tail", "bills", "--json", "--limit", "3") == 0
        raw = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert raw[0]["value"]["after"]["amount"] == "12345678901234567.89"
        assert await _run("lag", "--app", named_app, "--json") == 0
        capsys.readouterr()

        monkeypatch.setattr(log_file, "_SCHEMA_SECONDS", 0.2)  # a registry that is away
        assert await _run("tail", "measures", "--app", named_app) == 0
        page = capsys.readouterr().out
        assert page.count("acme.Measured") == 3
        assert page.count(f"the schema registry at {server.url}") == 3
        monkeypatch.setattr(log_file, "_SCHEMA_SECONDS", 60.0)
        server.fails = None
        server.add("m", {"schema": '{"type":"record","name":"acme.Measured","fields":[{"name":"n","type":"int"}]}'})
        assert await _run("tail", "measures", "--app", named_app) == 0
        assert capsys.readouterr().out.count("Measured(n=7)") == 3


async def test_a_time_that_no_calendar_has_ends_no_look(kafka: str, prefix: str, client: str) -> None:
    """A producer may write microseconds for milliseconds, and a person may ask for what was before 1970."""
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    producer = AIOKafkaProducer(bootstrap_servers=kafka)
    await producer.start()
    try:
        late = {"message.timestamp.after.max.ms": str(2**63 - 1)}
        await admin.create_topics([NewTopic(prefix, 1, 1, topic_configs=late)])
        await producer.send_and_wait(prefix, b"{}", timestamp_ms=1_740_477_600_000_000)
        await producer.send_and_wait(prefix, b"{}")
    finally:
        await producer.stop()
        await admin.close()
    settings = EventsSettings(transport="kafka", outbox=False, kafka_client=client, kafka_servers=kafka)
    async with App(EventsModule.for_root(settings)) as app:
        log = app.get(EventLog)
        for found in (
            await log.newest([prefix]),
            await log.since([prefix], datetime(1950, 1, 1, tzinfo=UTC)),
            await log.since([prefix], datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC)),
        ):
            assert {each.meta.offset for each in found} == {0, 1}
            assert max(each.written_at for each in found).year == 9999


async def test_why_a_group_is_stuck_names_what_others_wrote(sqlite_url: str, prefix: str) -> None:
    """The type and the key as the topic's decoder reads them; what cannot be read yet is noted as it is."""
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url)))
    decoders = Decoders({prefix: Foreign(Plain("stock.counted"), "stock.counted")}, NoSchemas())
    clock = VirtualClock()
    async with App(database, EventsModule.for_root(EventsSettings())) as app:
        notes = _in_hand.InHand(app.get(Database), prefix, {"stock.counted": "office.count"}, clock, decoders)
        record = LogRecord(prefix, 0, 7, b'{"item": "84406"}', b"{}", [])
        await notes.note([_in_hand.Held(record, 2, 9.0, None, None)])
        (told,) = await app.get(EventLog).stuck(prefix)
        assert (told.type, told.key, told.handler) == ("stock.counted", "84406", "office.count")


class Idle:
    """A dispatcher that has nothing in hand, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.ages = self

    def of(self, _assignments: Any) -> list[Any]:
        """See `Ages`."""
        self.asked += 1
        return []


async def test_what_is_in_hand_is_noted_by_the_clock_of_the_app(sqlite_url: str, prefix: str) -> None:
    """Every five of its seconds, and no more once the App ends."""
    clock = VirtualClock()
    drain, idle = Drain(clock), Idle()
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url)))
    async with App(database, EventsModule.for_root(EventsSettings())) as app:
        notes = _in_hand.InHand(app.get(Database), prefix, {}, clock)
        noting = asyncio.create_task(notes.run(idle, list, drain))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  it is no dispatcher
        await asyncio.sleep(0)

        async def asked() -> bool:  # the notes themselves are written in real time
            await clock.advance(2.5)
            return idle.asked == 2

        await clock.advance(4.9)
        assert idle.asked == 0
        await eventually(asked, seconds=60)
        drain.begin()
        await asyncio.wait_for(noting, 60)


IN_ITS_TERMINAL = """
import asyncio, faulthandler, fcntl, os, signal, sys, termios
signal.signal(signal.SIGUSR1, lambda *_: [(print(task), task.print_stack()) for task in asyncio.all_tasks()])
faulthandler.register(signal.SIGUSR2)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it, and its children would
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from mainstay.cli import main
sys.exit(main())
"""


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, leader: int, process: "subprocess.Popen[bytes]") -> None:
        self.leader = leader
        self.process = process
        self.shown = b""

    def until(self, text: bytes, times: int = 1) -> None:
        """Wait until it has shown a text so often."""
        end = time.monotonic() + 60
        while self.shown.count(text) < times:
            assert time.monotonic() < end, self.shown
            if select.select([self.leader], [], [], 0.2)[0]:
                self.shown += os.read(self.leader, 65536)

    def interrupted(self) -> int:
        """Press Ctrl-C; its exit status, once all that it showed was read."""
        os.write(self.leader, b"\x03")
        try:
            status = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGUSR2)  # its threads, also where none runs Python
            self.until(b"Current thread")
            self.process.send_signal(signal.SIGUSR1)  # and its tasks, where it still runs Python
            self.until(b"<Task")
            pytest.fail(f"it does not end; it has shown {self.shown.decode(errors='replace')}")
        while select.select([self.leader], [], [], 0)[0]:
            self.shown += os.read(self.leader, 65536)
        return status


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    """Run the command in a terminal, which must be left as it was found."""
    leader, follower = pty.openpty()
    before = termios.tcgetattr(follower)
    command = [sys.executable, "-c", IN_ITS_TERMINAL, "events", *arguments]
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower)
    try:
        yield Terminal(leader, process)
        assert termios.tcgetattr(follower) == before
    finally:
        process.kill()
        process.wait()
        os.close(follower)
        os.close(leader)


async def test_following_and_watching_go_on_until_ctrl_c(named_app: str, sqlite_url: str) -> None:
    """What comes is shown, the status is that of an interrupted command, and the terminal is left clean."""
    tea = Outgoing("tea", b"a", b'{"cup": "a"}', [("ce_type", b"tea.poured"), ("ce_id", b"1")])
    await written(sqlite_url, tea)

    def watch() -> None:
        with (
            terminal("tail", "tea", "--follow", "--app", named_app) as tail,
            terminal("lag", "--watch", "--app", named_app) as lag,
        ):
            tail.until(b"Poured(cup='a', spoons=2)")
            lag.until(b"\x1b[2J\x1b[H", times=2)  # it has looked again
            asyncio.run(written(sqlite_url, tea._replace(value=b'{"cup": "b"}')))
            tail.until(b"Poured(cup='b', spoons=2)")
            for command in (tail, lag):
                assert command.interrupted() == 130
                assert b"Traceback" not in command.shown
                assert not re.search(rb"\x1b\[\?(25l|1049h)", command.shown)  # no cursor hidden, no other screen
                assert command.shown.endswith((b"\n", b"^C"))

    await asyncio.to_thread(watch)


async def test_a_reader_that_goes_ends_what_follows(named_app: str, sqlite_url: str) -> None:
    """As `head` does: with the status of a pipe that is gone, and without a word."""
    tea = Outgoing("tea", b"a", b'{"cup": "a"}', [("ce_type", b"tea.poured"), ("ce_id", b"1")])
    await written(sqlite_url, tea)
    command = [sys.executable, "-c", "import sys; from mainstay.cli import main; sys.exit(main())"]

    def pipe() -> tuple[int, bytes]:
        process = subprocess.Popen(
            [*command, "events", "tail", "tea", "--follow", "--app", named_app],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert b"tea.poured" in process.stdout.readline()
            process.stdout.close()
            asyncio.run(written(sqlite_url, tea))
            return process.wait(60), process.stderr.read()
        finally:
            process.kill()
            process.wait()
            process.stderr.close()

    assert await asyncio.to_thread(pipe) == (141, b"")
