"""The servers themselves: they keep port and data, they hang when told to, and nothing outlives the run."""

import asyncio
import os
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from mainstay_servers import (
    Databases,
    Kafka,
    MissingServer,
    Postgres,
    Redis,
    SecureKafka,
    flush,
    fresh_database,
    install,
)
from mainstay_servers.frozen import frozen


def _until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.02)


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def _query(url: str, statement: str) -> Any:
    connection = await asyncpg.connect(url.replace("+asyncpg", ""), timeout=10)
    try:
        return await connection.fetch(statement)
    finally:
        await connection.close()


async def test_postgres_keeps_committed_rows_over_a_kill(own_postgres: Postgres):
    """What was committed before SIGKILL is there after the start on the same address."""
    await _query(own_postgres.url, "CREATE TABLE kept (id int)")
    await _query(own_postgres.url, "INSERT INTO kept VALUES (7)")
    port = own_postgres.port
    own_postgres.kill()
    assert not _listening(port)
    own_postgres.start()
    assert own_postgres.port == port
    assert [row["id"] for row in await _query(own_postgres.url, "SELECT id FROM kept")] == [7]


async def test_postgres_kill_takes_its_backends_along(own_postgres: Postgres):
    """A connection that was open when the server was killed is closed by it, not left hanging."""
    connection = await asyncpg.connect(own_postgres.url.replace("+asyncpg", ""))
    own_postgres.kill()
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, ConnectionError)):
        await connection.fetch("SELECT 1")
    await connection.close(timeout=1)


async def test_paused_postgres_hangs_its_open_connections(own_postgres: Postgres):
    """A paused server accepts nothing new and answers nothing old until it is resumed."""
    connection = await asyncpg.connect(own_postgres.url.replace("+asyncpg", ""))
    own_postgres.pause()
    with pytest.raises(TimeoutError):
        await connection.fetch("SELECT 1", timeout=0.2)
    own_postgres.resume()
    assert await _query(own_postgres.url, "SELECT 1 AS one")
    await connection.close(timeout=5)


async def test_each_test_has_an_empty_database_of_its_own(postgres: str):
    """Two databases at a time share nothing, and a dropped one is gone though a client is connected."""
    await _query(postgres, "CREATE TABLE mine (id int)")
    with fresh_database(postgres) as other:
        assert await _query(other, "SELECT 1 FROM pg_tables WHERE tablename = 'mine'") == []
        left_open = await asyncpg.connect(other.replace("+asyncpg", ""))
    with pytest.raises(asyncpg.InvalidCatalogNameError):
        await _query(other, "SELECT 1")
    left_open.terminate()


async def test_a_database_is_handed_on_empty(own_postgres: Postgres):
    """What a test left (tables, schemas, an open transaction with locks) is gone for the next, in the same database."""
    databases = Databases(own_postgres.url)
    with databases.fresh() as first:
        await _query(first, "CREATE SCHEMA extra CREATE TABLE one (id int)")
        await _query(first, "CREATE TABLE two (id int)")
        holder = await asyncpg.connect(first.replace("+asyncpg", ""))
        await holder.execute("BEGIN; LOCK TABLE two")
    with databases.fresh() as second:
        assert second == first
        schemas = "SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'"
        assert [row["nspname"] for row in await _query(second, schemas)] == ["public"]
        assert await _query(second, "SELECT 1 FROM pg_tables WHERE schemaname = 'public'") == []
        await _query(second, "CREATE TABLE two (id int)")
        with databases.fresh() as third:
            assert third != second
    holder.terminate()


async def test_pgbouncer_leads_to_the_same_database(postgres: str, pgbouncer: str):
    """The pooler's URL names the test's own database."""
    await _query(postgres, "CREATE TABLE there (id int)")
    connection = await asyncpg.connect(pgbouncer.replace("+asyncpg", ""), statement_cache_size=0)
    try:
        assert await connection.fetch("SELECT * FROM there") == []
    finally:
        await connection.close()


def test_redis_keeps_its_data_over_a_restart(own_redis: Redis):
    """A value set before a restart is read after it, at the same address."""
    url = urlsplit(own_redis.url)

    def ask(command: bytes) -> bytes:
        with closing(socket.create_connection(("127.0.0.1", url.port or 0))) as connection:
            connection.sendall(command)
            return connection.recv(100)

    assert ask(b"SET kept 7\r\n") == b"+OK\r\n"
    own_redis.restart()
    assert ask(b"GET kept\r\n") == b"$1\r\n7\r\n"
    flush(own_redis.url)  # empties number 15 only; the value is in number 0
    assert ask(b"GET kept\r\n") == b"$1\r\n7\r\n"


def test_kafka_comes_back_after_a_kill(own_kafka: Kafka):
    """A killed broker is back on its port."""
    port = own_kafka.port
    own_kafka.kill()
    assert not _listening(port)
    own_kafka.start()
    assert _listening(port)


@pytest.mark.parametrize(
    ("listener", "trusted"), [("SSL", True), ("MTLS", True), ("SASL_SSL", True), ("EXPIRED", False)]
)
def test_secure_kafka_shows_certificates_of_its_own_authority(secure_kafka: SecureKafka, listener: str, trusted: bool):
    """A client that trusts the authority accepts what the listeners show, but for the one of yesterday."""
    host, port = secure_kafka.address_of(listener).split(":")
    context = ssl.create_default_context(cafile=secure_kafka.ca_file)
    with socket.create_connection((host, int(port))) as plain:
        if trusted:
            context.wrap_socket(plain, server_hostname=host).close()
        else:
            with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
                context.wrap_socket(plain, server_hostname=host)


def test_secure_kafka_keeps_its_keys_to_itself(secure_kafka: SecureKafka):
    """No other account of the machine reads a private key."""
    keys = [path for path in secure_kafka.directory.iterdir() if path.suffix in {".key", ".both"}]
    assert keys
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}


def test_nothing_outlives_a_killed_run():
    """When the process that started a server dies by SIGKILL, the server and its directory go too."""
    script = (
        "import sys, time; from mainstay_servers import Redis; r = Redis(); r.start();"
        "print(r.port, r.directory, flush=True); time.sleep(600)"
    )
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    with run:
        assert run.stdout is not None
        port, directory = run.stdout.readline().split()
        assert _listening(int(port))
        run.kill()
    _until(lambda: not _listening(int(port)) and not Path(directory).exists())


def test_run_gives_the_command_the_addresses_and_its_status():
    """`run` leaves an address of the environment alone, exports it, and ends as the command ended."""
    addresses = {
        "MAINSTAY_TEST_KAFKA": "127.0.0.1:1",
        "MAINSTAY_TEST_POSTGRES": "postgresql://nobody@127.0.0.1:1/x",
        "MAINSTAY_TEST_REDIS": "redis://127.0.0.1:1/15",
    }
    script = "import os, sys; print(os.environ['MAINSTAY_TEST_REDIS'], os.environ['MAINSTAY_TEST_KAFKA']); sys.exit(3)"
    done = subprocess.run(
        [sys.executable, "-m", "mainstay_servers", "run", "--", sys.executable, "-c", script],
        env=os.environ | addresses,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert done.stdout.split() == ["redis://127.0.0.1:1/15", "127.0.0.1:1"]


def test_a_missing_program_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch):
    """Where nothing can be installed, the error carries the remedy."""
    monkeypatch.setattr(install, "_attempt", lambda _program: "only root on Debian installs by itself")
    with pytest.raises(MissingServer, match=r"`redis-server` is not installed\. Either: .*redis"):
        install.find("redis-server", lambda _program: None)


def _run_without_redis(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "conftest.py").write_text(
        "from mainstay_servers import MissingServer, install, redis\n"
        "def find(program, look=None):\n"
        "    raise MissingServer(f'`{program}` is not installed')\n"
        "redis.find = find\n"
    )
    (tmp_path / "test_it.py").write_text(
        "def test_one(redis_url): pass\ndef test_two(own_redis): pass\ndef test_three(): pass\n"
    )
    clean = {name: value for name, value in os.environ.items() if name not in {"CI", "MAINSTAY_TEST_REDIS"}}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_missing_server_skips_and_is_counted(tmp_path: Path):
    """Outside CI the tests of a missing server skip, and the summary says how many and why."""
    done = _run_without_redis(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 2 skipped" in done.stdout
    assert "2 tests skipped: `redis-server` is not installed" in done.stdout


def test_a_missing_server_fails_in_ci(tmp_path: Path):
    """With CI=true nothing is skipped: the tests of a missing server fail the run."""
    done = _run_without_redis(tmp_path, CI="true")
    assert done.returncode == 1, done.stdout
    assert "1 passed, 2 errors" in done.stdout


async def test_a_process_is_frozen_although_the_test_itself_has_the_lock_for_a_moment(tmp_path: Path) -> None:
    """The test's own transaction ends while it waits: it is not blocked by asking."""
    file = tmp_path / "locked.db"
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")

        async def commit() -> None:
            await asyncio.to_thread(_until, lambda: _stopped(sleeping.pid))
            connection.execute("COMMIT")

        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as sleeping:  # noqa: ASYNC220  it takes no time
            committing = asyncio.create_task(commit())
            async with asyncio.timeout(60), frozen(sleeping.pid, f"sqlite+aiosqlite:///{file}"):
                assert committing.done()
                assert _stopped(sleeping.pid)
            await committing
            sleeping.kill()


def _stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
