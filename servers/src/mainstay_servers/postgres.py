"""PostgreSQL, and PgBouncer in front of one."""

# asyncpg ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
import asyncio
import contextlib
import os
import shutil
import signal
import uuid
from collections.abc import Coroutine, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from mainstay_servers.install import find
from mainstay_servers.process import Server


def look_for(program: str) -> str | None:
    """Find a PostgreSQL program: Debian keeps them apart from PATH, one directory a version; the newest wins."""
    versions = sorted(
        Path("/usr/lib/postgresql").glob(f"*/bin/{program}"), key=lambda path: float(path.parts[-3]), reverse=True
    )
    return str(versions[0]) if versions else shutil.which(program)


def _account() -> str | None:
    # PostgreSQL and PgBouncer refuse to run as root; Debian's package brings this account.
    return "postgres" if os.geteuid() == 0 else None


class Postgres(Server):
    """A PostgreSQL cluster that trusts 127.0.0.1. `url` is for SQLAlchemy with asyncpg."""

    name = "postgres"
    stop_signal = signal.SIGINT  # "fast": ends sessions, writes a checkpoint

    @property
    def url(self) -> str:
        """The address of the administrative database."""
        return f"postgresql+asyncpg://postgres@127.0.0.1:{self.port}/postgres"

    def prepare(self) -> None:
        """Create the cluster."""
        self.run_as_postgres()
        initdb = ["--auth=trust", "--no-sync", "--username=postgres", "--encoding=UTF8", "--locale=C"]
        self.run_once(find("initdb", look_for), *initdb, "-D", str(self.directory / "data"))

    def run_as_postgres(self) -> None:
        """Find the programs and the account to run them as."""
        find("postgres", look_for)
        self._account = _account()

    def command(self) -> Sequence[str]:
        """Return the command of the server. fsync stays on: durability and speed are what is tested."""
        directory = str(self.directory)
        settings = ["-c", "listen_addresses=127.0.0.1", "-c", "max_connections=300"]
        return [
            *(find("postgres", look_for), "-D", f"{directory}/data", "-p", str(self.port), "-k", directory),
            *settings,
        ]

    def ready(self) -> bool:
        """Say whether it can be read, as a primary or a standby: the pid file says so, below the process id."""
        with contextlib.suppress(OSError, IndexError):
            lines = (self.directory / "data" / "postmaster.pid").read_text().splitlines()
            return int(lines[0]) == self.pid and lines[7].strip() in {"ready", "standby"}
        return False


class PgBouncer(Server):
    """PgBouncer in transaction pooling before the server at `url`; `through(url)` leads a URL by way of it."""

    name = "pgbouncer"
    stop_signal = signal.SIGINT

    def __init__(self, url: str) -> None:
        super().__init__()
        self._server = urlsplit(url)

    def through(self, url: str) -> str:
        """Return `url`, which names a database of the server, with PgBouncer's address instead."""
        return urlunsplit(urlsplit(url)._replace(netloc=f"postgres@127.0.0.1:{self.port}"))

    def prepare(self) -> None:
        """Write the configuration."""
        find("pgbouncer")
        self._account = _account()
        target = f"host={self._server.hostname} port={self._server.port or 5432} user={self._server.username}"
        if self._server.password:
            target += f" password={self._server.password}"
        (self.directory / "pgbouncer.ini").write_text(
            f"""\
[databases]
* = {target}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {self.port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 10
max_client_conn = 500
ignore_startup_parameters = extra_float_digits,jit
""",
        )

    def command(self) -> Sequence[str]:
        """Return the command of the pooler."""
        return [find("pgbouncer"), str(self.directory / "pgbouncer.ini")]


def _elsewhere(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` on a loop in another thread: the caller may be inside a loop, or between two uses of one."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, work).result()


async def _execute(dsn: str, statement: str) -> None:
    connection = await asyncpg.connect(dsn, timeout=30)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


# What makes a used database an empty one again, which is much quicker than creating another: `CREATE DATABASE` copies
# every file of the template. Clients that are still connected are sent away, and waited for, since a backend that is
# told to end still holds its locks for a moment.
_EMPTY = """
DO $$
DECLARE found text;
BEGIN
    PERFORM pg_terminate_backend(pid, 10000) FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid();
    FOR found IN SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema' LOOP
        EXECUTE format('DROP SCHEMA %I CASCADE', found);
    END LOOP;
    CREATE SCHEMA public AUTHORIZATION pg_database_owner;
    GRANT USAGE ON SCHEMA public TO PUBLIC;
END $$
"""


def execute_at(url: str, statement: str) -> None:
    """Run one statement at an SQLAlchemy URL, outside of any transaction."""
    _elsewhere(_execute(urlunsplit(urlsplit(url)._replace(scheme="postgresql")), statement))


class Databases:
    """Empty databases on the server at `url`, made when none is idle, emptied and kept when they are given back."""

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        self._idle: list[str] = []

    def _dsn(self, name: str | None = None) -> str:
        path = self._parts.path if name is None else f"/{name}"
        return urlunsplit(self._parts._replace(scheme="postgresql", path=path))

    @contextlib.contextmanager
    def fresh(self) -> Generator[str]:
        """Yield the URL of an empty database of one's own."""
        if self._idle:
            name = self._idle.pop()
        else:
            name = f"test_{uuid.uuid4().hex}"
            _elsewhere(_execute(self._dsn(), f"CREATE DATABASE {name}"))
        try:
            yield urlunsplit(self._parts._replace(scheme="postgresql+asyncpg", path=f"/{name}"))
        finally:
            try:
                _elsewhere(_execute(self._dsn(name), _EMPTY))
                self._idle.append(name)
            except (OSError, asyncpg.PostgresError):  # the test may have broken it; the next one gets another
                self._drop(name)

    def drop(self) -> None:
        """Drop the idle databases."""
        while self._idle:
            self._drop(self._idle.pop())

    def _drop(self, name: str) -> None:
        _elsewhere(_execute(self._dsn(), f"DROP DATABASE {name} WITH (FORCE)"))


@contextlib.contextmanager
def fresh_database(url: str) -> Generator[str]:
    """Create an empty database on the server at `url`, yield its URL, drop it with the connections that are left."""
    databases = Databases(url)
    with databases.fresh() as fresh:
        yield fresh
    databases.drop()
