"""For tests of code that writes to the audit trail."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import sqlalchemy as sa
from pydantic import SecretStr

from mainstay.audit import tables
from mainstay.audit._producer import STATEMENT
from mainstay.audit.entry import Entry
from mainstay.audit.module import AuditModule
from mainstay.audit.note import SigningKey
from mainstay.audit.settings import AuditSettings
from mainstay.audit.trail import AuditTrail
from mainstay.core import App
from mainstay.database import Database, DatabaseModule, DatabaseSettings

__all__ = ["KEY", "recorded", "settings", "written"]

KEY = SigningKey("mainstay-audit-tests", b"known to everybody who reads it!")

# One statement, since an entry may be sealed meanwhile: read apart, it would be in neither of the two, or in both.
_BOTH = sa.union_all(
    sa.select(tables.log.c.data, sa.literal(0).label("part"), tables.log.c.leaf.label("place")),
    sa.select(tables.pending.c.data, sa.literal(1), tables.pending.c.seq),
).subquery()
_WRITTEN = sa.select(_BOTH.c.data).order_by(_BOTH.c.part, _BOTH.c.place)


def settings(**values: Any) -> AuditSettings:
    """Settings with `KEY`, whose public half is `KEY.verifier`, and a sealer that does not dawdle."""
    chosen: dict[str, Any] = {"signing_key": SecretStr(KEY.private_text()), "poll_seconds": 0.02, **values}
    return AuditSettings(**chosen)


async def written(database: Database, action: str | None = None) -> Sequence[Entry]:
    """The entries that are committed, sealed ones first, without statements of producers.

    Args:
        database: where they are.
        action: only those of this action.
    """
    entries = [Entry.from_bytes(bytes(row.data)) for row in await database.read(_WRITTEN)]
    return [entry for entry in entries if entry.action != STATEMENT and action in (None, entry.action)]


@asynccontextmanager
async def recorded(*trails: AuditTrail) -> AsyncGenerator[Database, None]:
    """Let trails record into a database in memory that the block yields: `await written(database)` tells what.

    For tests of code that has no App of its own running; it is the real thing, so what rolls back leaves no entry.
    """
    app = App(
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr("sqlite+aiosqlite:///:memory:"))),
        AuditModule.for_root(settings()),
        AuditModule.for_feature(*trails),
    )
    async with app:
        yield app.get(Database)
