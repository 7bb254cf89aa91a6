"""One way to the database: an ambient unit of work, and writes that commit in groups, on SQLite and PostgreSQL."""

from mainstay.database.clock import database_now
from mainstay.database.database import Database
from mainstay.database.errors import (
    CommitUnknown,
    Conflict,
    DatabaseBusy,
    DatabaseError,
    DatabaseUnavailable,
    FenceLost,
    UnitOfWorkError,
    WrongEventLoop,
)
from mainstay.database.fence import Fence, FenceOn
from mainstay.database.lease import Lease, lease_holders
from mainstay.database.module import DatabaseModule
from mainstay.database.portable import UtcDateTime, upsert
from mainstay.database.schema import Schema, upgrade
from mainstay.database.settings import DatabaseSettings

__all__ = [
    "CommitUnknown",
    "Conflict",
    "Database",
    "DatabaseBusy",
    "DatabaseError",
    "DatabaseModule",
    "DatabaseSettings",
    "DatabaseUnavailable",
    "Fence",
    "FenceLost",
    "FenceOn",
    "Lease",
    "Schema",
    "UnitOfWorkError",
    "UtcDateTime",
    "WrongEventLoop",
    "database_now",
    "lease_holders",
    "upgrade",
    "upsert",
]
