"""The log seen from outside: topics, groups, lag, and events read without a group; the API and the command."""

import asyncio
import json
import os
import textwrap
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import SecretStr
from sqlalchemy.ext.compiler import compiles

from mainstay.cli import main
from mainstay.core import SYSTEM_CLOCK, App, Retry, bind
from mainstay.core.testing import eventually
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from mainstay.events import (
    Event,
    EventLog,
    EventPublisher,
    EventRouter,
    EventsModule,
    EventsSettings,
    TransportError,
    _in_hand,
    _sql_log,
)
from mainstay.events._transport import LogRecord
from mainstay.events.tables import LOG, OFFSETS

pytestmark = [
    pytest.mark.usefixtures("aiokafka_garbage"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # see the fixture
]


class Told(Event, type="tale.told", version="1.2", key="name"):
    name: str
    number: int = 0


Service = Callable[..., App]


@pytest.fixture(params=["sqlite", "postgres", "aiokafka", "confluent"])
def service(request: pytest.FixtureRequest, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    """Makes Apps of one log, whose events travel on the topic `prefix`; the environment has the same settings."""
    settings: dict[str, Any] = {"topics": {"tale.told": prefix}, "partitions": 3}
    database: DatabaseSettings | None = None
    if request.param in {"aiokafka", "confluent"}:
        servers = request.getfixturevalue("kafka")
        settings |= {"transport": "kafka", "outbox": False, "kafka_client": request.param, "kafka_servers": servers}
    else:
        url = f"sqlite+aiosqlite:///{tmp_path / 'events.db'}"
        if request.param == "postgres":
            url = request.getfixturevalue("postgres_url")
        database = DatabaseSettings(url=SecretStr(url))
        monkeypatch.setenv("MAINSTAY_DATABASE_URL", url)
    for name, value in settings.items():
        text = value if isinstance(value, str) else json.dumps(value)
        monkeypatch.setenv(f"MAINSTAY_EVENTS_{name.upper()}", text)

    def make(*routers: EventRouter) -> App:
        modules = [] if database is None else [DatabaseModule.for_root(database)]
        return App(*modules, EventsModule.for_root(EventsSettings(**settings)), EventsModule.for_feature(*routers))

    return make


async def _is(log: EventLog, state: str) -> bool:
    return (await log.groups())[0].state == state


async def _has_finished(log: EventLog, group: str) -> bool:
    return not any(each.events for each in await log.lag(group))


async def test_what_there_is_and_how_far_a_group_is(service: Service, prefix: str) -> None:
    """Topics with their events and readers, a group with its process and partitions, its lag in events and seconds."""
    router = EventRouter()
    handled: list[str] = []

    @router.on(Told, group=prefix)
    async def handle(event: Told) -> None:
        handled.append(event.name)

    app = service(router)
    async with app.running(serve=True):
        await app.get(EventPublisher).publish_batch([Told(name=f"n{number}") for number in range(6)])
        await eventually(lambda: len(handled) == 6)
        log = app.get(EventLog)
        (topic,) = await log.topics()
        assert (topic.name, topic.missing, topic.groups) == (prefix, False, [prefix])
        assert (topic.events, len(topic.partitions), topic.whole) == (6, 3, True)
        assert topic.keeps_seconds == 7 * 86_400
        await eventually(lambda: _is(log, "running"))
        await eventually(lambda: _has_finished(log, prefix))
        (group,) = await log.groups()
        assert group.handles == ["tale.told 1.x"]
        (member,) = group.members
        assert sorted(member.partitions) == [(prefix, 0), (prefix, 1), (prefix, 2)]
        lags = await log.lag(prefix)
        assert [(each.partition, each.events, each.seconds, each.first) for each in lags] == [
            (number, 0, 0.0, None) for number in range(3)
        ]
        assert all(each.holder == member for each in lags)
    async with app:
        log = app.get(EventLog)
        await app.get(EventPublisher).publish_batch([Told(name=f"m{number}") for number in range(4)])
        lags = await log.lag(prefix)
        assert sum(each.events for each in lags) == 4
        behind = [each for each in lags if each.events]
        assert all(each.first is not None and each.first.meta.type == "tale.told" for each in behind)
        assert all(each.holder is None for each in lags)
        assert {each.first.meta.key for each in behind if each.first is not None} <= {f"m{n}" for n in range(4)}
        assert await log.lag(f"{prefix}-other") == []
        await eventually(lambda: _is(log, "without members"))


async def test_events_are_read_without_a_group(service: Service, prefix: str) -> None:
    """The newest, those from a moment on, those of a key or a conversation, and those that come; no place is moved."""
    app = service()
    async with app:
        publisher, log = app.get(EventPublisher), app.get(EventLog)
        before = datetime.now(UTC) - timedelta(seconds=2)
        for number in range(30):
            with bind(correlation_id=f"c{number % 3}"):
                await publisher.publish(Told(name=f"n{number % 5}", number=number))

        def numbers(events: Sequence[Any]) -> list[int]:
            return [json.loads(event.value)["number"] for event in events]

        assert numbers(await log.newest([prefix], limit=100)) == list(range(30))
        assert numbers(await log.newest([prefix], limit=4)) == [26, 27, 28, 29]
        assert numbers(await log.newest([prefix], key="n2", limit=2)) == [22, 27]
        assert numbers(await log.newest([prefix], correlation_id="c1", limit=2)) == [25, 28]
        assert await log.newest([prefix], type="tale.untold") == []
        assert await log.newest([prefix], until=before) == []
        assert numbers(await log.newest([prefix], until=datetime.now(UTC) + timedelta(hours=1), limit=2)) == [28, 29]
        assert numbers(await log.since([prefix], before, limit=100)) == list(range(30))
        assert numbers(await log.since([prefix], before, limit=3)) == [0, 1, 2]
        assert numbers(await log.since([prefix], before, key="n4", limit=2)) == [4, 9]
        assert await log.since([prefix], before, until=before + timedelta(seconds=1)) == []
        assert await log.since([prefix], datetime.now(UTC) + timedelta(hours=1)) == []
        assert await log.newest([f"{prefix}-none"]) == []

        seen: list[int] = []

        async def follow() -> None:
            async for event in log.follow([prefix], limit=1):
                seen.extend(numbers([event]))

        following = asyncio.create_task(follow())
        await eventually(lambda: seen == [29])
        for number in range(30, 33):
            await publisher.publish(Told(name=f"n{number}", number=number))
        await eventually(lambda: sorted(seen) == [29, 30, 31, 32])
        following.cancel()
        await asyncio.wait((following,))
        groups = [each.name for each in await log.groups([prefix])]
        assert [await log.lag(each) for each in groups] == [[]]


async def test_looking_makes_no_topic(service: Service, prefix: str) -> None:
    """A topic that a handler reads and that is not there is named, and still is not there."""
    router = EventRouter()

    @router.on(Told, group=prefix)
    async def handle(event: Told) -> None: ...

    async with service():  # on SQLite there has to be a file
        pass
    app = service(router)
    for module in app.modules:
        module.only_looking()
    async with app:
        log = app.get(EventLog)
        assert [(each.name, each.missing) for each in await log.topics()] == [(prefix, True)]
        assert await log.newest([prefix]) == []
        assert await log.since([prefix], datetime.now(UTC) - timedelta(days=1)) == []
        assert [(each.name, each.missing) for each in await log.topics()] == [(prefix, True)]
        assert [(each.name, each.state) for each in await log.groups([prefix])] == [(prefix, "not begun")]


@asynccontextmanager
async def _open_transaction(app: App, event: Event) -> AsyncGenerator[None, None]:
    """An event that is published in a transaction which commits at the end of the block."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def publish() -> None:
        async with app.get(Database).transaction():
            await app.get(EventPublisher).publish(event)
            begun.set()
            await go_on.wait()

    task = asyncio.create_task(publish())
    await begun.wait()
    try:
        yield
    finally:
        go_on.set()
        await task


async def test_following_misses_nothing_that_commits_late(postgres_url: str, prefix: str) -> None:
    """An event whose position was passed over before its transaction was committed is shown when that is."""
    settings = EventsSettings(topics={"tale.told": prefix})
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(postgres_url)))
    async with App(database, EventsModule.for_root(settings)) as app:
        seen: list[str | None] = []

        async def follow() -> None:
            async for event in app.get(EventLog).follow([prefix]):
                seen.append(event.meta.key)  # noqa: PERF401  it has no end

        async with _open_transaction(app, Told(name="late")):
            await app.get(EventPublisher).publish(Told(name="soon"))
            following = asyncio.create_task(follow())
            await eventually(lambda: seen == ["soon"])
            await app.get(EventPublisher).publish(Told(name="next"))
            await eventually(lambda: seen == ["soon", "next"])
            assert [event.meta.key for event in await app.get(EventLog).newest([prefix])] == ["soon", "next"]
        await eventually(lambda: seen == ["soon", "next", "late"])
        following.cancel()
        await asyncio.wait((following,))


class Explain(sa.Executable, sa.ClauseElement):
    """How PostgreSQL would execute a statement."""

    inherit_cache = False

    def __init__(self, statement: sa.ClauseElement) -> None:
        self.statement = statement


@compiles(Explain)
def _explain(element: Explain, compiler: Any, **options: Any) -> str:
    return f"EXPLAIN {compiler.process(element.statement, **options)}"


async def test_no_statement_walks_through_a_large_log(
    database_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each statement looks at a bounded part of the log, by an index; what that leaves out is said."""
    monkeypatch.setattr(_sql_log, "_COUNTED", 10_000)
    router = EventRouter()

    @router.on(Told, group=prefix)
    async def handle(event: Told) -> None: ...

    module = EventsModule.for_root(EventsSettings(topics={"tale.told": prefix}, partitions=3))
    database_module = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(database_url)))
    async with App(database_module, module, EventsModule.for_feature(router)) as app:
        database, log = app.get(Database), app.get(EventLog)
        await app.get(EventPublisher).publish(Told(name="first"))
        many = (
            "INSERT INTO mainstay_events_log (topic, partition, key, value, headers, created_at) "
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 60000) "
            "SELECT 'noise', i % 3, NULL, NULL, '[]', "
            "(SELECT max(created_at) FROM mainstay_events_log) + i / 1000 FROM n"
        )
        async with database.transaction() as session:
            await session.execute(sa.text(many))
            # A group that was alive once and has read nothing.
            for number in range(3):
                place = {"group_name": "old", "topic": "noise", "partition": number}
                await session.execute(sa.insert(OFFSETS).values(**place, low="0:0:", high="0:0:", position=0))
        await app.get(EventPublisher).publish(Told(name="last"))
        shown = {each.name: each for each in await log.topics(["noise", prefix])}
        assert not shown["noise"].whole
        assert 0 < shown["noise"].events < 10_000
        assert [each.meta.key for each in await log.newest([prefix])] == ["first", "last"]
        start = (await database.read(sa.select(sa.func.min(LOG.c.created_at))))[0][0]
        late = datetime.fromtimestamp(start + 50, UTC)
        some = await log.since(["noise"], late, limit=10)
        assert {each.written_at for each in await log.newest(["noise"], until=late)} == {late - timedelta(seconds=1)}
        assert [each.written_at for each in some] == [late] * 10
        assert [each.meta.key for each in await log.since([prefix], late)] == []
        lags = await log.lag("old")
        assert not any(each.whole for each in lags)
        assert sum(each.events for each in lags) >= 9_999
        if database.dialect == "postgresql":
            await _look_at_plans(database)


async def _look_at_plans(database: Database) -> None:
    async with database.transaction() as session:
        await session.execute(sa.text("ANALYZE mainstay_events_log"))
    asked: dict[str, Any] = {
        "position": 30_000, "transaction": 0, "after": 20_000, "before": 22_000, "most": 1000, "topics": ["noise"],
        "positions": [3, 4], "transactions": [5],
    }  # fmt: skip
    for statement in (
        _sql_log._EXTENTS, _sql_log._ENDS, _sql_log._NEWEST_AFTER, _sql_log._OLDEST_EDGE, _sql_log._NEWEST_EDGE,
        _sql_log._ROWS["postgresql"], _sql_log._AT, _sql_log._WALK["postgresql"], _sql_log._LATE,
    ):  # fmt: skip
        names = statement.compile().params.keys()
        with_these = {name: asked[name] for name in names if name in asked}
        async with database.transaction() as session:
            plan = "\n".join((await session.execute(Explain(statement), with_these)).scalars())
        assert "Seq Scan on mainstay_events_log" not in plan, plan


async def test_a_cluster_that_is_away_is_named_in_one_message(client: str) -> None:
    """The error says which setting to mend, and is one of ours."""
    settings = EventsSettings(
        transport="kafka", kafka_client=client, kafka_servers="127.0.0.1:1", outbox=True, send_seconds=2
    )
    async with App(
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr("sqlite+aiosqlite://"))),
        EventsModule.for_root(settings),
    ) as app:
        with pytest.raises(TransportError, match=r"Kafka at 127\.0\.0\.1:1 cannot be asked"):
            await app.get(EventLog).topics()


async def test_a_database_without_tables_of_ours_is_left_alone(
    kafka: str, client: str, prefix: str, sqlite_url: str
) -> None:
    """On Kafka without an outbox an App may have a Database for other things."""
    settings = EventsSettings(transport="kafka", outbox=False, kafka_client=client, kafka_servers=kafka)
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url)))
    async with App(database, EventsModule.for_root(settings)) as app:
        (group,) = await app.get(EventLog).groups([prefix])
        assert (group.state, group.parked) == ("not begun", None)
        assert await app.get(EventLog).stuck(prefix) == []


# The command


async def _run(*arguments: str) -> int:
    """The command makes a loop of its own, so it runs in a thread."""
    return await asyncio.to_thread(main, ["events", *arguments])


@pytest.fixture
def named_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str) -> str:
    """A module with an App, configured by the environment."""
    (tmp_path / f"{prefix}.py").write_text(
        textwrap.dedent(f"""
            from mainstay.core import App
            from mainstay.database import DatabaseModule
            from mainstay.events import Event, EventRouter, EventsModule, EventsSettings

            class Sung(Event, type="{prefix}.sung", version="2.1", key="name"):
                name: str
                verses: int

            events = EventRouter()

            @events.on(Sung, group="{prefix}")
            async def listen(event: Sung) -> None: ...

            settings = EventsSettings()
            database = [] if settings.transport == "kafka" else [DatabaseModule.for_root()]
            app = App(*database, EventsModule.for_root(settings), EventsModule.for_feature(events))
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MAINSTAY_EVENTS_TOPICS", json.dumps({f"{prefix}.sung": prefix}))
    return f"{prefix}:app"


async def test_the_command_publishes_and_shows(
    service: Service,
    named_app: str,
    prefix: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`publish` reads the event by its class and `tail` shows it; the rest is told as tables and JSON."""
    async with service():  # migrated, on SQLite
        pass
    song = tmp_path / "song.json"
    song.write_text('{"name": "\\u001b[31mann", "verses": 3}')
    assert await _run("publish", f"{prefix}.sung", "--file", str(song), "--app", named_app, "--json") == 0
    published = json.loads(capsys.readouterr().out)
    assert (published["topic"], published["version"]) == (prefix, "2.1")
    song.write_text('{"name": "bob", "verses": "many secrets"}')
    assert await _run("publish", f"{prefix}.sung", "--file", str(song), "--app", named_app) == 2
    error = capsys.readouterr().err
    assert f"mainstay: {prefix}.sung cannot be read: verses: Input should be a valid integer" in error
    assert "secrets" not in error
    assert await _run("publish", f"{prefix}.danced", "--file", str(song), "--app", named_app) == 2
    assert f"declares no event of type {prefix}.danced" in capsys.readouterr().err

    assert await _run("tail", prefix) == 0
    page = capsys.readouterr().out
    assert f"{prefix}.sung 2.1  key \\x1b[31mann" in page
    assert f"id {published['id']}" in page
    assert '"verses":3' in page
    assert "\x1b" not in page
    assert await _run("tail", prefix, "--app", named_app) == 0
    assert "Sung(name='\\x1b[31mann', verses=3)" in capsys.readouterr().out
    assert await _run("tail", prefix, "--json", "--app", named_app) == 0
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert told["event"] == told["value"] == {"name": "\x1b[31mann", "verses": 3}
    assert (told["id"], told["correlation_id"], told["unreadable"]) == (published["id"], published["id"], None)
    assert await _run("tail", prefix, "--key", "nobody") == 0
    assert capsys.readouterr().out == "no events\n"
    assert await _run("tail", f"{prefix}-none") in {0, 2}
    assert await _run("tail", prefix, "--follow", "--until", "2026-01-01") == 2
    capsys.readouterr()

    assert await _run("topics", prefix, "--app", named_app) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["topic", "partition", "first", "last", "events"]
    assert len(lines) == 4
    assert await _run("topics", "--app", named_app, "--json") == 0
    (topic,) = json.loads(capsys.readouterr().out)
    assert (topic["topic"], topic["events"], topic["groups"], topic["missing"]) == (prefix, 1, [prefix], False)
    assert await _run("topics", "--app", named_app) == 0
    assert prefix in capsys.readouterr().out
    assert await _run("groups", "--app", named_app) == 0
    assert "not begun" in capsys.readouterr().out
    assert await _run("groups", f"{prefix}-none") == 2
    assert f"there is no group {prefix}-none" in capsys.readouterr().err
    assert await _run("lag", f"{prefix}-none") == 2
    capsys.readouterr()
    assert await _run("lag", "--json", "--app", named_app) == 0
    assert json.loads(capsys.readouterr().out) == []


async def test_a_missing_topic_is_a_finding(
    service: Service, named_app: str, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 1, and named."""
    async with service():
        pass
    assert await _run("topics", "--app", named_app) == 1
    assert "missing" in capsys.readouterr().out
    assert await _run("tail", prefix) == 2
    assert f"there is no topic {prefix}" in capsys.readouterr().err


async def test_groups_and_lag_while_a_service_runs(
    service: Service, named_app: str, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who takes part, since when, what it holds, and how far it is."""
    router = EventRouter()
    handled: list[str] = []

    @router.on(Told, group=prefix)
    async def handle(event: Told) -> None:
        handled.append(event.name)

    app = service(router)
    async with app.running(serve=True):
        await app.get(EventPublisher).publish(Told(name="ann"))
        await eventually(lambda: handled == ["ann"])
        assert await _run("groups", prefix) == 0
        page = capsys.readouterr().out
        assert "running" in page
        assert f"{prefix}/0, {prefix}/1, {prefix}/2" in page
        assert await _run("lag", prefix, "--json") == 0
        rows = json.loads(capsys.readouterr().out)
        assert [(row["group"], row["topic"], row["partition"]) for row in rows] == [
            (prefix, prefix, number) for number in range(3)
        ]
        assert all(row["held by"] for row in rows)


async def test_the_memory_transport_has_no_log_to_look_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another process cannot see it, and the command says so."""
    monkeypatch.setenv("MAINSTAY_EVENTS_TRANSPORT", "memory")
    assert await _run("topics") == 2
    assert "keeps nothing for other processes" in capsys.readouterr().err


# Why a group is stuck


async def test_why_a_group_is_stuck(
    service: Service, prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The event that hangs and the one that keeps failing: handler, attempt, since when, error, and which process.

    Without a Database it is the first unfinished event of the partition and its holder.
    """
    monkeypatch.setattr(_in_hand, "LONG_SECONDS", 0.2)
    router = EventRouter()
    go_on = asyncio.Event()

    @router.on(Told, group=prefix, retry=Retry(attempts=10, wait=lambda _: 3600.0))
    async def handle(event: Told) -> None:
        if event.name == "bad":
            msg = "out of paper"
            raise RuntimeError(msg)
        await go_on.wait()

    app = service(router)
    noted = "MAINSTAY_DATABASE_URL" in os.environ
    async with app.running(serve=True):
        log = app.get(EventLog)
        await app.get(EventPublisher).publish(Told(name="slow"))
        await app.get(EventPublisher).publish(Told(name="bad"))

        async def look() -> dict[str | None, Any]:
            return {each.key: each for each in await log.stuck(prefix, seconds=0.0)}

        async def is_told() -> bool:
            found = await look()
            told = found.get("slow") or found.get("bad")
            return told is not None and told.process is not None and (not noted or len(found) == 2)

        await eventually(is_told)
        found = await look()
        if noted:
            slow, bad = found["slow"], found["bad"]
            assert (slow.attempt, slow.why) == (1, "its handler has not returned")
            assert slow.handler.endswith("handle")
            assert slow.process.endswith(f":{os.getpid()}")
            assert "tried again at" in bad.why
            assert "RuntimeError: out of paper" in bad.why
        assert all((each.topic, each.type) == (prefix, "tale.told") for each in found.values())
        assert await _run("stuck", prefix, "--json") in {0, 1}  # those that have been waiting for some seconds
        json.loads(capsys.readouterr().out)
        if noted:
            assert await _run("stuck", prefix) == 1
            page = capsys.readouterr().out
            assert "key slow" in page
            assert "its handler has not returned" in page
            assert f"held by {slow.process}" in page
        go_on.set()
    assert await _run("stuck", f"{prefix}-none") == 2
    assert f"there is no group {prefix}-none" in capsys.readouterr().err


async def test_what_is_done_is_not_in_hand_any_more(database_url: str, prefix: str) -> None:
    """Notes are replaced, and nothing is written where nothing is in hand and nothing was."""
    database_module = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(database_url)))
    async with App(database_module, EventsModule.for_root(EventsSettings())) as app:
        database = app.get(Database)
        notes = _in_hand.InHand(database, prefix, {}, SYSTEM_CLOCK)
        record = LogRecord(prefix, 0, 7, b"k", b"{}", [("ce_type", b"tale.told"), ("ce_id", b"x")])
        error = RuntimeError("bad \0 \ud800")
        await notes.note([_in_hand.Held(record, 2, 9.0, error, 3.0)])
        (told,) = await app.get(EventLog).stuck(prefix)
        assert (told.offset, told.key, told.id, told.attempt) == (7, "k", "x", 2)
        assert "RuntimeError: bad" in told.why
        assert 8.0 < (datetime.now(UTC) - told.since).total_seconds() < 300.0
        await notes.note([])
        assert await app.get(EventLog).stuck(prefix) == []
