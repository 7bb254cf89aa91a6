"""The tables, and the statements that touch them.

Times in them are the database's own clock, in seconds since 1970. Headers are JSON pairs of name and value, the value's bytes
as Latin-1, so that whatever a foreign producer wrote comes back as it was.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from mainstay.database import Schema
from mainstay.events.metadata import Headers

METADATA = sa.MetaData()

_BIG = sa.BigInteger().with_variant(sa.Integer, "sqlite")

LOG = sa.Table(
    "mainstay_events_log",
    METADATA,
    # The transaction comes first: PostgreSQL fixes it before it draws the position.
    sa.Column("xid", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("position", _BIG, primary_key=True, autoincrement=True),
    sa.Column("topic", sa.Text, nullable=False),
    sa.Column("partition", sa.Integer, nullable=False),
    sa.Column("key", sa.LargeBinary),
    sa.Column("value", sa.LargeBinary, nullable=False),
    sa.Column("headers", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False, server_default="0"),
    sqlite_autoincrement=True,
)
OFFSETS = sa.Table(
    "mainstay_events_offsets",
    METADATA,
    sa.Column("group_name", sa.Text, primary_key=True),
    sa.Column("topic", sa.Text, primary_key=True),
    sa.Column("partition", sa.Integer, primary_key=True),
    sa.Column("low", sa.BigInteger, nullable=False),
    sa.Column("high", sa.BigInteger, nullable=False),
    sa.Column("position", sa.BigInteger, nullable=False),
)
MEMBERS = sa.Table(
    "mainstay_events_members",
    METADATA,
    sa.Column("group_name", sa.Text, primary_key=True),
    sa.Column("member", sa.Text, primary_key=True),
    sa.Column("expires_at", sa.Double, nullable=False),
)
OUTBOX = sa.Table(
    "mainstay_events_outbox",
    METADATA,
    sa.Column("position", _BIG, primary_key=True, autoincrement=True),
    sa.Column("lane", sa.Integer, nullable=False),
    sa.Column("topic", sa.Text, nullable=False),
    sa.Column("key", sa.LargeBinary),
    sa.Column("value", sa.LargeBinary, nullable=False),
    sa.Column("headers", sa.Text, nullable=False),
    sqlite_autoincrement=True,
)
INBOX = sa.Table(
    "mainstay_events_inbox",
    METADATA,
    sa.Column("group_name", sa.Text, primary_key=True),
    sa.Column("event_id", sa.Text, primary_key=True),
    sa.Column("created_at", sa.BigInteger, nullable=False, server_default="0"),
)
DEAD_LETTERS = sa.Table(
    "mainstay_events_dead_letters",
    METADATA,
    sa.Column("id", sa.Uuid, primary_key=True),
    sa.Column("group_name", sa.Text, nullable=False),
    sa.Column("topic", sa.Text, nullable=False),
    sa.Column("partition", sa.Integer, nullable=False),
    sa.Column("offset", sa.BigInteger, nullable=False),
    sa.Column("key", sa.LargeBinary),
    sa.Column("value", sa.LargeBinary),
    sa.Column("headers", sa.Text, nullable=False),
    sa.Column("error", sa.Text, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("time", sa.DateTime(timezone=True), nullable=False),
)

SCHEMA = Schema("events", METADATA, Path(__file__).parent / "migrations")


def pack_headers(headers: Headers) -> str:
    """Headers as a table keeps them."""
    return json.dumps([(name, value.decode("latin-1")) for name, value in headers], separators=(",", ":"))


def unpack_headers(text: str) -> Headers:
    """What `pack_headers` was given."""
    pairs: list[tuple[str, str]] = json.loads(text)
    return [(name, value.encode("latin-1")) for name, value in pairs]


class Now(sa.sql.functions.GenericFunction[Any]):
    """The database's clock, in seconds since 1970; not the start of the transaction but now."""

    type = sa.Double()
    name = "mainstay_events_now"
    inherit_cache = True


@sa.ext.compiler.compiles(Now, "sqlite")
def _now_sqlite(element: Now, compiler: Any, **kwargs: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@sa.ext.compiler.compiles(Now, "postgresql")
def _now_postgresql(element: Now, compiler: Any, **kwargs: Any) -> str:
    return "extract(epoch FROM clock_timestamp())::double precision"


INSERT_LOG = sa.insert(LOG).values(
    {name: sa.bindparam(name) for name in ("topic", "partition", "key", "value", "headers")}
)
INSERT_OUTBOX = sa.insert(OUTBOX).values(
    {name: sa.bindparam(name) for name in ("lane", "topic", "key", "value", "headers")}
)
READ_OUTBOX = (
    sa.select(OUTBOX)
    .where(OUTBOX.c.lane.in_(sa.bindparam("lanes", expanding=True)))
    .order_by(OUTBOX.c.position)
    .limit(sa.bindparam("limit", type_=sa.Integer))
)
DELETE_OUTBOX = sa.delete(OUTBOX).where(OUTBOX.c.position == sa.bindparam("sent"))
COUNT_OUTBOX = sa.select(sa.func.count()).select_from(sa.select(OUTBOX.c.position).limit(10_000).subquery())

DELETE_OLD_LOG = sa.delete(LOG).where(
    LOG.c.position.in_(
        sa.select(LOG.c.position)
        .where(LOG.c.created_at < Now() - sa.bindparam("seconds", type_=sa.Double))
        .order_by(LOG.c.position)
        .limit(1000)
    )
)
DELETE_OLD_INBOX = sa.delete(INBOX).where(INBOX.c.created_at < Now() - sa.bindparam("seconds", type_=sa.Double))

JOIN_GROUP = {
    "sqlite": (
        sqlite.insert(MEMBERS)
        .values(
            group_name=sa.bindparam("group_name"),
            member=sa.bindparam("member"),
            expires_at=Now() + sa.bindparam("seconds", type_=sa.Double),
        )
        .on_conflict_do_update(
            index_elements=["group_name", "member"],
            set_={"expires_at": Now() + sa.bindparam("seconds", type_=sa.Double)},
        )
    ),
    "postgresql": (
        postgresql.insert(MEMBERS)
        .values(
            group_name=sa.bindparam("group_name"),
            member=sa.bindparam("member"),
            expires_at=Now() + sa.bindparam("seconds", type_=sa.Double),
        )
        .on_conflict_do_update(
            index_elements=["group_name", "member"],
            set_={"expires_at": Now() + sa.bindparam("seconds", type_=sa.Double)},
        )
    ),
}
READ_MEMBERS = (
    sa.select(MEMBERS.c.member)
    .where(MEMBERS.c.group_name == sa.bindparam("group"), MEMBERS.c.expires_at > Now())
    .order_by(MEMBERS.c.member)
)
LEAVE_GROUP = sa.delete(MEMBERS).where(
    MEMBERS.c.group_name == sa.bindparam("of_group"), MEMBERS.c.member == sa.bindparam("leaver")
)
FORGET_MEMBERS = sa.delete(MEMBERS).where(MEMBERS.c.expires_at < Now() - sa.bindparam("seconds", type_=sa.Double))

READ_OFFSETS = sa.select(OFFSETS).where(
    OFFSETS.c.group_name == sa.bindparam("group"), OFFSETS.c.partition == sa.bindparam("number")
)
WIDEST_PARTITION = sa.select(sa.func.max(OFFSETS.c.partition))
_OFFSET_VALUES = {
    name: sa.bindparam(name) for name in ("group_name", "topic", "partition", "low", "high", "position")
}
COMMIT_OFFSET = {
    "sqlite": (
        (_lite := sqlite.insert(OFFSETS).values(_OFFSET_VALUES)).on_conflict_do_update(
            index_elements=["group_name", "topic", "partition"],
            set_={name: _lite.excluded[name] for name in ("low", "high", "position")},
        )
    ),
    "postgresql": (
        (_post := postgresql.insert(OFFSETS).values(_OFFSET_VALUES)).on_conflict_do_update(
            index_elements=["group_name", "topic", "partition"],
            set_={name: _post.excluded[name] for name in ("low", "high", "position")},
        )
    ),
}

_INBOX_VALUES = {"group_name": sa.bindparam("group_name"), "event_id": sa.bindparam("event_id")}
INSERT_INBOX = {
    "sqlite": sqlite.insert(INBOX).values(_INBOX_VALUES).on_conflict_do_nothing(),
    "postgresql": postgresql.insert(INBOX).values(_INBOX_VALUES).on_conflict_do_nothing(),
}

_LETTER_VALUES = {column.name: sa.bindparam(column.name) for column in DEAD_LETTERS.columns}
INSERT_DEAD_LETTER = {
    "sqlite": sqlite.insert(DEAD_LETTERS).values(_LETTER_VALUES).on_conflict_do_nothing(),
    "postgresql": postgresql.insert(DEAD_LETTERS).values(_LETTER_VALUES).on_conflict_do_nothing(),
}
LIST_DEAD_LETTERS = (
    sa.select(DEAD_LETTERS)
    .order_by(DEAD_LETTERS.c.time, DEAD_LETTERS.c.id)
    .limit(sa.bindparam("limit", type_=sa.Integer))
)
LIST_DEAD_LETTERS_OF = LIST_DEAD_LETTERS.where(DEAD_LETTERS.c.group_name == sa.bindparam("group"))
GET_DEAD_LETTER = sa.select(DEAD_LETTERS).where(DEAD_LETTERS.c.id == sa.bindparam("letter"))
DELETE_DEAD_LETTER = sa.delete(DEAD_LETTERS).where(DEAD_LETTERS.c.id == sa.bindparam("letter"))
