"""The tables, and the statements that touch them.

Times in them are the database's own clock, in seconds since 1970. Headers are JSON pairs of name and value, the value's
bytes as Latin-1 or null, so that whatever a foreign producer wrote comes back as it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from mainstay.database import Schema, database_now
from mainstay.events.metadata import UNREADABLE, Headers

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
    # On SQLite the position itself is the order of commits.
    sa.Index("mainstay_events_log_xid", "xid", "position").ddl_if(dialect="postgresql"),
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
ANY = ""
"""In place of a member: the row says when a group had one at last, whichever it was."""
NOT_ASIDE = -1
OUTBOX = sa.Table(
    "mainstay_events_outbox",
    METADATA,
    sa.Column("position", _BIG, primary_key=True, autoincrement=True),
    sa.Column("lane", sa.Integer, nullable=False),
    sa.Column("topic", sa.Text, nullable=False),
    # Of a row that was put aside, the partition that takes nothing at the moment; of all others -1, since an index has
    # an order among equal values and none among nulls.
    sa.Column("aside", sa.Integer, nullable=False, server_default="-1"),
    sa.Column("key", sa.LargeBinary),
    sa.Column("value", sa.LargeBinary),
    sa.Column("headers", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False, server_default="0"),
    # For each topic the rows that are to be sent, and for each partition those that were put aside, in order.
    sa.Index("mainstay_events_outbox_topic", "topic", "aside", "position"),
    sqlite_autoincrement=True,
)
REFUSED = sa.Table(
    "mainstay_events_refused",
    METADATA,
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("topic", sa.Text, nullable=False),
    sa.Column("key", sa.LargeBinary),
    sa.Column("value", sa.LargeBinary),
    sa.Column("headers", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
)
SCHEDULED = sa.Table(
    "mainstay_events_scheduled",
    METADATA,
    sa.Column("position", _BIG, primary_key=True, autoincrement=True),
    sa.Column("id", sa.Uuid, nullable=False),
    sa.Column("due_at", sa.Double, nullable=False),
    sa.Column("topic", sa.Text, nullable=False),
    sa.Column("type", sa.Text, nullable=False),  # what it is looked for by, as its headers say
    sa.Column("key", sa.LargeBinary),
    sa.Column("value", sa.LargeBinary),
    sa.Column("headers", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False, server_default="0"),
    sa.Index("mainstay_events_scheduled_due", "due_at", "position"),
    sa.Index("mainstay_events_scheduled_id", "id"),
    sqlite_autoincrement=True,
)
INBOX = sa.Table(
    "mainstay_events_inbox",
    METADATA,
    sa.Column("group_name", sa.Text, primary_key=True),
    sa.Column("event_id", sa.Text, primary_key=True),
    sa.Column("created_at", sa.BigInteger, nullable=False, server_default="0"),
    sa.Index("mainstay_events_inbox_created_at", "created_at"),
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
    # What it is looked for by, as its headers say.
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("correlation_id", sa.Text),
    sa.Column("state", sa.Text, nullable=False, server_default="waiting"),
    sa.Column("received", sa.LargeBinary),  # the value before it was edited
    sa.Column("edited", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("reason", sa.Text, nullable=False, server_default=""),
    sa.Column("changed_by", sa.Text, nullable=False, server_default=""),
    sa.Column("changed_at", sa.DateTime(timezone=True)),
    sa.Index("mainstay_events_dead_letters_state", "state", "time", "id"),
)

PARKED_KEYS = sa.Table(
    "mainstay_events_parked_keys",
    METADATA,
    sa.Column("group_name", sa.Text, primary_key=True),
    sa.Column("topic", sa.Text, primary_key=True),
    sa.Column("key", sa.LargeBinary, primary_key=True),
    sa.Column("id", sa.Uuid, nullable=False, unique=True),
    sa.Column("partition", sa.Integer, nullable=False),
    # Of the first event of its queue: the number of its next attempt, and what its retries go by.
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("postponed", sa.Integer, nullable=False),
    sa.Column("later", sa.Integer, nullable=False),  # of the delays of a RetryLater it has been given so many
    sa.Column("waited_seconds", sa.Double, nullable=False),
    sa.Column("error", sa.Text, nullable=False),
    sa.Column("failing_since", sa.Double, nullable=False),
    sa.Column("due_at", sa.Double),  # null while it waits for a person
    # How often it was claimed, and its first event called by a process that did nothing else carefully, to no end.
    sa.Column("begun", sa.Integer, nullable=False, server_default="0"),
    sa.Column("crashes", sa.Integer, nullable=False, server_default="0"),
    sa.Column("kind", sa.Text, nullable=False),  # of the first event of its queue: only who handles it may work on it
    # Who works on the queue, and until when no other may.
    sa.Column("worker", sa.Text),
    sa.Column("claimed_until", sa.Double),
    # One event in a queue of its own, which `key` is then the name of: it has no key, or waits by itself.
    sa.Column("alone", sa.Boolean, nullable=False),
    sa.Column("own_key", sa.LargeBinary),  # of its events, as it was received
    sa.Index("mainstay_events_parked_keys_due", "group_name", "due_at"),
)
HANDLED = sa.Table(
    "mainstay_events_handled",
    METADATA,
    sa.Column("group_name", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, primary_key=True),  # type and major version, like order.paid 2.x
    sa.Column("seen_at", sa.Double, nullable=False),
)
PARKED = sa.Table(
    "mainstay_events_parked",
    METADATA,
    sa.Column("position", _BIG, primary_key=True, autoincrement=True),
    sa.Column("id", sa.Uuid, nullable=False, unique=True),
    sa.Column("group_name", sa.Text, nullable=False),
    sa.Column("topic", sa.Text, nullable=False),
    sa.Column("partition", sa.Integer, nullable=False),
    sa.Column("offset", sa.BigInteger, nullable=False),
    sa.Column("key", sa.LargeBinary, nullable=False),
    sa.Column("value", sa.LargeBinary),
    sa.Column("headers", sa.Text, nullable=False),
    # It stays until its key is free: whoever reads the partition once more must not append it again.
    sa.Column("handled", sa.Boolean, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Index("mainstay_events_parked_queue", "group_name", "topic", "key", "position"),
    sqlite_autoincrement=True,
)

PAUSES = sa.Table(
    "mainstay_events_pauses",
    METADATA,
    sa.Column("id", sa.Uuid, primary_key=True),
    sa.Column("group_name", sa.Text, nullable=False),
    # Of the whole group where both are null.
    sa.Column("kind", sa.Text),
    sa.Column("key", sa.LargeBinary),
    sa.Column("paused_by", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("paused_at", sa.Double, nullable=False),
)

# Of each partition, who holds it and how its holders ended. See `_crashes`.
HOLDERS = sa.Table(
    "mainstay_events_holders",
    METADATA,
    sa.Column("group_name", sa.Text, primary_key=True),
    sa.Column("topic", sa.Text, primary_key=True),
    sa.Column("partition", sa.Integer, primary_key=True),
    sa.Column("holder", sa.Uuid, nullable=False),
    # Of the last one that has begun with an event:
    sa.Column("held", sa.Boolean, nullable=False, server_default=sa.false()),  # until it gives up, or is about to
    sa.Column("first", sa.BigInteger),  # the offset that it began at
    sa.Column("ends", sa.Integer, nullable=False, server_default="0"),  # of those that began there, in a row
    # While it is read carefully: the event that was called last, and how often a holder has ended during its call.
    sa.Column("called", sa.BigInteger),
    sa.Column("calling", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("called_seconds", sa.Double, nullable=False, server_default="0"),
    sa.Column("crashes", sa.Integer, nullable=False, server_default="0"),
)

# Of each process, the events that it has had in hand for long. See `_in_hand`.
IN_HAND = sa.Table(
    "mainstay_events_in_hand",
    METADATA,
    sa.Column("group_name", sa.Text, primary_key=True),
    sa.Column("process", sa.Text, primary_key=True),
    sa.Column("topic", sa.Text, primary_key=True),
    sa.Column("partition", sa.Integer, primary_key=True),
    sa.Column("offset", sa.BigInteger, primary_key=True),
    sa.Column("key", sa.LargeBinary),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("event_id", sa.Text, nullable=False),
    sa.Column("handler", sa.Text, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("error", sa.Text, nullable=False),
    sa.Column("began_at", sa.Double, nullable=False),
    sa.Column("again_at", sa.Double),  # null while it is called
    sa.Column("noted_at", sa.Double, nullable=False),
)

SCHEMA = Schema("events", METADATA, Path(__file__).parent / "migrations")


def pack_headers(headers: Headers) -> str:
    """Headers as a table keeps them."""
    pairs = [(name, None if value is None else value.decode("latin-1")) for name, value in headers]
    return json.dumps(pairs, separators=(",", ":"), ensure_ascii=False)  # a byte takes two at most, and not six


def unpack_headers(text: str) -> Headers:
    """What `pack_headers` was given.

    Raises:
        ValueError: the text is nothing of the kind.
    """
    try:
        pairs: list[tuple[object, str | None]] = json.loads(text)
        headers = [(name, None if value is None else value.encode("latin-1")) for name, value in pairs]
    except (TypeError, AttributeError) as error:
        msg = f"no list of headers: {error}"
        raise ValueError(msg) from error
    if not all(isinstance(name, str) for name, _ in headers):
        msg = "no list of headers: a name is not text"
        raise ValueError(msg)
    return cast("Headers", headers)


def headers_of(text: str) -> Headers:
    """The same; of what cannot be read, the header that says so."""
    try:
        return unpack_headers(text)
    except ValueError as error:
        return [(UNREADABLE, f"the headers in the table cannot be read: {error}".encode())]


def _binds(table: sa.Table, *names: str) -> dict[str, sa.BindParameter[Any]]:
    return {name: sa.bindparam(name, type_=table.c[name].type) for name in names}


def _each(make: Callable[[Insert, sa.ColumnElement[float]], T]) -> dict[str, T]:
    """A statement for each dialect, from its own `insert` and the database's time."""
    return {"sqlite": make(sqlite.insert, database_now()), "postgresql": make(postgresql.insert, database_now())}


_SECONDS = sa.bindparam("seconds", type_=sa.Double)

INSERT_LOG = sa.insert(LOG).values(_binds(LOG, "topic", "partition", "key", "value", "headers"))
_OLDEST = (
    sa.select(LOG.c.xid, LOG.c.position, LOG.c.topic, LOG.c.partition, LOG.c.created_at)
    .where(LOG.c.position > sa.bindparam("after", type_=sa.BigInteger))
    .order_by(LOG.c.position)
    .limit(2000)
    .subquery()
)
# The oldest positions first: nothing else needs an index by time.
READ_OLD_LOG = {
    dialect: sa.select(transaction.label("xid"), _OLDEST.c.position, _OLDEST.c.topic, _OLDEST.c.partition)
    .where(_OLDEST.c.created_at < database_now() - _SECONDS)
    .order_by(_OLDEST.c.position)
    for dialect, transaction in (("sqlite", _OLDEST.c.position), ("postgresql", _OLDEST.c.xid))
}
DELETE_LOG = sa.delete(LOG).where(LOG.c.position == sa.bindparam("row", type_=sa.BigInteger))

INSERT_OUTBOX = sa.insert(OUTBOX).values(_binds(OUTBOX, "lane", "topic", "key", "value", "headers"))
OUTBOX_TOPICS = sa.text(
    # One look into the index for each topic, however many rows there are.
    "WITH RECURSIVE topics (topic) AS ("
    "SELECT min(topic) FROM mainstay_events_outbox UNION ALL "
    "SELECT (SELECT min(topic) FROM mainstay_events_outbox WHERE topic > topics.topic) FROM topics "
    "WHERE topics.topic IS NOT NULL) SELECT topic FROM topics"
)


_POSITIONS = postgresql.ARRAY(sa.BigInteger)


def _bytes(table: sa.Table) -> sa.Label[int]:
    """How large the event of a row is."""
    return (
        sa.func.coalesce(sa.func.length(table.c.value), 0)
        + sa.func.coalesce(sa.func.length(table.c.key), 0)
        + sa.func.length(table.c.headers)
    ).label("bytes")


def _any_of(positions: sa.Select[Any]) -> sa.ColumnElement[Any]:
    """Positions as an array on PostgreSQL: so they are looked up, also where the planner expects many."""
    return sa.any_(sa.func.array(positions.scalar_subquery(), type_=_POSITIONS))


def _page(*conditions: sa.ColumnElement[bool]) -> dict[str, sa.Select[Any]]:
    """The oldest rows that fulfil conditions, for as long as those before them are not too many bytes together."""
    oldest = (
        sa.select(OUTBOX.c.position, _bytes(OUTBOX))
        .where(*conditions, OUTBOX.c.lane.in_(sa.bindparam("lanes", expanding=True)))
        .order_by(OUTBOX.c.position)
        .limit(sa.bindparam("limit", type_=sa.Integer))
        .subquery()
    )
    together = sa.func.sum(oldest.c.bytes).over(order_by=oldest.c.position)
    sized = sa.select(oldest.c.position, (together - oldest.c.bytes).label("before")).subquery()
    fit = sa.select(sized.c.position).where(sized.c.before < sa.bindparam("bytes", type_=sa.BigInteger))
    rows = sa.select(OUTBOX).order_by(OUTBOX.c.position)
    return {
        "sqlite": rows.where(OUTBOX.c.position.in_(fit)),
        "postgresql": rows.where(OUTBOX.c.position == _any_of(fit)),
    }


@cache
def read_outbox(topics: int, dialect: str) -> sa.Executable:
    """A page of each of so many topics."""
    pages = [
        _page(OUTBOX.c.topic == sa.bindparam(f"topic_{number}", type_=sa.Text), OUTBOX.c.aside == NOT_ASIDE)[dialect]
        for number in range(topics)
    ]
    return pages[0] if topics == 1 else sa.union_all(*(sa.select(page.subquery()) for page in pages))


READ_ASIDE = _page(
    OUTBOX.c.topic == sa.bindparam("topic", type_=sa.Text),
    OUTBOX.c.aside == sa.bindparam("partition", type_=sa.Integer),
)
PLACES_ASIDE = (
    sa.select(OUTBOX.c.topic, OUTBOX.c.aside)
    .where(OUTBOX.c.aside != NOT_ASIDE, OUTBOX.c.lane.in_(sa.bindparam("lanes", expanding=True)))
    .distinct()
)
PUT_ASIDE = (
    sa.update(OUTBOX)
    .where(OUTBOX.c.position == sa.bindparam("row"))
    .values(aside=sa.bindparam("of_partition", type_=sa.Integer))
)
_KEPT = ("position", "topic", "key", "value", "headers", "created_at")
REFUSE = sa.insert(REFUSED).from_select(
    [*_KEPT, "reason"],
    sa.select(*(OUTBOX.c[name] for name in _KEPT), sa.bindparam("reason", type_=sa.Text)).where(
        OUTBOX.c.position == sa.bindparam("row", type_=sa.BigInteger)
    ),
)
_ACCEPTED = ("topic", "key", "value", "headers")
TRY_REFUSED = sa.insert(OUTBOX).from_select(
    ["lane", *_ACCEPTED],
    sa.select(sa.bindparam("lane", type_=sa.Integer), *(REFUSED.c[name] for name in _ACCEPTED)).where(
        REFUSED.c.position == sa.bindparam("row", type_=sa.BigInteger)
    ),
)
LIST_REFUSED = sa.select(REFUSED).order_by(REFUSED.c.position).limit(sa.bindparam("limit", type_=sa.Integer))
GET_REFUSED = sa.select(REFUSED).where(REFUSED.c.position == sa.bindparam("row", type_=sa.BigInteger))
DELETE_REFUSED = sa.delete(REFUSED).where(REFUSED.c.position == sa.bindparam("row", type_=sa.BigInteger))
DELETE_OUTBOX = sa.delete(OUTBOX).where(OUTBOX.c.position == sa.bindparam("sent"))
_oldest_created_at = sa.select(OUTBOX.c.created_at).order_by(OUTBOX.c.position).limit(1).scalar_subquery()
MEASURE_OUTBOX = _each(
    lambda _, now: sa.select(
        sa.select(sa.func.count())
        .select_from(sa.select(OUTBOX.c.position).limit(10_000).subquery())
        .scalar_subquery()
        .label("depth"),
        (now - _oldest_created_at).label("age"),
        sa.select(sa.func.count()).select_from(REFUSED).scalar_subquery().label("refused"),
    )
)

SCHEDULE = sa.insert(SCHEDULED).values(
    **_binds(SCHEDULED, "id", "topic", "type", "key", "value", "headers"),
    # One of the two is null.
    due_at=sa.func.coalesce(
        sa.bindparam("at", type_=sa.Double), database_now() + sa.bindparam("delay", type_=sa.Double)
    ),
)
_FIRST_DUE_AT = sa.select(sa.func.min(SCHEDULED.c.due_at)).scalar_subquery()
NEXT_DUE = sa.select((_FIRST_DUE_AT - database_now()).label("seconds"))
_BY_DUE = (SCHEDULED.c.due_at, SCHEDULED.c.position)


def _take_due() -> dict[str, sa.Executable]:
    """Take a page of what is due, by time and position, out of the table, but for what a cancellation holds.

    And but for the positions `unreadable`: an array, on SQLite as JSON.
    """
    taken = sa.delete(SCHEDULED).returning(SCHEDULED)
    as_json = sa.func.json_each(sa.bindparam("unreadable", type_=sa.Text)).table_valued("value")
    as_array = sa.bindparam("unreadable", type_=_POSITIONS)
    return {
        "sqlite": taken.where(
            SCHEDULED.c.position.in_(_due_page(SCHEDULED.c.position.not_in(sa.select(as_json.c.value))))
        ),
        "postgresql": taken.where(
            SCHEDULED.c.position == _any_of(_due_page(SCHEDULED.c.position != sa.all_(as_array)))
        ),
    }


def _due_page(readable: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """The positions of a page of what is due."""
    due = (
        sa.select(*_BY_DUE, _bytes(SCHEDULED))
        # A query of its own: compared with a function whose value changes, no index would be used.
        .where(SCHEDULED.c.due_at <= sa.select(database_now()).scalar_subquery(), readable)
        .order_by(*_BY_DUE)
        .limit(sa.bindparam("limit", type_=sa.Integer))
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    together = sa.func.sum(due.c.bytes).over(order_by=(due.c.due_at, due.c.position))
    sized = sa.select(due.c.position, (together - due.c.bytes).label("before")).subquery()
    return sa.select(sized.c.position).where(sized.c.before < sa.bindparam("bytes", type_=sa.BigInteger))


TAKE_DUE = _take_due()
CANCEL_SCHEDULED = (
    sa.delete(SCHEDULED).where(SCHEDULED.c.id == sa.bindparam("scheduled", type_=sa.Uuid)).returning(SCHEDULED)
)
LIST_SCHEDULED = sa.select(SCHEDULED).order_by(*_BY_DUE).limit(sa.bindparam("limit", type_=sa.Integer))
MEASURE_SCHEDULED = sa.select(
    sa.select(sa.func.count())
    .select_from(sa.select(SCHEDULED.c.position).limit(10_000).subquery())
    .scalar_subquery()
    .label("waiting"),
    (database_now() - _FIRST_DUE_AT).label("overdue"),
)

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
        .where(MEMBERS.c.group_name == sa.bindparam("group"), MEMBERS.c.member != ANY, MEMBERS.c.expires_at > now)
        .order_by(MEMBERS.c.member)
    )
)
LEAVE_GROUP = sa.delete(MEMBERS).where(
    MEMBERS.c.group_name == sa.bindparam("of_group"), MEMBERS.c.member == sa.bindparam("leaver")
)
FORGET_MEMBERS = _each(
    lambda _, now: sa.delete(MEMBERS).where(MEMBERS.c.member != ANY, MEMBERS.c.expires_at < now - _SECONDS)
)
READ_AWAY = _each(
    lambda _, now: sa.select(MEMBERS.c.group_name, MEMBERS.c.topic, (now - MEMBERS.c.expires_at).label("away")).where(
        MEMBERS.c.member == ANY
    )
)

READ_OFFSETS = sa.select(OFFSETS).where(
    OFFSETS.c.group_name == sa.bindparam("group"),
    OFFSETS.c.topic == sa.bindparam("of_topic"),
    OFFSETS.c.partition == sa.bindparam("number"),
)
ANY_OFFSET = (
    sa.select(OFFSETS.c.partition)
    .where(OFFSETS.c.group_name == sa.bindparam("group"), OFFSETS.c.topic == sa.bindparam("of_topic"))
    .limit(1)
)
READ_PLACES = sa.select(OFFSETS).where(OFFSETS.c.group_name != "")
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
BEGIN_OFFSET = _each(
    lambda insert, _: (
        insert(OFFSETS).values(**_binds(OFFSETS, "group_name", "topic", "partition"), **_PLACE).on_conflict_do_nothing()
    )
)
COMMIT_OFFSET = _each(
    lambda insert, _: (
        insert(OFFSETS)
        .values(**_binds(OFFSETS, "group_name", "topic", "partition"), **_PLACE)
        .on_conflict_do_update(index_elements=["group_name", "topic", "partition"], set_=_PLACE)
    )
)

_INBOX_NOTE = _binds(INBOX, "group_name", "event_id")
_WHOLE_NOTE = _INBOX_NOTE["group_name"] + "\n" + _INBOX_NOTE["event_id"]
INSERT_INBOX = {
    "sqlite": sqlite.insert(INBOX).values(_INBOX_NOTE).on_conflict_do_nothing(),
    # Where another transaction is in the middle of the event there is no row and no waiting.
    "postgresql": postgresql.insert(INBOX)
    .from_select(
        [*_INBOX_NOTE],
        sa.select(*_INBOX_NOTE.values()).where(
            sa.func.pg_try_advisory_xact_lock(sa.func.hashtextextended(_WHOLE_NOTE, 0))
        ),
    )
    .on_conflict_do_nothing(),
}
# The notes of a batch, a row for each that was not there. A lock for each would soon be all that a server has: where
# another transaction is in the middle of one of them it is waited for, shortly.
_EVENT_IDS = sa.bindparam("event_ids", type_=postgresql.ARRAY(sa.Text))
_SOME_NOTES = sa.func.unnest(_EVENT_IDS).table_valued("event_id").render_derived()
_SOME_NOTES_AS_JSON = sa.func.json_each(sa.bindparam("event_ids", type_=sa.Text)).table_valued("value")
INSERT_INBOX_NOTES = {
    "sqlite": sqlite.insert(INBOX)
    .from_select([*_INBOX_NOTE], sa.select(_INBOX_NOTE["group_name"], _SOME_NOTES_AS_JSON.c.value).where(sa.true()))
    .on_conflict_do_nothing()
    .returning(INBOX.c.event_id),
    "postgresql": postgresql.insert(INBOX)
    .from_select([*_INBOX_NOTE], sa.select(_INBOX_NOTE["group_name"], _SOME_NOTES.c.event_id))
    .on_conflict_do_nothing()
    .returning(INBOX.c.event_id),
}
WAIT_SHORTLY = sa.text("SELECT current_setting('lock_timeout'), set_config('lock_timeout', '100ms', true)")
WAIT_AS_BEFORE = sa.text("SELECT set_config('lock_timeout', :before, true)")
# A client that is frozen between two messages of one statement holds a transaction that does not count as idle, so that
# the server would never end it: its backend is active, and waits for its client.
_FROZEN = (
    "backend.state = 'active' AND backend.wait_event = 'ClientRead' "
    "AND current_setting('idle_in_transaction_session_timeout') <> '0' "
    "AND backend.state_change < clock_timestamp() "
    "- CAST(current_setting('idle_in_transaction_session_timeout') AS interval)"
)
END_FROZEN = sa.text(
    "SELECT pg_terminate_backend(backend.pid) "
    "FROM (SELECT hashtextextended(CAST(:group_name AS text) || chr(10) || CAST(:event_id AS text), 0) AS key) note "
    "JOIN pg_locks held ON held.locktype = 'advisory' AND held.granted AND held.objsubid = 1 "
    "AND held.classid = CAST((note.key >> 32) & 4294967295 AS oid) "
    "AND held.objid = CAST(note.key & 4294967295 AS oid) "
    "JOIN pg_stat_activity backend ON backend.pid = held.pid AND backend.datname = current_database() WHERE " + _FROZEN
)
_HOLDS_NOTES = (
    "SELECT pg_terminate_backend(backend.pid) FROM pg_locks held "
    "JOIN pg_stat_activity backend ON backend.pid = held.pid AND backend.datname = current_database() "
    "WHERE held.locktype = 'relation' AND held.granted AND held.mode = 'RowExclusiveLock' "
    "AND held.relation = CAST('mainstay_events_inbox' AS regclass) AND "
)
END_FROZEN_BATCHES = sa.text(_HOLDS_NOTES + _FROZEN)
# Of what is committed with others, which is refused as a whole where the note is there.
INSERT_NEW_INBOX = sa.insert(INBOX).values(_INBOX_NOTE)
READ_INBOX = sa.select(INBOX.c.event_id).where(
    INBOX.c.group_name == _INBOX_NOTE["group_name"], INBOX.c.event_id == _INBOX_NOTE["event_id"]
)
_NOTE = sa.tuple_(INBOX.c.group_name, INBOX.c.event_id)
DELETE_OLD_INBOX = _each(
    lambda _, now: sa.delete(INBOX).where(
        _NOTE.in_(
            sa.select(INBOX.c.group_name, INBOX.c.event_id)
            .where(INBOX.c.created_at < now - _SECONDS)
            .order_by(INBOX.c.created_at)
            .limit(5000)
        )
    )
)
OLDEST_INBOX = _each(lambda _, now: sa.select(INBOX.c.event_id).where(INBOX.c.created_at < now - _SECONDS).limit(1))

_LETTER_COLUMNS = (
    "id", "group_name", "topic", "partition", "offset", "key", "value", "headers", "error", "attempts", "time", "type",
    "correlation_id",
)  # fmt: skip
INSERT_DEAD_LETTER = _each(
    lambda insert, _: insert(DEAD_LETTERS).values(_binds(DEAD_LETTERS, *_LETTER_COLUMNS)).on_conflict_do_nothing()
)
_THE_LETTER = DEAD_LETTERS.c.id == sa.bindparam("letter", type_=sa.Uuid)
GET_DEAD_LETTER = sa.select(DEAD_LETTERS).where(_THE_LETTER)
# Not one that was sent again: twice would be too often.
_CHANGED = _binds(DEAD_LETTERS, "changed_by", "changed_at")
SETTLE_DEAD_LETTER = (
    sa.update(DEAD_LETTERS)
    .where(_THE_LETTER, DEAD_LETTERS.c.state.in_(sa.bindparam("from_states", expanding=True)))
    .values(**_CHANGED, **_binds(DEAD_LETTERS, "state", "reason"))
)
EDIT_DEAD_LETTER = (
    sa.update(DEAD_LETTERS)
    .where(_THE_LETTER, DEAD_LETTERS.c.state != "redriven")
    .values(
        **_CHANGED,
        received=sa.case((DEAD_LETTERS.c.edited, DEAD_LETTERS.c.received), else_=DEAD_LETTERS.c.value),
        value=sa.bindparam("payload", type_=sa.LargeBinary),
        edited=True,
    )
)
_SETTLED = (
    sa.select(DEAD_LETTERS.c.id)
    .where(
        DEAD_LETTERS.c.state.in_(["redriven", "discarded"]),
        DEAD_LETTERS.c.changed_at < sa.bindparam("before", type_=sa.DateTime(timezone=True)),
    )
    .limit(1000)
)
OLD_DEAD_LETTERS = _SETTLED.limit(1)
DELETE_OLD_DEAD_LETTERS = sa.delete(DEAD_LETTERS).where(DEAD_LETTERS.c.id.in_(_SETTLED))


_OF_KEY = (
    PARKED_KEYS.c.group_name == sa.bindparam("of_group"),
    PARKED_KEYS.c.topic == sa.bindparam("of_topic"),
    PARKED_KEYS.c.key == sa.bindparam("of_key", type_=sa.LargeBinary),
)
_WAITS = (
    PARKED.c.group_name == PARKED_KEYS.c.group_name,
    PARKED.c.topic == PARKED_KEYS.c.topic,
    PARKED.c.key == PARKED_KEYS.c.key,
    ~PARKED.c.handled,
)
_WAITING = sa.select(sa.func.count()).select_from(PARKED).where(*_WAITS).correlate(PARKED_KEYS).scalar_subquery()
_DUE = sa.bindparam("due", type_=sa.Double)  # null stays null
READ_PARKED_KEYS = sa.select(PARKED_KEYS.c.key).where(
    PARKED_KEYS.c.group_name == sa.bindparam("of_group"),
    PARKED_KEYS.c.topic == sa.bindparam("of_topic"),
    ~PARKED_KEYS.c.alone,
)
_ATTEMPTS = _binds(PARKED_KEYS, "attempt", "postponed", "later", "waited_seconds", "error")
PARK_KEY = _each(
    lambda insert, now: (
        insert(PARKED_KEYS)
        .values(
            **_binds(PARKED_KEYS, "id", "group_name", "topic", "key", "partition", "kind", "alone", "own_key"),
            **_ATTEMPTS,
            failing_since=now - sa.bindparam("age", type_=sa.Double),
            due_at=now + _DUE,
        )
        .on_conflict_do_nothing()
    )
)
_ME = sa.bindparam("me", type_=sa.Text)
_LEASE = sa.bindparam("lease", type_=sa.Double)
_NO_CLAIM: dict[str, Any] = {"worker": None, "claimed_until": None, "begun": 0, "crashes": 0}
KEEP_PARKED_KEY = _each(
    lambda _, now: (
        sa.update(PARKED_KEYS)
        .where(*_OF_KEY, PARKED_KEYS.c.worker == _ME)
        .values(
            **_ATTEMPTS,
            failing_since=sa.func.coalesce(now - sa.bindparam("age", type_=sa.Double), PARKED_KEYS.c.failing_since),
            due_at=now + _DUE,
            **_NO_CLAIM,
        )
    )
)
INSERT_PARKED = _each(
    lambda insert, _: (
        insert(PARKED)
        .values(_binds(PARKED, *(column.name for column in PARKED.columns if column.name != "position")))
        .on_conflict_do_nothing()
    )
)
# An update that changes nothing: it takes the row, so that nobody frees or works on the key meanwhile.
HOLD_PARKED_KEY = sa.update(PARKED_KEYS).where(*_OF_KEY).values(partition=PARKED_KEYS.c.partition)
HOLD_CLAIMED_KEY = HOLD_PARKED_KEY.where(PARKED_KEYS.c.worker == _ME)
NOTE_CRASH = (
    sa.update(PARKED_KEYS).where(*_OF_KEY, PARKED_KEYS.c.worker == _ME).values(crashes=PARKED_KEYS.c.crashes + 1)
)
_FIRST_KIND = (
    sa.select(PARKED.c.kind).where(*_WAITS).order_by(PARKED.c.position).limit(1).correlate(PARKED_KEYS)
).scalar_subquery()
NEXT_OF_PARKED_KEY = _each(
    lambda _, now: (
        sa.update(PARKED_KEYS)
        .where(*_OF_KEY)
        .values(
            attempt=1,
            postponed=0,
            later=0,
            waited_seconds=0.0,
            failing_since=now,
            due_at=now,
            begun=0,
            crashes=0,
            kind=sa.func.coalesce(_FIRST_KIND, ""),
        )
    )
)
FREE_PARKED_KEY = sa.delete(PARKED_KEYS).where(*_OF_KEY, ~sa.exists().where(*_WAITS).correlate(PARKED_KEYS))
_KEPT_SECONDS = sa.bindparam("kept", type_=sa.Double)
_CONCERNS = (
    PAUSES.c.group_name == PARKED_KEYS.c.group_name,
    sa.or_(
        PAUSES.c.kind == PARKED_KEYS.c.kind,
        PAUSES.c.key == PARKED_KEYS.c.own_key,
        sa.and_(PAUSES.c.kind.is_(None), PAUSES.c.key.is_(None)),
    ),
)
_IS_PAUSED = sa.exists().where(*_CONCERNS)


def _due(now: sa.ColumnElement[float]) -> sa.Select[Any]:
    """Parked keys that are due, that no process works on, and whose first event this one may handle.

    None is due while a person has paused it.
    """
    handled = sa.exists().where(
        HANDLED.c.group_name == PARKED_KEYS.c.group_name,
        HANDLED.c.kind == PARKED_KEYS.c.kind,
        HANDLED.c.seen_at > now - _KEPT_SECONDS,
    )
    return (
        sa.select(PARKED_KEYS.c.id)
        .where(
            PARKED_KEYS.c.group_name == sa.bindparam("of_group"),
            PARKED_KEYS.c.due_at <= now,
            sa.or_(PARKED_KEYS.c.claimed_until.is_(None), PARKED_KEYS.c.claimed_until <= now),
            sa.or_(PARKED_KEYS.c.kind.in_(sa.bindparam("mine", expanding=True)), ~handled),
            ~_IS_PAUSED,
        )
        .order_by(PARKED_KEYS.c.due_at)
        .limit(sa.bindparam("most", type_=sa.Integer))
    )


ARE_DUE = _each(lambda _, now: _due(now))
CLAIM_DUE_PARKED_KEYS = _each(
    lambda insert, now: (
        sa.update(PARKED_KEYS)
        .where(
            PARKED_KEYS.c.id.in_(_due(now) if insert is sqlite.insert else _due(now).with_for_update(skip_locked=True))
        )
        .values(worker=_ME, claimed_until=now + _LEASE, begun=PARKED_KEYS.c.begun + 1)
        .returning(PARKED_KEYS.c.id, PARKED_KEYS.c.topic, PARKED_KEYS.c.partition, PARKED_KEYS.c.key)
    )
)
_CLAIMED = (PARKED_KEYS.c.worker == _ME, PARKED_KEYS.c.id.in_(sa.bindparam("keys", expanding=True, type_=sa.Uuid)))
PROLONG_CLAIMS = _each(lambda _, now: sa.update(PARKED_KEYS).where(*_CLAIMED).values(claimed_until=now + _LEASE))
RELEASE_CLAIMS = sa.update(PARKED_KEYS).where(*_CLAIMED).values(**_NO_CLAIM)
RELEASE_ALL_CLAIMS = (
    sa.update(PARKED_KEYS)
    .where(PARKED_KEYS.c.group_name == sa.bindparam("of_group"), PARKED_KEYS.c.worker == _ME)
    .values(**_NO_CLAIM)
)


def _is_stuck(now: sa.ColumnElement[float]) -> sa.ColumnElement[bool]:
    """Whether a parked key waits for a person, or is tried again and again to no end, which none is while paused."""
    tried = sa.and_(PARKED_KEYS.c.later == 0, PARKED_KEYS.c.attempt + PARKED_KEYS.c.postponed > 1, ~_IS_PAUSED)
    return sa.or_(PARKED_KEYS.c.due_at.is_(None), sa.and_(tried, PARKED_KEYS.c.failing_since < now - _SECONDS))


PARKED_KINDS = _each(
    lambda _, now: (
        sa.select(
            PARKED_KEYS.c.kind,
            sa.func.count().filter(PARKED_KEYS.c.later == 0).label("keys"),
            sa.func.count().filter(PARKED_KEYS.c.later > 0).label("aside"),
            sa.func.count(PARKED_KEYS.c.due_at).label("due"),
            sa.func.count().filter(_is_stuck(now)).label("stuck"),
            sa.func.min(PARKED_KEYS.c.failing_since).filter(_is_stuck(now)).label("since"),
            (now - sa.func.min(PARKED_KEYS.c.failing_since).filter(_is_stuck(now))).label("seconds"),
        )
        .where(PARKED_KEYS.c.group_name == sa.bindparam("of_group"))
        .group_by(PARKED_KEYS.c.kind)
    )
)
COUNTED_PARKED = 10_000
COUNT_PARKED_EVENTS = sa.select(
    sa.select(sa.func.count())
    .select_from(
        sa.select(PARKED.c.position)
        .where(PARKED.c.group_name == sa.bindparam("of_group"), ~PARKED.c.handled)
        .limit(COUNTED_PARKED)
        .subquery()
    )
    .scalar_subquery()
    .label("events")
)
READ_FIRST_PARKED = _each(
    lambda _, now: (
        sa.select(
            PARKED,
            PARKED_KEYS.c.attempt,
            PARKED_KEYS.c.postponed,
            PARKED_KEYS.c.later,
            PARKED_KEYS.c.own_key,
            PARKED_KEYS.c.waited_seconds,
            PARKED_KEYS.c.begun,
            PARKED_KEYS.c.crashes,
            (now - PARKED_KEYS.c.failing_since).label("age"),
        )
        .join_from(PARKED_KEYS, PARKED, sa.and_(*_WAITS))
        .where(*_OF_KEY)
        .order_by(PARKED.c.position)
        .limit(1)
    )
)
HANDLE_PARKED = (
    sa.update(PARKED).where(PARKED.c.position == sa.bindparam("done")).values(handled=True, value=None, headers="[]")
)
LIST_PARKED_KEYS = (
    sa.select(PARKED_KEYS, _WAITING.label("waiting"), _IS_PAUSED.label("paused"))
    .order_by(PARKED_KEYS.c.failing_since, PARKED_KEYS.c.id)
    .limit(sa.bindparam("limit", type_=sa.Integer))
)
LIST_PARKED_KEYS_OF = LIST_PARKED_KEYS.where(PARKED_KEYS.c.group_name == sa.bindparam("of_group"))
GET_PARKED_KEY = sa.select(PARKED_KEYS, _WAITING.label("waiting"), _IS_PAUSED.label("paused")).where(
    PARKED_KEYS.c.id == sa.bindparam("parked")
)
DELETE_QUEUE = sa.delete(PARKED).where(
    PARKED.c.group_name == sa.bindparam("of_group"),
    PARKED.c.topic == sa.bindparam("of_topic"),
    PARKED.c.key == sa.bindparam("of_key", type_=sa.LargeBinary),
)

# By its own name: a holder that was thought dead says nothing about its successor.
_OF_HOLDER = (
    HOLDERS.c.group_name == sa.bindparam("of_group"),
    HOLDERS.c.topic == sa.bindparam("of_topic"),
    HOLDERS.c.partition == sa.bindparam("number"),
    HOLDERS.c.holder == sa.bindparam("of_holder", type_=sa.Uuid),
)
TAKE_PARTITION = _each(
    lambda insert, _: (
        insert(HOLDERS)
        .values(**_binds(HOLDERS, "group_name", "topic", "partition", "holder"))
        .on_conflict_do_update(index_elements=["group_name", "topic", "partition"], set_=_binds(HOLDERS, "holder"))
    )
)
READ_HOLDER = sa.select(HOLDERS).where(*_OF_HOLDER)
BEGIN_PARTITION = (
    sa.update(HOLDERS)
    .where(*_OF_HOLDER)
    .values(held=True, calling=False, **_binds(HOLDERS, "first", "ends", "called", "called_seconds", "crashes"))
)
# An update that changes nothing: it takes the row, so that no other takes the partition meanwhile.
KEEP_PARTITION = sa.update(HOLDERS).where(*_OF_HOLDER).values(partition=HOLDERS.c.partition)
NOTE_CALL = (
    sa.update(HOLDERS).where(*_OF_HOLDER).values(calling=True, **_binds(HOLDERS, "called", "called_seconds", "crashes"))
)
NOTE_NO_CALL = sa.update(HOLDERS).where(*_OF_HOLDER).values(calling=False, called=None, called_seconds=0.0, crashes=0)
GIVE_UP_PARTITION = sa.update(HOLDERS).where(*_OF_HOLDER).values(held=False, calling=False)
NOTE_HANDLED = _each(
    lambda insert, now: (
        insert(HANDLED)
        .values(**_binds(HANDLED, "group_name", "kind"), seen_at=now)
        .on_conflict_do_update(index_elements=["group_name", "kind"], set_={"seen_at": now})
    )
)
READ_HANDLED = _each(
    lambda _, now: sa.select(HANDLED.c.kind, (now - HANDLED.c.seen_at).label("age")).where(
        HANDLED.c.group_name == sa.bindparam("of_group"), HANDLED.c.seen_at > now - _KEPT_SECONDS
    )
)
ALL_HANDLED = _each(
    lambda _, now: sa.select(HANDLED.c.group_name, HANDLED.c.kind).where(HANDLED.c.seen_at > now - _KEPT_SECONDS)
)
COUNT_PARKED = (
    sa.select(PARKED_KEYS.c.group_name, sa.func.count().label("keys"))
    .where(PARKED_KEYS.c.later == 0)
    .group_by(PARKED_KEYS.c.group_name)
)
COUNT_CRASHES = sa.select(HOLDERS.c.group_name, sa.func.max(HOLDERS.c.crashes).label("crashes")).group_by(
    HOLDERS.c.group_name
)
FORGET_HANDLED = _each(
    lambda _, now: sa.delete(HANDLED).where(
        HANDLED.c.group_name == sa.bindparam("of_group"),
        HANDLED.c.kind == sa.bindparam("of_kind"),
        HANDLED.c.seen_at <= now - sa.bindparam("gone", type_=sa.Double),
    )
)
# Its own, and those of processes that have ended long ago.
FORGET_IN_HAND = _each(
    lambda _, now: sa.delete(IN_HAND).where(
        IN_HAND.c.group_name == sa.bindparam("of_group"),
        sa.or_(IN_HAND.c.process == _ME, IN_HAND.c.noted_at < now - _SECONDS),
    )
)
NOTE_IN_HAND = _each(
    lambda insert, now: (
        insert(IN_HAND)
        .values(
            **_binds(
                IN_HAND,
                "group_name",
                "process",
                "topic",
                "partition",
                "offset",
                "key",
                "type",
                "event_id",
                "handler",
                "attempt",
                "error",
            ),
            began_at=now - sa.bindparam("age", type_=sa.Double),
            again_at=now + sa.bindparam("again", type_=sa.Double),
            noted_at=now,
        )
        .on_conflict_do_nothing()
    )
)
READ_IN_HAND = _each(
    lambda _, now: (
        sa.select(IN_HAND)
        .where(IN_HAND.c.group_name == sa.bindparam("of_group"), IN_HAND.c.noted_at > now - _SECONDS)
        .order_by(IN_HAND.c.began_at)
    )
)
READ_CALLED = sa.select(HOLDERS.c.topic, HOLDERS.c.partition, HOLDERS.c.called, HOLDERS.c.crashes).where(
    HOLDERS.c.group_name == sa.bindparam("of_group"), HOLDERS.c.called.is_not(None)
)
HANDLING_GROUPS = _each(
    lambda _, now: (
        sa.select(HANDLED.c.group_name)
        .where(HANDLED.c.seen_at > now - _KEPT_SECONDS)
        .distinct()
        .order_by(HANDLED.c.group_name)
    )
)

_THE_PAUSE = PAUSES.c.id == sa.bindparam("pause", type_=sa.Uuid)
INSERT_PAUSE = _each(
    lambda insert, now: (
        insert(PAUSES)
        .values(**_binds(PAUSES, "id", "group_name", "kind", "key", "paused_by", "reason"), paused_at=now)
        .on_conflict_do_nothing()
    )
)
GET_PAUSE = sa.select(PAUSES).where(_THE_PAUSE)
_PAUSED_AT = sa.select(PAUSES.c.paused_at).where(_THE_PAUSE).scalar_subquery()
# What is tried again by itself has not aged while it was paused; what waits for a person has waited.
LEAVE_OUT_PAUSE = _each(
    lambda _, now: (
        sa.update(PARKED_KEYS)
        .where(
            PARKED_KEYS.c.due_at.is_not(None), PARKED_KEYS.c.worker.is_(None), sa.exists().where(_THE_PAUSE, *_CONCERNS)
        )
        .values(
            failing_since=sa.case(
                (PARKED_KEYS.c.failing_since < _PAUSED_AT, PARKED_KEYS.c.failing_since + now - _PAUSED_AT), else_=now
            )
        )
    )
)
DELETE_PAUSE = sa.delete(PAUSES).where(_THE_PAUSE)
READ_PAUSES = sa.select(PAUSES).where(PAUSES.c.group_name == sa.bindparam("of_group"))
LIST_PAUSES = sa.select(PAUSES).order_by(PAUSES.c.paused_at, PAUSES.c.id)
