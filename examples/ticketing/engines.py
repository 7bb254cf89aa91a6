"""Where the office runs: embedded on one SQLite file, or on Kafka and PostgreSQL. The application is the same."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Literal

from mainstay.audit import SigningKey, VerifierKey
from mainstay.database.schema import installed, upgrade
from ticketing.tables import SCHEMA

# One topic for all of them, so that the events of a purchase keep their order.
EVENT_TYPES = ("tickets.held", "payment.captured", "payment.refunded", "purchase.completed", "purchase.cancelled")


class EngineMissing(Exception):
    """A server that this engine needs is not there; the message says how to get it."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What the office's processes are told through their environment.

    Attributes:
        database_url: for reading the facts at the end.
        kafka: addresses of the cluster, None where events travel through the database.
        topic: the events' own.
        audit_key: what verifies the audit log's checkpoints.
        environment: for the API and the worker.
    """

    database_url: str
    kafka: str | None
    topic: str
    audit_key: VerifierKey
    environment: dict[str, str]


EngineName = Literal["embedded", "full"]


@asynccontextmanager
async def engine(name: EngineName, directory: Path) -> AsyncGenerator[Engine, None]:
    """A fresh engine: nothing in it is from an earlier run.

    Raises:
        EngineMissing: a server is not there, and cannot be started.
    """
    topic = f"ticketing-{token_hex(4)}"  # a cluster may have seen other runs
    signing = SigningKey.generate("ticketing")
    key_file = directory / "audit.key"
    key_file.touch(mode=0o600)
    key_file.write_text(signing.private_text() + "\n")
    if name == "embedded":
        url = f"sqlite+aiosqlite:///{directory / 'office.db'}"
        yield Engine(url, None, topic, signing.verifier, _environment(url, topic, key_file, transport="sql"))
        return
    async with _servers() as (kafka, url):
        await upgrade(url, [*installed(), SCHEMA])  # what `mainstay db upgrade` does
        client = os.environ.get("MAINSTAY_EVENTS_KAFKA_CLIENT", "aiokafka")
        events = {"transport": "kafka", "kafka_client": client, "kafka_servers": kafka}
        if client == "confluent":
            events["lease_seconds"] = "4"  # it takes none that is shorter
        environment = _environment(url, topic, key_file, **events)
        yield Engine(url, kafka, topic, signing.verifier, environment)


@asynccontextmanager
async def _servers() -> AsyncGenerator[tuple[str, str], None]:
    """Kafka's address and the URL of an empty PostgreSQL database; what the environment does not name is started."""
    # This repository's own launcher, which no service needs, nor the embedded engine.
    from mainstay_servers import Kafka, MissingServer, Postgres, ServerError, fresh_database  # noqa: PLC0415

    with ExitStack() as stack:

        def kafka() -> str:
            return os.environ.get("MAINSTAY_TEST_KAFKA") or stack.enter_context(Kafka()).address

        def postgres() -> str:
            return os.environ.get("MAINSTAY_TEST_POSTGRES") or stack.enter_context(Postgres()).url

        try:
            address, server = await asyncio.gather(asyncio.to_thread(kafka), asyncio.to_thread(postgres))
        except (MissingServer, ServerError) as error:
            raise EngineMissing(str(error)) from error
        yield address, stack.enter_context(fresh_database(server))


def _environment(url: str, topic: str, key_file: Path, **events: str) -> dict[str, str]:
    """What the API and the worker are told. Leases are short: a demo has less patience than a service."""
    return {
        "MAINSTAY_DATABASE_URL": url,
        "MAINSTAY_EVENTS_TOPICS": json.dumps(dict.fromkeys(EVENT_TYPES, topic)),
        "MAINSTAY_EVENTS_LEASE_SECONDS": "1",
        "MAINSTAY_WORKFLOW_LEASE_SECONDS": "1",
        "MAINSTAY_AUDIT_LEASE_SECONDS": "1",
        "MAINSTAY_AUDIT_SIGNING_KEY_FILE": str(key_file),
    } | {f"MAINSTAY_EVENTS_{name}".upper(): value for name, value in events.items()}
