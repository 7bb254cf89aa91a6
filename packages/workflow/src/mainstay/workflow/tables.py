"""The tables: runs, their history, the signals sent to them, the values that they publish, and what they ask people.

The history is only ever added to. What a step's record says is the sum of its entries, in the order of `seq`; a run's
worker numbers them, and the fence on the run's row keeps everybody else from writing any. So a write that was repeated,
because it is unknown whether its commit arrived, finds its own rows there and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from mainstay.database import FenceOn, Schema, database_now, upsert
from mainstay.workflow._history import Kind

__all__ = ["SCHEMA"]

ID_LENGTH = 200
_ROUNDING_SECONDS = 0.001  # a run that is due by then is due now: its moment is a sum of floats
STEP_LENGTH = 300

metadata = sa.MetaData()


runs = sa.Table(
    "mainstay_workflow_runs",
    metadata,
    sa.Column("id", sa.String(ID_LENGTH), primary_key=True),
    sa.Column("workflow", sa.String(100), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    # queued, running, or one of the ends; `compensating` is a running or queued run that has a failure
    sa.Column("status", sa.String(24), nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("worker", sa.String(100)),
    # claims since anything came of a step, and the number of the entry that said so
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("progress", sa.Integer, nullable=False),
    # workers that died under it since then, and how many runs the last of them was executing: see `_isolation.py`
    sa.Column("deaths", sa.Integer, nullable=False, server_default="0"),
    sa.Column("company", sa.Integer, nullable=False, server_default="0"),
    # claimed not before this moment of the database's clock, and in this order
    sa.Column("wake_at", sa.Double, nullable=False),
    sa.Column("cancel_requested", sa.Boolean, nullable=False),
    # raised by a signal, the end of a child, a cancellation: a run that goes to sleep says what it has seen of that, so
    # that going to sleep and being woken cannot miss each other
    sa.Column("news", sa.Integer, nullable=False, server_default="0"),
    # past this moment of the database's clock the run fails, unless it is past its pivot
    sa.Column("deadline", sa.Double),
    # the run that waits for this one, and its generation then
    sa.Column("parent", sa.String(ID_LENGTH)),
    sa.Column("parent_generation", sa.Integer),
    # raised each time that the run goes on with new input and without its history
    sa.Column("generation", sa.Integer, nullable=False, server_default="1"),
    sa.Column("input", sa.Text, nullable=False),
    # the input of the first generation, once there is another: a start that is repeated is compared with it
    sa.Column("first_input", sa.Text),
    sa.Column("output", sa.Text),
    sa.Column("failure", sa.Text),
    # why it is parked
    sa.Column("note", sa.Text),
    sa.Column("context", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False, server_default=database_now()),
    sa.Column("ended_at", sa.Double),
    sa.Index(
        "mainstay_workflow_runs_queue",
        "wake_at",
        postgresql_where=sa.text("status = 'queued'"),
        sqlite_where=sa.text("status = 'queued'"),
    ),
    sa.Index(
        "mainstay_workflow_runs_suspects",
        "company",
        postgresql_where=sa.text("status = 'queued' and deaths >= 2"),
        sqlite_where=sa.text("status = 'queued' and deaths >= 2"),
    ),
    sa.Index(
        "mainstay_workflow_runs_worker",
        "worker",
        postgresql_where=sa.text("status = 'running'"),
        sqlite_where=sa.text("status = 'running'"),
    ),
    # for lists, each in its order
    sa.Index("mainstay_workflow_runs_listed", "status", "created_at"),
    sa.Index(
        "mainstay_workflow_runs_ended",
        "status",
        "ended_at",
        "id",
        postgresql_where=sa.text("ended_at is not null"),
        sqlite_where=sa.text("ended_at is not null"),
    ),
    sa.Index(
        "mainstay_workflow_runs_parent",
        "parent",
        postgresql_where=sa.text("parent is not null"),
        sqlite_where=sa.text("parent is not null"),
    ),
)

history = sa.Table(
    "mainstay_workflow_history",
    metadata,
    sa.Column("run_id", sa.String(ID_LENGTH), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    # see `_history.Kind`
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("step", sa.String(STEP_LENGTH), nullable=False),
    # the place in its branch at which the workflow function asked for the step; null for a compensation
    sa.Column("position", sa.Integer),
    # an intent's input, a done step's result
    sa.Column("body", sa.Text),
    sa.Column("info", sa.Text),
    sa.Column("at", sa.Double, nullable=False, server_default=database_now()),
)

signals = sa.Table(
    "mainstay_workflow_signals",
    metadata,
    # their order; the id is the sender's
    sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("run_id", sa.String(ID_LENGTH), nullable=False),
    sa.Column("id", sa.String(ID_LENGTH), nullable=False),
    sa.Column("name", sa.String(100), nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("received_by", sa.String(STEP_LENGTH)),
    sa.Column("at", sa.Double, nullable=False, server_default=database_now()),
    sa.UniqueConstraint("run_id", "id", name="mainstay_workflow_signals_once"),
    sa.Index(
        "mainstay_workflow_signals_unclaimed",
        "at",
        postgresql_where=sa.text("received_by is null"),
        sqlite_where=sa.text("received_by is null"),
    ),
    sqlite_autoincrement=True,
)

# What a run says of itself while it runs; only the newest of each name.
values = sa.Table(
    "mainstay_workflow_values",
    metadata,
    sa.Column("run_id", sa.String(ID_LENGTH), primary_key=True),
    sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("body", sa.Text, nullable=False),
    # the key of the step, or of the place in the function
    sa.Column("set_by", sa.String(STEP_LENGTH), nullable=False),
    sa.Column("at", sa.Double, nullable=False, server_default=database_now()),
)

# What runs ask people. The decision is a signal of the ask's id, and so is the end of an ask without one: the first of
# them settles it.
asks = sa.Table(
    "mainstay_workflow_asks",
    metadata,
    sa.Column("run_id", sa.String(ID_LENGTH), primary_key=True),
    sa.Column("id", sa.String(ID_LENGTH), primary_key=True),
    sa.Column("name", sa.String(100), nullable=False),
    # the key of the place in the function, as people see it
    sa.Column("place", sa.String(STEP_LENGTH), nullable=False),
    sa.Column("question", sa.Text, nullable=False),
    # it is not settled, and its run does not go back
    sa.Column("open", sa.Boolean, nullable=False),
    sa.Column("asked_at", sa.Double, nullable=False, server_default=database_now()),
    sa.Column("due_at", sa.Double),
    sa.Column("escalated_at", sa.Double),
    sa.Index("mainstay_workflow_asks_open", "asked_at", postgresql_where=sa.text("open"), sqlite_where=sa.text("open")),
)

# A run that has ended, or waits, has no owner: then its last one cannot write either. And a cancellation that was
# accepted is not overtaken by what cannot be undone.
RUN_FENCE = FenceOn(
    runs,
    runs.c.id,
    runs.c.epoch,
    owner_column=runs.c.worker,
    where=runs.c.status == "running",
    flag_column=runs.c.cancel_requested,
)

SCHEMA = Schema("workflow", metadata, Path(__file__).parent / "migrations")

_ENTRY = ("run_id", "seq", "kind", "step", "position", "body", "info")
_entry_values: dict[str, Any] = {name: sa.bindparam(name) for name in _ENTRY}

# What was written once stays, so repeating it after a commit whose end was not seen is safe.
APPEND = {
    "sqlite": sqlite.insert(history).values(_entry_values).on_conflict_do_nothing(),
    "postgresql": postgresql.insert(history).values(_entry_values).on_conflict_do_nothing(),
}
# Where the entry shares its commit with somebody's effect, finding it there must undo the second effect.
APPEND_ONCE = sa.insert(history).values(_entry_values)

# What a later entry says, too.
FORGET = sa.delete(history).where(history.c.run_id == sa.bindparam("run"), history.c.seq == sa.bindparam("outdated"))

_RUN = (
    "id",
    "workflow",
    "version",
    "status",
    "epoch",
    "worker",
    "attempts",
    "progress",
    "cancel_requested",
    "input",
    "context",
    "parent",
    "parent_generation",
)
_run_values: dict[str, Any] = {
    **{name: sa.bindparam(name) for name in _RUN},
    "wake_at": database_now(),
    "deadline": database_now() + sa.bindparam("left_seconds", type_=sa.Double),
}


def moment(seconds: float) -> datetime:
    """A moment of the tables; one past the end of the calendar, as of a wait for ever, is the calendar's last."""
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, OSError, ValueError):
        return datetime.max.replace(tzinfo=UTC)


def new_run(
    *,
    id: str,
    workflow: str,
    version: int,
    input: str,
    context: str,
    left_seconds: float | None,
    worker: str | None = None,
    parent: tuple[str, int] | None = None,
) -> dict[str, Any]:
    """The row of a run that begins: in the queue, or executed at once by a worker.

    Args:
        left_seconds: until its deadline.
        parent: its id and generation.
    """
    claims = 0 if worker is None else 1
    return {
        "id": id,
        "workflow": workflow,
        "version": version,
        "status": "queued" if worker is None else "running",
        "epoch": claims,
        "worker": worker,
        "attempts": claims,
        "progress": 0,
        "cancel_requested": False,
        "input": input,
        "context": context,
        "parent": None if parent is None else parent[0],
        "parent_generation": None if parent is None else parent[1],
        "left_seconds": left_seconds,
    }


START = sa.insert(runs).values(_run_values)
# Inside somebody's transaction a conflict would end that transaction.
START_QUIETLY = {
    "sqlite": sqlite.insert(runs).values(_run_values).on_conflict_do_nothing(),
    "postgresql": postgresql.insert(runs).values(_run_values).on_conflict_do_nothing(),
}

# Beside the fence, so that repeating one of these after an unseen commit changes nothing.
_mine = (
    runs.c.id == sa.bindparam("run"),
    runs.c.epoch == sa.bindparam("at_epoch"),
    runs.c.status == "running",
)

# Of one run there is one such row in a batch, or several that say the same.
_BY_COLUMN = {"mainstay_by_column": True}

END = (
    sa.update(runs)
    .execution_options(**_BY_COLUMN)
    .where(*_mine)
    .values(
        status=sa.bindparam("status"),
        output=sa.bindparam("output"),
        failure=sa.bindparam("failure"),
        worker=None,
        ended_at=database_now(),
    )
)
FAIL = sa.update(runs).where(*_mine).values(failure=sa.bindparam("failure"))
# A run for which a cancellation was accepted does not wait for a person where there is a way back.
_cancels = sa.and_(runs.c.cancel_requested, sa.bindparam("cancellable", type_=sa.Boolean))
PARK = (
    sa.update(runs)
    .where(*_mine)
    .values(
        status=sa.case((_cancels, "queued"), else_=sa.bindparam("status", type_=sa.String)),
        note=sa.bindparam("note"),
        worker=None,
        wake_at=sa.case((_cancels, database_now()), else_=runs.c.wake_at),
    )
)
# A stop that was asked for is no attempt, so the claim's count goes back.
RELEASE = (
    sa.update(runs)
    .where(*_mine)
    .values(
        status="queued",
        worker=None,
        attempts=sa.case((runs.c.attempts > 0, runs.c.attempts - 1), else_=0),
        wake_at=sa.case(
            (
                # News that a wait has seen may have been a cancellation, of which a wait sees nothing.
                sa.or_(
                    runs.c.news > sa.bindparam("seen", type_=sa.Integer),
                    sa.and_(runs.c.cancel_requested, sa.not_(sa.bindparam("knows", type_=sa.Boolean))),
                ),
                database_now(),
            ),
            else_=database_now() + sa.bindparam("delay", type_=sa.Double),
        ),
    )
)
# The run goes on with new input: nothing of what it did can be undone any more, so nothing of it needs to be known.
CONTINUE = (
    sa.update(runs)
    .where(*_mine)
    .values(
        status="queued",
        worker=None,
        version=sa.bindparam("next_version"),
        first_input=sa.func.coalesce(runs.c.first_input, runs.c.input),
        input=sa.bindparam("next_input"),
        generation=runs.c.generation + 1,
        attempts=0,
        progress=0,
        deaths=0,
        company=0,
        note=None,
        wake_at=database_now(),
    )
)
FORGET_HISTORY = sa.delete(history).where(history.c.run_id == sa.bindparam("run"))
# The last entry by which the run got further. That an attempt began is no progress: a step that kills its worker begins
# at every claim.
_reached = (
    sa.select(sa.func.coalesce(sa.func.max(history.c.seq), 0))
    .where(history.c.run_id == runs.c.id, history.c.kind.not_in([Kind.INTENT, Kind.WAIT]))
    .scalar_subquery()
)
_further = _reached > runs.c.progress
GOT_FURTHER = sa.select(runs.c.id).where(runs.c.id.in_(sa.bindparam("ids", expanding=True)), _further)
# As many deaths make a run a suspect. Literal, so that the partial index serves every plan.
SUSPECT_DEATHS = 2
_suspect = runs.c.deaths >= sa.literal_column(str(SUSPECT_DEATHS))

# How the claims of a run ended since it last got further. One that broke off says so, also where its worker died later.
DIED = "its worker died each time"
# How many runs the dead worker was executing.
COMPANY = sa.select(sa.func.count()).where(runs.c.worker == sa.bindparam("dead"), runs.c.status == "running")
_in_company = sa.bindparam("together", type_=sa.Integer) > 1
# The worker is dead; should it only be asleep, it wakes up at an epoch that is over. Rows that are held are left out.
_of_dead = (
    sa.select(runs.c.id)
    .where(runs.c.worker == sa.bindparam("dead"), runs.c.status == "running")
    .order_by(runs.c.id)
    .limit(sa.bindparam("most"))
    .with_for_update(skip_locked=True)
    .cte("of_dead")
)
TAKE_OVER = (
    sa.update(runs)
    .where(runs.c.id.in_(sa.select(_of_dead.c.id)), runs.c.worker == sa.bindparam("dead"), runs.c.status == "running")
    .values(
        status="queued",
        worker=None,
        epoch=runs.c.epoch + 1,
        deaths=sa.case((_further, 0), else_=runs.c.deaths + 1),
        company=sa.bindparam("together", type_=sa.Integer),
        # In company another run may have killed the worker, so the claim's count goes back.
        attempts=sa.case((sa.and_(_in_company, runs.c.attempts > 0), runs.c.attempts - 1), else_=runs.c.attempts),
        note=sa.case((_in_company, runs.c.note), else_=sa.func.coalesce(runs.c.note, DIED)),
    )
    .returning(runs.c.id)
)
# A run that this worker owns and does not execute: it is never taken over from a living worker.
REQUEUE = (
    sa.update(runs)
    .where(
        runs.c.id == sa.bindparam("run"),
        runs.c.worker == sa.bindparam("owner"),
        runs.c.epoch == sa.bindparam("at_epoch"),
        runs.c.status == "running",
    )
    .values(status="queued", worker=None, epoch=runs.c.epoch + 1, note=sa.bindparam("note"))
)
CANCEL = (
    sa.update(runs)
    .where(runs.c.id == sa.bindparam("run"), runs.c.status.in_(["queued", "running"]))
    .values(cancel_requested=True, news=runs.c.news + 1, wake_at=database_now())
)
# A person has looked at the run: what its claims came to before does not count any more.
_anew: dict[str, Any] = {"attempts": 0, "deaths": 0, "company": 0}
# A run that has ended well, and is to be undone all the same: it goes back from there.
UNDO_ENDED = (
    sa.update(runs)
    .where(runs.c.id == sa.bindparam("run"), runs.c.status == "completed")
    .values(
        status="queued",
        failure=sa.bindparam("failure"),
        output=None,
        ended_at=None,
        epoch=runs.c.epoch + 1,
        wake_at=database_now(),
        **_anew,
    )
)
CANCEL_PARKED = (
    sa.update(runs)
    .where(runs.c.id == sa.bindparam("run"), runs.c.status == "parked")
    .values(
        cancel_requested=True,
        status="queued",
        epoch=runs.c.epoch + 1,
        note=None,
        wake_at=database_now(),
        **_anew,
    )
)
# A parked run whose pivot may have taken effect: only a resume settles that, and then it is cancelled or past it.
CANCEL_LATER = (
    sa.update(runs).where(runs.c.id == sa.bindparam("run"), runs.c.status == "parked").values(cancel_requested=True)
)
RESUME = (
    sa.update(runs)
    .where(runs.c.id == sa.bindparam("run"), runs.c.status.in_(["parked", "compensation_failed"]))
    .values(status="queued", epoch=runs.c.epoch + 1, note=None, wake_at=database_now(), **_anew)
)
# Held until the decision about it is committed: its worker, and other decisions, wait for that.
HOLD = (
    sa.select(runs.c.status, runs.c.failure, runs.c.parent, runs.c.workflow)
    .where(runs.c.id == sa.bindparam("run"))
    .with_for_update()
)
_not_ended = runs.c.status.in_(["queued", "running", "parked", "compensation_failed"])
TERMINATE = (
    sa.update(runs)
    .where(runs.c.id == sa.bindparam("run"), _not_ended)
    .values(
        status="terminated",
        failure=sa.bindparam("failure"),
        worker=None,
        epoch=runs.c.epoch + 1,
        ended_at=database_now(),
    )
)
CHILDREN_GOING_ON = (
    sa.select(runs.c.id, runs.c.failure, runs.c.workflow)
    .where(runs.c.parent == sa.bindparam("run"), _not_ended)
    .order_by(runs.c.id)
    .with_for_update()
)
NEXT_SEQ = sa.select(sa.func.coalesce(sa.func.max(history.c.seq), 0) + 1).where(history.c.run_id == sa.bindparam("run"))

_signal_values: dict[str, Any] = {name: sa.bindparam(name) for name in ("run_id", "id", "name", "body")}
SEND = {
    "sqlite": sqlite.insert(signals).values(_signal_values).on_conflict_do_nothing(),
    "postgresql": postgresql.insert(signals).values(_signal_values).on_conflict_do_nothing(),
}
_sent_to = sa.select(sa.bindparam("run", type_=sa.String).label("id")).subquery()
# How the run is, and the message of that id, where there are any: a message may come before its run.
SENT = sa.select(runs.c.status, signals.c.name, signals.c.body).select_from(
    _sent_to.outerjoin(runs, runs.c.id == _sent_to.c.id).outerjoin(
        signals, sa.and_(signals.c.run_id == _sent_to.c.id, signals.c.id == sa.bindparam("message"))
    )
)
# The row of the run is written whatever its state: who puts the run to sleep at this moment writes it, too, and waits.
ROUSE = (
    sa.update(runs)
    .where(runs.c.id == sa.bindparam("run"), runs.c.status.in_(["queued", "running"]))
    .values(news=runs.c.news + 1, wake_at=database_now())
)
RECEIVE = (
    sa.update(signals)
    .where(signals.c.run_id == sa.bindparam("run"), signals.c.number == sa.bindparam("message"))
    .values(received_by=sa.bindparam("by"))
)
# A signal that was received is in the history of the step that did; its row only knows it again when it is repeated.
FORGET_RECEIVED = sa.delete(signals).where(
    signals.c.run_id == sa.bindparam("run"),
    signals.c.received_by.is_not(None),
    signals.c.at < database_now() - sa.bindparam("kept_seconds", type_=sa.Double),
)
NEXT_SIGNAL = (
    sa.select(runs.c.news, signals.c.number, signals.c.body)
    .select_from(
        runs.outerjoin(
            signals,
            sa.and_(
                signals.c.run_id == runs.c.id,
                signals.c.name == sa.bindparam("name"),
                signals.c.received_by.is_(None),
            ),
        )
    )
    .where(runs.c.id == sa.bindparam("run"))
    .order_by(signals.c.number)
    .limit(1)
)
_children = runs.alias("children")
CHILD = (
    sa.select(runs.c.news, _children.c.status, _children.c.output, _children.c.failure)
    .select_from(runs.outerjoin(_children, _children.c.id == sa.bindparam("child")))
    .where(runs.c.id == sa.bindparam("run"))
)

SET_VALUE = upsert(values, lambda new: {"body": new.body, "set_by": new.set_by, "at": new.at})
VALUES = (
    sa.select(values.c.name, values.c.body, values.c.set_by, values.c.at)
    .select_from(runs.outerjoin(values, values.c.run_id == runs.c.id))
    .where(runs.c.id == sa.bindparam("run"))
    .order_by(values.c.name)
)
VALUE = (
    sa.select(values.c.name, values.c.body, values.c.set_by, values.c.at)
    .select_from(runs.outerjoin(values, sa.and_(values.c.run_id == runs.c.id, values.c.name == sa.bindparam("name"))))
    .where(runs.c.id == sa.bindparam("run"))
)

_ask_values: dict[str, Any] = {
    **{name: sa.bindparam(name) for name in ("run_id", "id", "name", "place", "question")},
    "open": sa.true(),
    "due_at": database_now() + sa.bindparam("left_seconds", type_=sa.Double),
}
ASK = upsert(asks).values(_ask_values)
_this_ask = sa.and_(asks.c.run_id == sa.bindparam("run"), asks.c.id == sa.bindparam("ask"))
ASK_LEFT = sa.select((asks.c.due_at - database_now()).label("seconds")).where(_this_ask)
ESCALATE = sa.update(asks).where(_this_ask, asks.c.escalated_at.is_(None)).values(escalated_at=database_now())
CLOSE_ASK = sa.update(asks).where(_this_ask).values(open=False)
# A run that goes back, or is ended as it is, waits for no answer any more.
CLOSE_ASKS = sa.update(asks).where(asks.c.run_id == sa.bindparam("run"), asks.c.open).values(open=False)
# Refused where the ask is settled.
SETTLE = sa.insert(signals).values({**_signal_values, "received_by": sa.bindparam("received_by")})
# A run that goes back, or is about to, does not wait for people.
_waits_for_people = sa.and_(
    runs.c.status.in_(["queued", "running", "parked"]), runs.c.failure.is_(None), sa.not_(runs.c.cancel_requested)
)
_of_runs = asks.join(runs, runs.c.id == asks.c.run_id)
OPEN_ASKS = (
    sa.select(asks)
    .select_from(_of_runs)
    # The text of the condition of the index: SQLite takes no other for the same.
    .where(sa.text("mainstay_workflow_asks.open"), _waits_for_people)
    .order_by(asks.c.asked_at)
    .limit(sa.bindparam("most"))
)
ASKED = (
    sa.select(asks)
    .select_from(runs.outerjoin(asks, sa.and_(asks.c.run_id == runs.c.id, asks.c.name == sa.bindparam("name"))))
    .where(runs.c.id == sa.bindparam("run"))
    .order_by(asks.c.asked_at)
)
# What an earlier generation asked, once its decision is forgotten: until then the same decision may come again.
FORGET_SETTLED_ASKS = sa.delete(asks).where(
    asks.c.run_id == sa.bindparam("run"),
    sa.not_(asks.c.open),
    ~sa.exists().where(signals.c.run_id == asks.c.run_id, signals.c.id == asks.c.id),
)
HOLD_RUN = sa.select(runs.c.id).where(runs.c.id == sa.bindparam("run")).with_for_update()
DECIDABLE = (
    sa.select(
        asks.c.due_at,
        asks.c.escalated_at,
        signals.c.body,
        _waits_for_people.label("waits"),
        database_now().label("now"),
    )
    .select_from(_of_runs.outerjoin(signals, sa.and_(signals.c.run_id == asks.c.run_id, signals.c.id == asks.c.id)))
    .where(_this_ask)
)

ASLEEP = sa.and_(runs.c.status == "queued", runs.c.wake_at > database_now() + _ROUNDING_SECONDS)
VIEW = sa.select(runs, ASLEEP.label("asleep"))
FIND = VIEW.where(runs.c.id == sa.bindparam("run"))
FIND_ALL = sa.select(runs.c.id, runs.c.workflow, runs.c.input, runs.c.first_input).where(
    runs.c.id.in_(sa.bindparam("ids", expanding=True))
)
STATES = sa.select(runs.c.id, runs.c.status, runs.c.output, runs.c.failure, runs.c.note).where(
    runs.c.id.in_(sa.bindparam("ids", expanding=True))
)
OF_WORKER = sa.select(runs.c.id, runs.c.epoch, runs.c.cancel_requested).where(
    runs.c.worker == sa.bindparam("owner"), runs.c.status == "running"
)
NOW = sa.select(database_now())
CLAIM = sa.select(runs.c.epoch, runs.c.status, runs.c.cancel_requested).where(runs.c.id == sa.bindparam("run"))
WORKERS = sa.select(runs.c.worker).where(runs.c.status == "running").distinct()
ENTRIES = (
    sa.select(history, database_now().label("now"))
    .where(history.c.run_id.in_(sa.bindparam("ids", expanding=True)))
    .order_by(history.c.run_id, history.c.seq)
)
ENTRY = sa.select(history.c.kind, history.c.body).where(
    history.c.run_id == sa.bindparam("run"), history.c.seq == sa.bindparam("seq")
)


CLAIMED_AT_ONCE = 200
"""The most runs of one claim: more would hold their rows, and on SQLite the writer, for longer than it saves."""

# Read once in a statement: a clock that is asked for every row is compared with every row, also those that sleep.
_NOW = sa.select(database_now() + _ROUNDING_SECONDS).scalar_subquery()


class Claims:
    """The statements that depend on which workflows a worker knows.

    Args:
        known: their time limits in seconds, by name and version.
    """

    def __init__(self, known: Mapping[tuple[str, int], float | None]) -> None:
        named = {
            (name, version): sa.and_(runs.c.workflow == name, runs.c.version == version) for name, version in known
        }
        mine = sa.or_(sa.false(), *named.values())
        limits = [(named[key], seconds) for key, seconds in known.items() if seconds is not None]
        due = sa.and_(runs.c.status == "queued", mine, runs.c.wake_at <= _NOW)
        # Whether runs wait that may be claimed together, and the largest company of the suspects that wait, if any do.
        self.waiting = sa.select(
            sa.exists().where(due, sa.not_(_suspect)).label("others"),
            sa.select(sa.func.max(runs.c.company)).where(due, _suspect).scalar_subquery().label("company"),
        )
        self.next_due = (
            sa.select((runs.c.wake_at - database_now()).label("seconds"))
            .where(runs.c.status == "queued", mine, runs.c.wake_at > _NOW)
            .order_by(runs.c.wake_at)
            .limit(1)
        )
        self.claim = _claim(due, sa.not_(_suspect), deadline=_deadline(limits))
        # Those of one company: a group of half of it is then smaller than what any of them died in.
        together = runs.c.company == sa.bindparam("together", type_=sa.Integer)
        self.claim_suspects = _claim(due, _suspect, together, deadline=_deadline(limits))
        self.unknown = (
            sa.select(runs.c.workflow, runs.c.version, sa.func.count().label("waiting"))
            .where(runs.c.status == "queued", sa.not_(mine))
            .group_by(runs.c.workflow, runs.c.version)
        )


def _deadline(limits: Sequence[tuple[sa.ColumnElement[bool], float]]) -> sa.ColumnElement[Any]:
    """The deadline of a run that is claimed.

    A run that was started by name, in a process without the code, has none yet: the first worker that has the code
    gives it that of its workflow.
    """
    if not limits:
        return runs.c.deadline
    first = sa.and_(runs.c.epoch == 0, runs.c.deadline.is_(None))
    return sa.case((first, runs.c.created_at + sa.case(*limits)), else_=runs.c.deadline)


def _claim(*which: sa.ColumnElement[bool], deadline: sa.ColumnElement[Any]) -> sa.UpdateBase:
    due = (
        sa.select(runs.c.id, _reached.label("reached"))
        .where(*which)
        .order_by(runs.c.wake_at)
        .limit(sa.bindparam("most"))
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    # A limit that PostgreSQL knows when it plans: so few are looked up one by one, however many are due.
    taken = sa.select(due).limit(sa.literal_column(str(CLAIMED_AT_ONCE))).cte("taken")
    # The attempt is counted here, so that a crash counts; what came of a step since the last claim makes it the first.
    further = taken.c.reached > runs.c.progress
    return (
        sa.update(runs)
        .where(runs.c.id == taken.c.id)
        .values(
            status="running",
            epoch=runs.c.epoch + 1,
            worker=sa.bindparam("owner"),
            deadline=deadline,
            attempts=sa.case((further, 1), else_=runs.c.attempts + 1),
            progress=taken.c.reached,
            deaths=sa.case((further, 0), else_=runs.c.deaths),
            company=sa.case((further, 0), else_=runs.c.company),
            note=sa.case((further, None), else_=runs.c.note),
        )
        .returning(*runs.c, (runs.c.deadline - database_now()).label("left_seconds"))
    )


PARKED = sa.select(sa.func.count()).select_from(runs).where(runs.c.status.in_(["parked", "compensation_failed"]))
