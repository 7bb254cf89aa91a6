"""`mainstay check` finds each planted fault before traffic does, and names the remedy."""

import asyncio
import contextlib
import json
import sqlite3
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import asyncpg
import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from sqlalchemy.engine import make_url

from mainstay.cli import main
from mainstay.core import Clock
from mainstay.core.testing import eventually
from mainstay.database import upgrade
from mainstay.database.schema import installed
from mainstay.database.testing import database

APP = """
from mainstay.core import App
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.events import Event, EventRouter, EventsModule
from mainstay.workflow import WorkflowModule

events = EventRouter()

class Lent(Event, type="book.lent", version="1.0", key="book"):
    book: str

@events.on(Lent, group="counts")
async def count(event: Lent) -> None: ...

@events.on(Lent, group="mails")
async def mail(event: Lent) -> None: ...

app = App(
    DatabaseModule.for_root(),
    EventsModule.for_root(),
    EventsModule.for_feature(events),
    WorkflowModule.for_root(),
)
"""

AUDITED = """
from mainstay.audit import AuditModule, AuditTrail
from mainstay.core import App
from mainstay.database import DatabaseModule
from mainstay.events import EventsModule
from mainstay.workflow import WorkflowModule

app = App(
    DatabaseModule.for_root(),
    EventsModule.for_root(),
    WorkflowModule.for_root(),
    AuditModule.for_root(),
    AuditModule.for_feature(AuditTrail()),
)
"""


@pytest.fixture
def checked(service, capsys):
    """The command, as findings."""

    async def check(status):
        place = service(APP)  # read anew, as by a process of its own
        assert await asyncio.to_thread(main, ["check", "--json", "--app", place]) == status
        return [f"{each['module']}: {each['finding']}" for each in json.loads(capsys.readouterr().out)]

    return check


def plain(url):
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


async def test_nothing_is_found_where_all_is_well(checked, postgres, monkeypatch):
    """A database that is there, up to date and writable."""
    await upgrade(postgres, installed())
    monkeypatch.setenv("MAINSTAY_DATABASE_URL", postgres)
    assert await checked(0) == []


async def test_a_database_that_is_away(checked, monkeypatch):
    """The address is named, without its password."""
    monkeypatch.setenv("MAINSTAY_DATABASE_URL", "postgresql://ann:hunter2@127.0.0.1:1/library")
    (finding,) = await checked(1)
    assert "127.0.0.1:1" in finding
    assert "MAINSTAY_DATABASE_URL" in finding
    assert "hunter2" not in finding


async def test_old_tables_are_found_and_left_as_they_are(checked, postgres, monkeypatch, tmp_path):
    """On both databases: the command is named, and nothing is migrated or made."""
    monkeypatch.setenv("MAINSTAY_DATABASE_URL", postgres)
    (finding,) = await checked(1)
    assert "mainstay db upgrade" in finding
    monkeypatch.setenv("MAINSTAY_DATABASE_URL", f"sqlite:///{tmp_path / 'none.db'}")
    (finding,) = await checked(1)
    assert "none.db" in finding
    assert not (tmp_path / "none.db").exists()


async def test_a_server_that_takes_no_writes(checked, postgres, monkeypatch):
    """A standby, or a database that was set to read-only."""
    await upgrade(postgres, installed())
    admin = await asyncpg.connect(plain(postgres))
    await admin.execute(f'ALTER DATABASE "{make_url(postgres).database}" SET default_transaction_read_only = on')
    await admin.close()
    monkeypatch.setenv("MAINSTAY_DATABASE_URL", postgres)
    (finding,) = await checked(1)
    assert "read-only" in finding or "read_only" in finding or "write" in finding


async def test_a_missing_grant(checked, postgres, monkeypatch):
    """The table, the right and the statement that grants it."""
    await upgrade(postgres, installed())
    admin = await asyncpg.connect(plain(postgres))
    role = f"clerk_{make_url(postgres).database}"
    try:
        await admin.execute(f'CREATE ROLE "{role}" LOGIN')
        await admin.execute(f'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO "{role}"')
        await admin.execute(f'GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO "{role}"')
        await admin.execute(f'REVOKE INSERT, DELETE ON mainstay_workflow_runs FROM "{role}"')
        url = make_url(postgres).set(username=role).render_as_string(hide_password=False)
        monkeypatch.setenv("MAINSTAY_DATABASE_URL", url)
        (finding,) = await checked(1)
        assert finding.startswith("workflow: ")
        assert "GRANT INSERT, DELETE ON mainstay_workflow_runs" in finding
    finally:
        await admin.execute(f'DROP OWNED BY "{role}"; DROP ROLE "{role}"')
        await admin.close()


async def test_a_pool_that_is_smaller_than_the_groups_need(checked, postgres, monkeypatch):
    """The setting is named."""
    await upgrade(postgres, installed())
    monkeypatch.setenv("MAINSTAY_DATABASE_URL", postgres)
    monkeypatch.setenv("MAINSTAY_DATABASE_POOL_SIZE", "1")
    (finding,) = await checked(1)
    assert "MAINSTAY_DATABASE_POOL_SIZE" in finding


async def test_a_clock_that_is_off(checked, monkeypatch, tmp_path):
    """By how much, and in which direction; here it is this process whose clock is wrong."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'library.db'}"
    async with database(url) as db:
        for schema in installed():
            await db.ensure_schema(schema)
    monkeypatch.setenv("MAINSTAY_DATABASE_URL", url)
    assert await checked(0) == []
    monkeypatch.setattr(Clock, "now", lambda _clock: datetime.now(UTC) + timedelta(seconds=90))
    (finding,) = await checked(1)
    assert "90 s behind" in finding
    assert "NTP" in finding


@pytest.mark.parametrize("command", ["check", "health"])
async def test_a_look_changes_nothing_that_is_stored(command, service, monkeypatch, tmp_path):
    """Before the first start: no row is written, and no file is made, such as a key for development."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'library.db'}"
    await upgrade(url, installed())
    monkeypatch.setenv("MAINSTAY_DATABASE_URL", url)
    place = service(AUDITED)
    before = stored(tmp_path)
    assert await asyncio.to_thread(main, [command, "--app", place]) == 0
    assert stored(tmp_path) == before


def stored(place):
    """The names of all files, without what Python compiled, and all rows of the database."""
    with contextlib.closing(sqlite3.connect(place / "library.db")) as connection:
        rows = list(connection.iterdump())
    names = {path.name for path in place.iterdir() if not path.name.endswith(("-wal", "-shm"))}
    return names - {"__pycache__"}, rows


async def test_topics_are_not_created_by_being_looked_for(checked, kafka, monkeypatch, tmp_path):
    """A broker creates what it is asked for, with one partition, and the service would then go on with that."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'library.db'}"
    await upgrade(url, installed())
    monkeypatch.setenv("MAINSTAY_DATABASE_URL", url)
    monkeypatch.setenv("MAINSTAY_EVENTS_TRANSPORT", "kafka")
    monkeypatch.setenv("MAINSTAY_EVENTS_KAFKA_SERVERS", kafka)
    monkeypatch.setenv("MAINSTAY_EVENTS_SOURCE", "orders")
    topic = f"check-{uuid4().hex}"
    monkeypatch.setenv("MAINSTAY_EVENTS_TOPICS", json.dumps({"book.lent": topic}))
    assert await checked(0) == []
    assert await checked(0) == []
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        assert topic not in await admin.list_topics()
    finally:
        await admin.close()


@pytest.mark.parametrize("create", [False, True])
async def test_topics_that_are_missing_or_too_narrow(checked, create, kafka, monkeypatch, tmp_path):
    """A missing one only where it would not be created; a narrow one where the settings say more."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'library.db'}"
    async with database(url) as db:
        for schema in installed():
            await db.ensure_schema(schema)
    monkeypatch.setenv("MAINSTAY_DATABASE_URL", url)
    monkeypatch.setenv("MAINSTAY_EVENTS_TRANSPORT", "kafka")
    monkeypatch.setenv("MAINSTAY_EVENTS_KAFKA_SERVERS", kafka)
    monkeypatch.setenv("MAINSTAY_EVENTS_SOURCE", "orders")
    topic = f"check-{uuid4().hex}"
    if create:
        admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
        await admin.start()
        await admin.create_topics([NewTopic(topic, 1, 1)])

        async def known() -> bool:
            return topic in await admin.list_topics()

        await eventually(known, what="the topic, which the controller knows before the broker does")
        await admin.close()
    monkeypatch.setenv("MAINSTAY_EVENTS_TOPICS", json.dumps({"book.lent": topic}))
    monkeypatch.setenv("MAINSTAY_EVENTS_KAFKA_CREATE_TOPICS", str(create))
    (finding,) = await checked(1)
    assert topic in finding
    assert ("1 partitions" in finding) is create
    monkeypatch.setenv("MAINSTAY_EVENTS_KAFKA_SERVERS", "127.0.0.1:1")
    (finding,) = await checked(1)
    assert "nothing listens at 127.0.0.1:1" in finding
    assert "MAINSTAY_EVENTS_KAFKA_SERVERS" in finding
