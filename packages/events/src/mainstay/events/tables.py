"""The tables, and the statements that touch them.

Times in them are the database's own clock, in seconds since 1970. Headers are JSON pairs of name and value, the value's
bytes as Latin-1 or null, so that whatever a foreign producer wrote comes back as it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from mainstay.database import Schema, database_now
from mainstay.events.metadata import Headers

__all__ = ["SCHEMA"]

T = TypeVar("T")
Insert = Any
"""The `insert` of a dialect: both have `on_conflict_…`, and no type in common."""

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
    sa.Column("value", sa.LargeBinary),
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
    sa.Column("low", sa.Text, nullable=False),
    sa.Column("high", sa.Text, nullable=False),
    sa.Column("position", sa.BigInteger, nullable=False),
)
MEMBERS = sa.Table(
    "mainstay_events_members",
    METADATA,
    sa.Column("group_name", sa.Text, primary_key=True),
    sa.Column("member", sa.Text, primary_key=True),
    # Members of one group may read different topics: two releases do, for a while.
    sa.Column("topic", sa.Text, primary_key=True),
    sa.Column("expires_at", sa.Double, nullable=False),
)
OUTBOX = sa.Table(
    "mainstay_events_outbox",
    METADATA,
    sa.Column("position", _BIG, primary_key=True, autoincrement=True),
    sa.Column("lane", sa.Integer, nullable=False),
    sa.Column("topic", sa.Text, nullable=False),
    sa.Column("key", sa.LargeBinary),
    sa.Column("value", sa.LargeBinary),
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
    pairs = [(name, None if value is None else value.decode("latin-1")) for name, value in headers]
    return json.dumps(pairs, separators=(",", ":"), ensure_ascii=False)  # a byte takes two at most, and not six


def unpack_headers(text: str) -> Headers:
    """What `pack_headers` was given."""
    pairs: list[tuple[str, str | None]] = json.loads(text)
    return [(name, None if value is None else value.encode("latin-1")) for name, value in pairs]


def _binds(table: sa.Table, *names: str) -> dict[str, sa.BindParameter[Any]]:
    return {name: sa.bindparam(name, type_=table.c[name].type) for name in names}


def _each(make: Callable[[Insert, sa.ColumnElement[float]], T]) -> dict[str, T]:
    """A statement for each dialect, from its own `insert` and the database's time."""
    return {"sqlite": make(sqlite.insert, database_now()), "postgresql": make(postgresql.insert, database_now())}


_SECONDS = sa.bindparam("seconds", type_=sa.Double)

INSERT_LOG = sa.insert(LOG).values(_binds(LOG, "topic", "partition", "key", "value", "headers"))
_OLDEST = sa.select(LOG.c.position, LOG.c.created_at).order_by(LOG.c.position).limit(5000).subquery()
# The oldest positions first: nothing else needs an index by time.
DELETE_OLD_LOG = _each(
    lambda _, now: sa.delete(LOG).where(
        LOG.c.position.in_(sa.select(_OLDEST.c.position).where(_OLDEST.c.created_at < now - _SECONDS))
    )
)
OLDEST_LOG = _each(lambda _, now: sa.select(_OLDEST.c.position).where(_OLDEST.c.created_at < now - _SECONDS).limit(1))

INSERT_OUTBOX = sa.insert(OUTBOX).values(_binds(OUTBOX, "lane", "topic", "key", "value", "headers"))
READ_OUTBOX = (
    sa.select(OUTBOX)
    .where(
        OUTBOX.c.lane.in_(sa.bindparam("lanes", expanding=True)),
        OUTBOX.c.topic.not_in(sa.bindparam("paused", expanding=True)),
    )
    .order_by(OUTBOX.c.position)
    .limit(sa.bindparam("limit", type_=sa.Integer))
)
DELETE_OUTBOX = sa.delete(OUTBOX).where(OUTBOX.c.position == sa.bindparam("sent"))
COUNT_OUTBOX = sa.select(sa.func.count()).select_from(sa.select(OUTBOX.c.position).limit(10_000).subquery())

JOIN_GROUP = _each(
    lambda insert, now: (
        insert(MEMBERS)
        .values(**_binds(MEMBERS, "group_name", "member", "topic"), expires_at=now + _SECONDS)
        .on_conflict_do_update(index_elements=["group_name", "member", "topic"], set_={"expires_at": now + _SECONDS})
    )
)
READ_MEMBERS = _each(
    lambda _, now: (
        sa.select(MEMBERS.c.topic, MEMBERS.c.member)
        .where(MEMBERS.c.group_name == sa.bindparam("group"), MEMBERS.c.expires_at > now)
        .order_by(MEMBERS.c.member)
    )
)
LEAVE_GROUP = sa.delete(MEMBERS).where(
    MEMBERS.c.group_name == sa.bindparam("of_group"), MEMBERS.c.member == sa.bindparam("leaver")
)
FORGET_MEMBERS = _each(lambda _, now: sa.delete(MEMBERS).where(MEMBERS.c.expires_at < now - _SECONDS))

READ_OFFSETS = sa.select(OFFSETS).where(
    OFFSETS.c.group_name == sa.bindparam("group"),
    OFFSETS.c.topic == sa.bindparam("of_topic"),
    OFFSETS.c.partition == sa.bindparam("number"),
)
WIDEST_PARTITION = sa.select(sa.func.max(OFFSETS.c.partition))
# Nobody's place: it only says that events are written to partitions up to this one, for those who read with fewer.
NOTE_PARTITION = _each(
    lambda insert, _: (
        insert(OFFSETS)
        .values(group_name="", topic="", **_binds(OFFSETS, "partition"), low="", high="", position=0)
        .on_conflict_do_nothing()
    )
)
_PLACE = _binds(OFFSETS, "low", "high", "position")
COMMIT_OFFSET = _each(
    lambda insert, _: (
        insert(OFFSETS)
        .values(**_binds(OFFSETS, "group_name", "topic", "partition"), **_PLACE)
        .on_conflict_do_update(index_elements=["group_name", "topic", "partition"], set_=_PLACE)
    )
)

INSERT_INBOX = _each(
    lambda insert, _: insert(INBOX).values(_binds(INBOX, "group_name", "event_id")).on_conflict_do_nothing()
)
DELETE_OLD_INBOX = _each(lambda _, now: sa.delete(INBOX).where(INBOX.c.created_at < now - _SECONDS))

INSERT_DEAD_LETTER = _each(
    lambda insert, _: (
        insert(DEAD_LETTERS)
        .values(_binds(DEAD_LETTERS, *(column.name for column in DEAD_LETTERS.columns)))
        .on_conflict_do_nothing()
    )
)
LIST_DEAD_LETTERS = (
    sa.select(DEAD_LETTERS)
    .order_by(DEAD_LETTERS.c.time, DEAD_LETTERS.c.id)
    .limit(sa.bindparam("limit", type_=sa.Integer))
)
LIST_DEAD_LETTERS_OF = LIST_DEAD_LETTERS.where(DEAD_LETTERS.c.group_name == sa.bindparam("group"))
GET_DEAD_LETTER = sa.select(DEAD_LETTERS).where(DEAD_LETTERS.c.id == sa.bindparam("letter"))
DELETE_DEAD_LETTER = sa.delete(DEAD_LETTERS).where(DEAD_LETTERS.c.id == sa.bindparam("letter"))
