"""What the tests of events share: databases of each kind, and names that no other test uses."""

import gc
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from mainstay.database import upgrade
from mainstay.database.schema import SCHEMA
from mainstay.events import _consumer
from mainstay.events._aiokafka import client as aiokafka_client
from mainstay.events._aiokafka import source
from mainstay.events._confluent import member as confluent_member
from mainstay.events._confluent import producer as confluent_producer
from mainstay.events._confluent import source as confluent_source
from mainstay.events._kafka import watch
from mainstay.events.tables import SCHEMA as EVENTS
from mainstay_servers import Kafka, plugin


@pytest.fixture(autouse=True, scope="module")
def _source() -> Iterator[None]:
    """A name of the service under test, which Kafka asks for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAINSTAY_EVENTS_SOURCE", "mainstay")
        yield


@pytest.fixture
def prefix() -> str:
    """A name that no other test uses."""
    return f"t{uuid.uuid4().hex[:10]}"


@pytest.fixture(params=["aiokafka", "confluent"])
def client(request: pytest.FixtureRequest) -> str:
    """By what the service under test reaches Kafka."""
    name: str = request.param
    return name


@pytest.fixture(params=["sqlite", "postgres"])
async def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty, migrated database of either kind."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'events.db'}"
    url: str = request.getfixturevalue("postgres")
    await upgrade(url, [SCHEMA, EVENTS])
    return url


@pytest.fixture
async def sqlite_url(tmp_path: Path) -> str:
    """An empty SQLite file."""
    return f"sqlite+aiosqlite:///{tmp_path / 'events.db'}"


@pytest.fixture
async def postgres_url(postgres: str) -> str:
    """An empty, migrated PostgreSQL database."""
    await upgrade(postgres, [SCHEMA, EVENTS])
    return postgres


@pytest.fixture(scope="session")
def _broker() -> Iterator[Kafka]:
    yield from plugin.owned(Kafka())


@pytest.fixture
def broker(_broker: Kafka) -> Kafka:
    """A Kafka to be killed and paused, shared by those tests: starting one takes seconds."""
    _broker.start()
    return _broker


@pytest.fixture
def soon_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that does not answer is given up after one second instead of five: several such waits make a stop."""
    for part in (aiokafka_client, source, confluent_producer, confluent_member, confluent_source):
        monkeypatch.setattr(part, "CLOSE_SECONDS", 1.0)
    monkeypatch.setattr(watch, "LOOK_SECONDS", 1.0)
    monkeypatch.setattr(_consumer, "_CLOSING_SECONDS", 1.0)


@pytest.fixture
def aiokafka_garbage(request: pytest.FixtureRequest) -> Iterator[None]:
    """Collect what aiokafka left behind while the test that made it may still say that it does not mind.

    A client that stops while it connects leaves the socket to the collector of garbage, which then blames a later test.
    """
    yield
    if {"kafka", "broker", "secure_kafka"} & set(request.fixturenames):
        gc.collect()
