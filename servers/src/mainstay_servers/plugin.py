"""Fixtures with real servers; a server starts with the first test that asks for it.

Shared for the whole run, and replaceable by an address in the environment:

- `kafka`: the bootstrap address (`MAINSTAY_TEST_KAFKA`); topics and groups stay, so name yours uniquely
- `postgres`: the URL of an empty database that no other test has at the same time (`MAINSTAY_TEST_POSTGRES`: a URL
  whose user may create databases)
- `pgbouncer`: the URL of the same fresh database by way of PgBouncer in transaction pooling
- `redis_url`: the URL of a database that was emptied before the test (`MAINSTAY_TEST_REDIS`: give a number of its own)
- `secure_kafka`: a second Kafka, always the run's own, with TLS, mutual TLS, SASL and rights by account

Programs of others:

- `kcat`: the path of the program that reads Kafka on a command line, by librdkafka
- `promtool`, `prometheus`: the paths of the programs that try rules and that scrape (`Prometheus` runs it)

A server of the test's own, to be killed, paused and restarted: `own_kafka`, `own_postgres`, `own_redis`.

A server that is missing fails the test where `CI=true`, and skips it elsewhere; the run's summary counts those.
"""

import os
from collections.abc import Iterator
from typing import NoReturn, TypeVar

import pytest

from mainstay_servers.install import MissingServer, find
from mainstay_servers.kafka import Kafka
from mainstay_servers.postgres import Databases, PgBouncer, Postgres
from mainstay_servers.process import Server
from mainstay_servers.redis import Redis, flush
from mainstay_servers.secure import SecureKafka

_MARK = "no real server: "

ServerT = TypeVar("ServerT", bound=Server)


def _missing(error: MissingServer) -> NoReturn:
    reason = f"{_MARK}{error}"
    if os.environ.get("CI", "").lower() in {"1", "true"}:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def _program(name: str) -> str:
    try:
        return find(name)
    except MissingServer as error:
        _missing(error)


def owned(server: ServerT) -> Iterator[ServerT]:
    """Start a server, yield it once and remove it; where it is missing, fail or skip the test as the run demands."""
    try:
        server.start()
    except MissingServer as error:
        _missing(error)
    try:
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="session")
def kafka() -> Iterator[str]:
    """The bootstrap address of the run's Kafka."""
    address = os.environ.get("MAINSTAY_TEST_KAFKA")
    if address:
        yield address
    else:
        for server in owned(Kafka()):
            yield server.address


@pytest.fixture(scope="session")
def secure_kafka() -> Iterator[SecureKafka]:
    """The run's Kafka with listeners that ask who is there; `SecureKafka` says which, and who is."""
    yield from owned(SecureKafka())


@pytest.fixture(scope="session")
def kcat() -> str:
    """The path of `kcat`."""
    return _program("kcat")


@pytest.fixture(scope="session")
def promtool() -> str:
    """The path of `promtool`."""
    return _program("promtool")


@pytest.fixture(scope="session")
def prometheus() -> str:
    """The path of `prometheus`, for a `Prometheus` that is told in the test what it scrapes."""
    return _program("prometheus")


@pytest.fixture(scope="session")
def _postgres_server() -> Iterator[str]:
    url = os.environ.get("MAINSTAY_TEST_POSTGRES")
    if url:
        yield url
    else:
        for server in owned(Postgres()):
            yield server.url


@pytest.fixture(scope="session")
def _databases(_postgres_server: str) -> Iterator[Databases]:
    databases = Databases(_postgres_server)
    yield databases
    databases.drop()


@pytest.fixture
def postgres(_databases: Databases) -> Iterator[str]:
    """The URL of a fresh, empty database."""
    with _databases.fresh() as url:
        yield url


@pytest.fixture(scope="session")
def _pgbouncer_server(_postgres_server: str) -> Iterator[PgBouncer]:
    yield from owned(PgBouncer(_postgres_server))


@pytest.fixture
def pgbouncer(_pgbouncer_server: PgBouncer, postgres: str) -> str:
    """The URL of the test's fresh database, by way of PgBouncer in transaction pooling."""
    return _pgbouncer_server.through(postgres)


@pytest.fixture(scope="session")
def _redis_server() -> Iterator[str]:
    url = os.environ.get("MAINSTAY_TEST_REDIS")
    if url:
        yield url
    else:
        for server in owned(Redis()):
            yield server.url


@pytest.fixture
def redis_url(_redis_server: str) -> str:
    """The URL of an emptied Redis database."""
    flush(_redis_server)
    return _redis_server


@pytest.fixture
def own_kafka() -> Iterator[Kafka]:
    """A Kafka of this test's own."""
    yield from owned(Kafka())


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A PostgreSQL of this test's own; `fresh_database(own_postgres.url)` makes databases in it."""
    yield from owned(Postgres())


@pytest.fixture
def own_redis() -> Iterator[Redis]:
    """A Redis of this test's own."""
    yield from owned(Redis())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count the tests that no server was there for, and name what was missing."""
    skipped: list[pytest.TestReport] = terminalreporter.getreports("skipped")
    reasons = [
        report.longrepr[2].partition(_MARK)[2]
        for report in skipped
        if isinstance(report.longrepr, tuple) and _MARK in report.longrepr[2]
    ]
    if reasons:
        terminalreporter.section("servers missing")
        for reason in sorted(set(reasons)):
            terminalreporter.write_line(f"{reasons.count(reason)} tests skipped: {reason}")
