"""Reads the facts for the invariants: plain queries on the databases as they lie there, and the file as it is."""

from __future__ import annotations

import json
import re
import sqlite3
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Never

from aiokafka import AIOKafkaConsumer
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from mainstay.audit import Report, verify
from mainstay.core import App
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from ticketing.engines import Engine
from ticketing.invariants import Facts, Row


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the facts are: the office's engine, the provider's ledger, and the file that was played."""

    engine: Engine
    ledger: Path
    purchases: Path


async def read_facts(sources: Sources, answers: dict[int, str | None]) -> Facts:
    """The facts as of now, the audit log verified; `answers` is what the API answered to each line."""
    audit = await _verify_audit(sources.engine)
    return replace(
        await read_rows(sources, answers),
        audit_entries=audit.entries,
        audit_problems=tuple(f"{problem.kind}: {problem.detail}" for problem in audit.problems),
        published=await _published(sources.engine),
    )


async def read_rows(sources: Sources, answers: dict[int, str | None]) -> Facts:
    """The part of the facts that is rows: cheap enough to be looked at again and again."""
    async with _connected(sources.engine) as connection:

        async def rows(table: str) -> list[Row]:
            return await _rows(connection, f"SELECT * FROM ticketing_{table}")  # noqa: S608  names from this file

        sealed = await _entries(connection, "log")
        pending = await _entries(connection, "pending")
        return Facts(
            file=read_file(sources.purchases),
            answers=dict(answers),
            items=await rows("items"),
            tickets=await rows("tickets"),
            purchases=await rows("purchases"),
            payments=await rows("payments"),
            sales=await rows("sales"),
            customers=await rows("customers"),
            receipts=await rows("receipts"),
            handled=await rows("handled"),
            ledger=read_ledger(sources.ledger),
            audited=Counter(
                (entry["action"], entry.get("resource", "")) for entry in sealed if entry["outcome"] == "succeeded"
            ),
            unsealed=sum(entry["number"] > 0 for entry in pending),  # 0: said by a process about itself, also last
            given_up=await _count(connection, "mainstay_events_dead_letters")
            + await _count(connection, "mainstay_events_parked_keys"),
        )


@asynccontextmanager
async def _connected(engine: Engine) -> AsyncGenerator[AsyncConnection, None]:
    database = create_async_engine(engine.database_url)
    try:
        async with database.connect() as connection:
            yield connection
    finally:
        await database.dispose()


async def _verify_audit(engine: Engine) -> Report:
    settings = DatabaseSettings(url=SecretStr(engine.database_url))
    async with App(DatabaseModule.for_root(settings)) as app:
        return await verify(app.get(Database), [engine.audit_key])


async def _published(engine: Engine) -> int:
    if engine.kafka is None:
        async with _connected(engine) as connection:
            return await _count(connection, "mainstay_events_log")
    consumer = AIOKafkaConsumer(engine.topic, bootstrap_servers=engine.kafka)
    await consumer.start()
    try:
        ends = await consumer.end_offsets(consumer.assignment())
        return sum(ends.values())
    finally:
        await consumer.stop()


async def _entries(connection: AsyncConnection, table: str) -> list[Row]:
    rows = await _rows(connection, f"SELECT data FROM mainstay_audit_{table}")  # noqa: S608  names from this file
    return [json.loads(row["data"]) for row in rows]


async def _count(connection: AsyncConnection, table: str) -> int:
    (row,) = await _rows(connection, f"SELECT count(*) AS rows FROM {table}")  # noqa: S608  names from this file
    return int(row["rows"])


async def _rows(connection: AsyncConnection, query: str) -> list[Row]:
    return [dict(row) for row in (await connection.execute(text(query))).mappings()]


def read_ledger(path: Path) -> list[Row]:
    """Every movement of money that the provider has on its books."""
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute("SELECT key, order_id, kind, amount_cents FROM ledger")]


def read_file(path: Path) -> dict[int, Row | None]:
    """The file's lines that are not blank: an object, or None where there is none."""
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    stripped = {number: line.strip(b" \t\r\n") for number, line in enumerate(lines, 1)}
    return {number: _object(line) for number, line in stripped.items() if line}


def _object(line: bytes) -> Row | None:
    if len(line) > 1 << 20:
        return None
    try:
        # A fraction stays as it was written: as bytes, so that nobody takes it for text.
        document: Any = json.loads(
            line.decode(), parse_float=str.encode, parse_constant=_refuse, object_pairs_hook=_once
        )
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) and _depth(line.decode()) <= 20 else None


def _depth(text: str) -> int:
    """The deepest nesting of a JSON text: the most brackets that are open at once outside of strings."""
    brackets = re.findall(r'"(?:\\.|[^"\\])*"|[\[\]{}]', text)
    return max(accumulate((mark in {"[", "{"}) - (mark in {"]", "}"}) for mark in brackets), default=0)


def _refuse(name: str) -> Never:
    raise ValueError(name)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError(pairs)
    return dict(pairs)
