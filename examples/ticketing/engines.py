"""Where the office runs: embedded on one SQLite file, or on Kafka and PostgreSQL. The application is the same."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Literal

from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from mainstay.database.schema import installed, upgrade
from mainstay.observability.audit import SigningKey, VerifierKey
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
        EngineMissing: a server is not there.
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
    kafka, server = (os.environ.get(f"MAINSTAY_TEST_{what}") for what in ("KAFKA", "POSTGRES"))
    if not kafka or not server:
        msg = "the full engine needs Kafka and PostgreSQL: run `make demo ENGINE=full`, which starts them"
        raise EngineMissing(msg)
    async with _fresh_database(server) as url:
        await upgrade(url, [*installed(), SCHEMA])  # what `mainstay-database upgrade` does
        environment = _environment(url, topic, key_file, transport="kafka", kafka_servers=kafka, kafka_replicas="1")
        yield Engine(url, kafka, topic, signing.verifier, environment)


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


@asynccontextmanager
async def _fresh_database(server: str) -> AsyncGenerator[str, None]:
    name = f"ticketing_{token_hex(4)}"
    admin = create_async_engine(server, isolation_level="AUTOCOMMIT")
    try:
        async with admin.connect() as connection:
            await connection.execute(text(f"CREATE DATABASE {name}"))
        try:
            yield make_url(server).set(database=name).render_as_string(hide_password=False)
        finally:
            async with admin.connect() as connection:
                await connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    finally:
        await admin.dispose()
