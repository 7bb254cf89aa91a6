"""For tests of code that writes to the audit trail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from pydantic import SecretStr

from mainstay.database import Database
from mainstay.observability.audit import tables
from mainstay.observability.audit.entry import Entry
from mainstay.observability.audit.note import SigningKey
from mainstay.observability.audit.producer import STATEMENT
from mainstay.observability.audit.settings import AuditSettings

KEY = SigningKey("mainstay-audit-tests", b"known to everybody who reads it!")


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
    rows = [
        *await database.read(sa.select(tables.log.c.data).order_by(tables.log.c.leaf)),
        *await database.read(sa.select(tables.pending.c.data).order_by(tables.pending.c.seq)),
    ]
    entries = [Entry.from_bytes(bytes(row.data)) for row in rows]
    return [entry for entry in entries if entry.action != STATEMENT and action in (None, entry.action)]
