"""What is killed, stopped, restarted or cut off: acknowledged rows are there, writes are whole, errors are true."""

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from mainstay.core import App, ConfigurationError
from mainstay.core.testing import eventually
from mainstay.database import CommitUnknown, DatabaseError, DatabaseModule, DatabaseSettings, DatabaseUnavailable, Lease
from mainstay.database.testing import database
from mainstay_servers.frozen import frozen
from mainstay_servers.postgres import fresh_database

CHILD = Path(__file__).parent / "child.py"


@pytest.fixture
def spawn_child():
    """Start `child.py` in a process of its own; killed at the end of the test."""
    children: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, str(CHILD), *map(str, arguments)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        children.append(child)
        return child

    yield start
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        child.communicate()


@pytest.fixture(params=["file", "postgres"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database that processes can share."""
    if request.param == "file":
        return f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"
    return str(request.getfixturevalue("postgres"))


async def line(child: subprocess.Popen[str]) -> str:
    """The next line a child says."""
    assert child.stdout is not None
    async with asyncio.timeout(30):
        return str(await asyncio.to_thread(child.stdout.readline)).strip()


async def ask(child: subprocess.Popen[str], text: object) -> str:
    """Say something to a child and return what it answers."""
    assert child.stdin is not None
    child.stdin.write(f"{text}\n")
    child.stdin.flush()
    return await line(child)


async def taken(db, name: str) -> Lease:
    """The lease, as soon as it is free."""
    async with asyncio.timeout(20):
        while True:
            lease: Lease | None = await db.lease(name, seconds=30.0)
            if lease is not None:
                return lease
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("acknowledged", [3, 200, 900])
async def test_a_killed_writer_loses_nothing_acknowledged(shared, open_database, tables, spawn_child, acknowledged):
    """After SIGKILL every row that was acknowledged is there, and no batch is there in part."""
    async with open_database(shared) as db:
        child = spawn_child("write", shared, 0, 20)
        said = [int(await line(child)) for _ in range(acknowledged)]
        os.kill(child.pid, signal.SIGKILL)
        said += [int(word) for word in (await asyncio.to_thread(child.stdout.read)).split("\n") if word]
        rows = {row.id for row in await db.read(sa.select(tables.notes.c.id))}
        assert {number + j for number in said for j in range(3)} <= rows
        assert all({row - row % 3 + j for j in range(3)} <= rows for row in rows)
        await db.write(tables.add, {"id": 10**9, "text": "the file is fine"})


async def test_two_processes_on_one_database(shared, open_database, tables, spawn_child, count):
    """Units of work and writes of two processes and of this one all come through, none of them busy or lost."""
    async with open_database(shared) as db:
        children = [spawn_child("units", shared, (n + 1) * 1_000_000, 60) for n in range(2)]
        mine = 0
        while any(child.poll() is None for child in children):
            await asyncio.gather(*(db.write(tables.add, {"id": mine + i, "text": "mine"}) for i in range(20)))
            mine += 20
            async with db.transaction():
                await db.write(tables.add, {"id": mine, "text": "mine"})
            mine += 1
            await asyncio.sleep(0.005)
        assert [child.stdout.read().strip() for child in children] == ["done", "done"]
        assert await count(db) == 2 * 120 + mine


async def test_a_killed_holders_lease_is_taken_over(shared, open_database, spawn_child):
    """After SIGKILL another process gets the lease within its time and a little, with the next epoch."""
    async with open_database(shared) as db:
        child = spawn_child("hold", shared, "work", 1.0)
        assert await line(child) == "epoch 1"
        assert await db.lease("work", seconds=1.0) is None
        os.kill(child.pid, signal.SIGKILL)
        killed = time.monotonic()
        lease = await taken(db, "work")
        assert lease.epoch == 2
        assert 0.3 < time.monotonic() - killed < 60


async def test_a_stopped_holder_is_fenced_off(shared, open_database, spawn_child, count):
    """After SIGSTOP, takeover and SIGCONT the old holder does not believe in its lease, and could not write with it."""
    async with open_database(shared) as db:
        child = spawn_child("hold", shared, "work", 1.0)
        assert await line(child) == "epoch 1"
        assert await ask(child, 1) == "True written"
        async with frozen(child.pid, shared):
            lease = await taken(db, "work")
        assert await ask(child, 2) == "False lost"
        assert lease.held
        assert await count(db) == 1


async def test_processes_that_start_at_once(shared, spawn_child):
    """Four processes start at the same moment on one database: each comes up and can write (SQLite migrates there)."""
    if shared.startswith("postgres"):
        async with database(shared):
            pass
    at = time.time() + 2.5
    children = [spawn_child("start", shared, at) for _ in range(4)]
    assert [await line(child) for child in children] == ["started True"] * 4


async def test_a_database_that_restarts_under_load(own_postgres, open_database, tables, until):
    """Writes that meet a restart are repeated or fail truthfully; none that was acknowledged is lost, none doubled."""
    with fresh_database(own_postgres.url) as url:
        async with open_database(url, busy_timeout_seconds=20) as db:
            lease = await db.lease("through the restart", seconds=30.0)
            stop = asyncio.Event()
            written: set[int] = set()
            unknown: set[int] = set()
            claims: list[bool] = []

            async def writing(task: int) -> None:
                i = 0
                while not stop.is_set():
                    number = task * 1_000_000 + i
                    i += 1
                    try:
                        await db.write(tables.add, {"id": number, "text": "x"})
                        written.add(number)
                    except CommitUnknown:
                        unknown.add(number)

            async def units() -> None:
                i = 0
                while not stop.is_set():
                    i += 1
                    try:
                        async with db.transaction():
                            await db.write(tables.add, {"id": -i, "text": "unit"})
                        written.add(-i)
                    except CommitUnknown:
                        unknown.add(-i)
                    except DatabaseError as error:
                        claims.append(error.no_effect)
                        await asyncio.sleep(0.02)

            tasks = [asyncio.create_task(writing(task)) for task in range(1, 21)] + [asyncio.create_task(units())]
            for restart in (own_postgres.restart, lambda: (own_postgres.kill(), own_postgres.start())):
                before = len(written)
                await until(lambda before=before: len(written) >= before + 500)
                await asyncio.to_thread(restart)
            before = len(written)
            await until(lambda: len(written) >= before + 500)
            stop.set()
            async with asyncio.timeout(20):
                await asyncio.gather(*tasks)
            rows = {row.id for row in await db.read(sa.select(tables.notes.c.id))}
            assert written <= rows <= written | unknown
            assert all(claims)
            assert lease.held
            assert (await db.health()).status == "ok"


async def test_a_database_that_stays_away(own_postgres, open_database, tables):
    """Writes, units and reads fail with DatabaseUnavailable within their time, health says down, and all comes back."""
    with fresh_database(own_postgres.url) as url:
        async with open_database(url, busy_timeout_seconds=1.0) as db:
            await asyncio.to_thread(own_postgres.kill)
            begun = time.monotonic()
            for use in (
                lambda: db.write(tables.add, {"id": 1, "text": "x"}),
                lambda: db.write(tables.add, {"id": 1, "text": "x"}),
                lambda: db.read(sa.select(tables.notes)),
                lambda: _unit(db, tables),
                lambda: db.lease("x"),
            ):
                with pytest.raises(DatabaseUnavailable) as caught:
                    await use()
                assert caught.value.no_effect
                assert caught.value.retryable
            assert time.monotonic() - begun < 60
            assert (await db.health()).status == "down"
            await asyncio.to_thread(own_postgres.start)
            await db.write(tables.add, {"id": 2, "text": "x"})
            await _unit(db, tables)
            assert (await db.health()).status == "ok"


async def test_an_outage_is_two_lines_about_leases(own_postgres, open_database, caplog):
    """Renewal is tried many times a second; the log says that it fails, and that it works again."""
    caplog.set_level(logging.INFO, logger="mainstay.database")

    def said(text: str) -> int:
        return sum(text in record.getMessage() for record in caplog.records)

    with fresh_database(own_postgres.url) as url:
        async with open_database(url) as db:
            lease = await db.lease("outage", seconds=5.0)
            assert lease is not None
            await asyncio.to_thread(own_postgres.kill)
            await eventually(lambda: not lease.held, what="the lease's end")
            await asyncio.to_thread(own_postgres.start)
            await eventually(lambda: said("leases are renewed again") == 1, what="a renewal")
            assert said("leases could not be renewed") == 1


async def test_a_database_that_hangs(own_postgres, open_database, tables, count):
    """A server that stopped answering is given up after a while: writes fail, later ones work, and a stop ends."""
    with fresh_database(own_postgres.url) as url:
        async with open_database(url, busy_timeout_seconds=0.4) as db:
            await db.write(tables.add, {"id": 1, "text": "x"})
            own_postgres.pause()
            begun = time.monotonic()
            results = await asyncio.gather(
                *(db.write(tables.add, {"id": i, "text": "x"}) for i in range(2, 12)), return_exceptions=True
            )
            assert {type(result) for result in results} <= {CommitUnknown, DatabaseUnavailable}
            assert time.monotonic() - begun < 60
            own_postgres.resume()
            await db.write(tables.add, {"id": 100, "text": "x"})
            assert await count(db, tables.notes.c.id == 100) == 1
            own_postgres.pause()
            begun = time.monotonic()
        assert time.monotonic() - begun < 60
        own_postgres.resume()


async def test_many_behind_a_pooler(pgbouncer, open_database, tables, count):
    """Fifty tasks of two Databases share fewer server connections than there are of them; nothing gets mixed up."""
    async with open_database(pgbouncer) as one, database(pgbouncer) as two:

        async def work(db, first: int) -> None:
            for i in range(first, first + 6):
                async with db.transaction() as session:
                    await db.write(tables.add, {"id": 2 * i, "text": str(i)})
                    found = sa.select(tables.notes.c.text).where(tables.notes.c.id == 2 * i)
                    assert (await session.execute(found)).scalar_one() == str(i)
                await db.write(tables.add, {"id": 2 * i + 1, "text": str(i)})
                rows = await db.read(sa.select(tables.notes.c.text).where(tables.notes.c.id == 2 * i + 1))
                assert [row.text for row in rows] == [str(i)]

        lease = await one.lease("pooled", seconds=1.0)
        await asyncio.gather(*(work(db, n * 1_000 + k * 10) for n, db in enumerate((one, two)) for k in range(25)))
        assert await count(one) == 2 * 25 * 12
        assert lease is not None
        assert lease.held


async def _unit(db, tables):
    async with db.transaction():
        await db.write(tables.add, {"id": 3, "text": "x"})


class Wire:
    """A PostgreSQL server's address that cuts the connection on which a given word passes, so many times.

    With `after` the word reaches the server and its answer is lost; without, it is the word that is lost.
    """

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        self.word = b""
        self.after = False
        self.cuts = 0

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = urlunsplit(self._parts._replace(netloc=f"postgres@127.0.0.1:{port}"))
        return self

    async def __aexit__(self, *details):
        self._server.close()

    def cut(self, word: bytes, *, after: bool, times: int = 1) -> None:
        self.word, self.after, self.cuts = word, after, times

    async def _serve(self, reader, writer):
        upstream_reader, upstream = await asyncio.open_connection(self._parts.hostname, self._parts.port)
        heard = asyncio.Event()
        heard.set()
        answers = asyncio.create_task(self._answer(upstream_reader, writer, heard))
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                cut = self.cuts and self.word in data
                if cut:
                    self.cuts -= 1
                    heard.clear()
                if not cut or self.after:
                    upstream.write(data)
                if cut:
                    if self.after:
                        await answers
                    break
        answers.cancel()
        writer.close()
        upstream.close()

    async def _answer(self, reader, writer, heard):
        with contextlib.suppress(ConnectionError):
            while (data := await reader.read(65536)) and heard.is_set():
                writer.write(data)
            writer.close()


async def test_a_connection_lost_before_the_commit_is_nobodys_concern(postgres, open_database, tables, count):
    """The recorder repeats a batch whose connection was cut before COMMIT was sent: it is there once, none is told."""
    async with open_database(postgres) as direct, Wire(postgres) as wire, database(wire.url) as db:
        await db.write(tables.add, {"id": 0, "text": "x"})
        for times, first in ((1, 100), (3, 200)):
            wire.cut(b"BEGIN", after=True, times=times)
            adds = (db.write(tables.add, {"id": first + i, "text": "x"}) for i in range(50))
            await asyncio.gather(*adds, db.write(tables.touch, {"which": 0}))
        wire.cut(b"COMMIT", after=False)
        adds = (db.write(tables.add, {"id": 300 + i, "text": "x"}) for i in range(50))
        results = await asyncio.gather(*adds, db.write(tables.touch, {"which": 0}), return_exceptions=True)
        # The word was lost, not its answer; but that cannot be known from here.
        assert {type(result) for result in results} == {CommitUnknown}
        assert await count(direct) == 101


async def test_a_connection_lost_while_committing_is_unknown(postgres, open_database, tables, count):
    """Entries whose commit was never answered raise CommitUnknown, those that had failed before say so."""
    async with open_database(postgres) as direct, Wire(postgres) as wire, database(wire.url) as db:
        await db.write(tables.own, {"id": 1, "epoch": 2})
        wire.cut(b"COMMIT", after=True)
        results = await asyncio.gather(
            *(db.write(tables.add, {"id": i, "text": "x"}) for i in range(10)),
            db.write(tables.touch, {"which": 0}),  # takes the whole batch the long way
            db.write(tables.add, {"id": 100, "text": "x"}, fence=tables.fences.at(1, 1)),
            return_exceptions=True,
        )
        assert [type(result).__name__ for result in results] == ["CommitUnknown"] * 11 + ["FenceLost"]
        assert isinstance(results[0], CommitUnknown)
        assert not results[0].no_effect
        assert await count(direct) == 10
        wire.cut(b"COMMIT", after=True)
        with pytest.raises(CommitUnknown):
            async with db.transaction():
                await db.write(tables.add, {"id": 200, "text": "x"})
        assert await count(direct) == 11
        wire.cut(b"INSERT", after=True)
        with pytest.raises(DatabaseUnavailable) as caught:
            async with db.transaction():
                await db.write(tables.add, {"id": 300, "text": "x"}, fence=tables.fences.at(1, 2))
        assert caught.value.no_effect
        assert await count(direct) == 11
        await db.write(tables.add, {"id": 400, "text": "x"})
        wire.cut(b"", after=True)
        with pytest.raises(CommitUnknown):
            await db.write(tables.add, {"id": 401, "text": "alone, one statement is its own commit"})


async def test_a_connection_lost_during_a_batch_of_one_statement_is_unknown(postgres, open_database, tables, count):
    """Whether it was carried out is not known from here, with its answer lost or with the statement itself."""
    async with open_database(postgres) as direct, Wire(postgres) as wire, database(wire.url) as db:
        await db.write(tables.own, {"id": 1, "epoch": 2})
        for after, there in ((False, 0), (True, 10)):
            fence = tables.fences.at(1, 2)
            before = await count(direct)
            await db.write(tables.add, {"id": 100 + after, "text": "so that it is prepared"}, fence=fence)
            wire.cut(b"", after=after)
            adds = (db.write(tables.add, {"id": i, "text": "x"}, fence=fence) for i in range(10))
            results = await asyncio.gather(*adds, return_exceptions=True)
            assert {type(result) for result in results} == {CommitUnknown}
            await until_there(direct, count, before + 1 + there)


async def until_there(db, count, number: int) -> None:
    """The server goes on with a statement whose client is gone."""
    async with asyncio.timeout(30):
        while await count(db) != number:  # noqa: ASYNC110  it is another process
            await asyncio.sleep(0.01)


async def test_a_start_without_a_database(tmp_path):
    """It fails at once, naming the module, the address without its secrets, and what to set."""
    for url in (
        "postgresql://me:hunter2@127.0.0.1:1/db?password=hunter2",
        f"sqlite:///{tmp_path}/no/such/folder/x.db",
        "postgresql://me:hunter2@127.0.0.1:1/db?sslmode=require&application_name=hunter2",
    ):
        with pytest.raises(ConfigurationError) as caught:
            async with App(DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url)))):
                pytest.fail("there is no database")
        text = "".join([str(caught.value), repr(caught.value), *getattr(caught.value, "__notes__", [])])
        assert "DatabaseModule" in text
        assert "MAINSTAY_DATABASE_URL" in text
        assert "hunter2" not in text
