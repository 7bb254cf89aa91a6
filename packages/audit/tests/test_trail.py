"""What application code uses: entries that share the fate of what they report, and failures that survive it."""

import asyncio
from datetime import date
from decimal import Decimal
from enum import Enum, IntEnum
from unittest.mock import AsyncMock
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mainstay.audit import AuditError, AuditModule, AuditTrail, Entry, InvalidEntry, Sealer, tables
from mainstay.audit.entry import encode
from mainstay.audit.testing import recorded, settings, written
from mainstay.core import App, ConfigurationError, Context, MainstayError, NotBoundError, bind, bind_journal, derived_id
from mainstay.core.testing import eventually
from mainstay.database import (
    Database,
    DatabaseBusy,
    DatabaseError,
    DatabaseModule,
    DatabaseSettings,
    DatabaseUnavailable,
)
from mainstay.observability.testing import metric


class Forbidden(MainstayError):
    code = "AUTH_FORBIDDEN"
    status = 403
    title = "Forbidden"


@pytest.fixture
def trail():
    return AuditTrail()


@pytest.fixture
async def app(database_settings, trail):
    app = App(
        DatabaseModule.for_root(database_settings),
        AuditModule.for_root(settings()),
        AuditModule.for_feature(trail),
    )
    async with app:
        yield app


@pytest.fixture
def db(app):
    return app.get(Database)


async def settled(db, count):
    """Wait until so many entries are committed."""
    async with asyncio.timeout(10):
        while len(entries := await written(db)) < count:  # noqa: ASYNC110  another task's commit
            await asyncio.sleep(0.01)
    return entries


async def test_an_entry_tells_who_did_what_to_which_thing(db, trail):
    """Everything of the context and of the call comes out of the stored bytes, detail in its exact form."""

    class Colour(Enum):
        RED = "red"

    order = uuid4()
    detail = {"amount": Decimal("3.50"), "order": order, "n": [1, True, None], "colour": Colour.RED}
    with bind(actor="ann", tenant="acme", correlation_id="c-1", causation_id="e-1"):
        await trail.write("order.cancelled", resource=f"order/{order}", detail={**detail, "on": date(2026, 1, 1)})
    (entry,) = await written(db)
    assert (entry.action, entry.outcome, entry.resource) == ("order.cancelled", "succeeded", f"order/{order}")
    assert (entry.actor, entry.tenant, entry.correlation_id, entry.causation_id) == ("ann", "acme", "c-1", "e-1")
    plain = {"amount": "3.50", "order": str(order), "n": [1, True, None], "colour": "red", "on": "2026-01-01"}
    assert entry.detail == plain
    assert entry.number == 1
    assert entry.time.endswith("Z")


async def test_an_entry_shares_the_fate_of_its_unit_of_work(db, trail):
    """Committed with it, gone with it, and counted only when it is there."""
    before = metric("mainstay_audit_entries_total", outcome="succeeded")
    with pytest.raises(ZeroDivisionError):
        async with db.transaction():
            await trail.write("rolled.back")
            1 / 0  # noqa: B018  any exception
    async with db.transaction():
        await trail.write("committed")
    async with db.batch():
        await trail.write("batched")
    await trail.write("alone")
    assert [entry.action for entry in await written(db)] == ["committed", "batched", "alone"]
    assert metric("mainstay_audit_entries_total", outcome="succeeded") == before + 3


async def test_record_shares_the_transaction_of_the_function(db, trail):
    """What the function wrote and its entry are one commit; the result comes through; the resource is found by name."""
    seen = []

    @trail.record("order.cancelled", resource=lambda order_id: f"order/{order_id}")
    async def cancel(shop, order_id, *, why="none"):
        seen.append(db.in_unit_of_work())
        await trail.write("inner", detail={"why": why})
        return shop

    assert await cancel("s", order_id=7, why="rain") == "s"
    assert seen == [True]
    assert cancel.__name__ == "cancel"
    assert [(entry.action, entry.resource) for entry in await written(db)] == [
        ("inner", None), ("order.cancelled", "order/7"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "outcome", "code"),
    [
        (ValueError("secret detail"), "failed", "ValueError"),
        (PermissionError(), "denied", "PermissionError"),
        (Forbidden(), "denied", "AUTH_FORBIDDEN"),
        (DatabaseUnavailable("away"), "failed", "EXT_DATABASE_UNAVAILABLE"),
        (DatabaseUnavailable("lost", no_effect=False), "unknown", "EXT_DATABASE_UNAVAILABLE"),
    ],
)
async def test_trap_a_failure_survives_the_rollback(db, trail, error, outcome, code):
    """What the function wrote is gone, that it failed is there, with the error's code and not its message."""

    @trail.record("order.cancelled", resource="order/1")
    async def cancel():
        await trail.write("inner")
        raise error

    with pytest.raises(type(error)):
        await cancel()
    (entry,) = await written(db)
    assert (entry.action, entry.outcome, entry.resource, entry.detail) == (
        "order.cancelled", outcome, "order/1", {"error": code},
    )  # fmt: skip


async def test_a_failure_inside_an_outer_unit_survives_its_rollback_too(db, trail):
    """Also where the outer unit holds SQLite's only writer: nobody waits for himself, and the entry comes."""

    @trail.record("inner")
    async def fail():
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011  it is the one above
        async with asyncio.timeout(30), db.transaction():
            await trail.write("outer")
            await fail()
    (entry,) = await settled(db, 1)
    assert (entry.action, entry.outcome) == ("inner", "failed")


async def test_a_failure_is_recorded_however_long_the_unit_around_it_takes(tmp_path, trail):
    """On SQLite the unit holds the writer for longer than anybody waits for it: the entry is tried again."""
    app = App(
        DatabaseModule.for_root(
            DatabaseSettings(url=f"sqlite+aiosqlite:///{tmp_path / 'slow.db'}", busy_timeout_seconds=0.05)
        ),
        AuditModule.for_root(settings()),
        AuditModule.for_feature(trail),
    )
    attempts = []
    async with app:
        db, real = app.get(Database), Database.write

        async def write(self, *args, **options):
            try:
                await real(self, *args, **options)
            except DatabaseBusy:
                attempts.append("busy")
                raise

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Database, "write", write)
            async with asyncio.timeout(20), db.transaction():
                await trail.write("denied", outcome="denied")
                while not attempts:  # noqa: ASYNC110  another task's attempt
                    await asyncio.sleep(0.01)
            (entry,) = await settled(db, 1)
    assert entry.outcome == "denied"


async def test_a_denial_is_durable_when_write_returns(db, trail):
    """Outside of a unit of work nothing is put off; inside of one that commits, both entries are there."""
    await trail.write("login", outcome="denied")
    assert [entry.outcome for entry in await written(db)] == ["denied"]
    async with asyncio.timeout(30), db.transaction():
        await trail.write("login", outcome="denied")
        await trail.write("login")
    assert sorted(entry.outcome for entry in await settled(db, 3)) == ["denied", "denied", "succeeded"]


async def test_a_cancelled_function_is_recorded_without_keeping_anybody(db, trail):
    """The cancellation goes on at once, and the entry follows."""
    entered = asyncio.Event()

    @trail.record("slow")
    async def slow():
        entered.set()
        await asyncio.Event().wait()

    task = asyncio.ensure_future(slow())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (entry,) = await settled(db, 1)
    assert (entry.outcome, entry.detail) == ("failed", {"error": "cancelled"})


async def test_stopping_waits_for_what_is_put_off(database_settings, trail):
    """An entry that nobody awaited is durable when the App has stopped."""
    app = App(
        DatabaseModule.for_root(database_settings), AuditModule.for_root(settings()), AuditModule.for_feature(trail)
    )
    async with app, app.get(Database).transaction():
        await trail.write("put.off", outcome="failed")
    async with app:
        assert "put.off" in [entry.action for entry in await written(app.get(Database))]


async def test_when_the_audit_cannot_be_written_the_mutation_is_not_done(db, trail, monkeypatch):
    """Fail closed: without its entry the function's work rolls back; a failure that cannot be recorded is counted."""
    await db.write(sa.insert(tables.pending), {"entry_id": (taken := uuid4()), "recorded_at": 0, "data": b"x"})
    monkeypatch.setattr("mainstay.audit.trail.uuid7", lambda: taken)
    lost = metric("mainstay_audit_lost_total")

    @trail.record("order.cancelled")
    async def cancel():
        await db.write(sa.insert(tables.pending), {"entry_id": uuid4(), "recorded_at": 0, "data": b"work"})

    with pytest.raises(MainstayError, match=r"(?i)unique"):
        await cancel()
    rows = await db.read(sa.select(tables.pending.c.data))
    assert [bytes(row.data) for row in rows] == [b"x"]
    assert metric("mainstay_audit_lost_total") > lost
    with pytest.raises(MainstayError, match=r"(?i)unique"):
        await trail.write("x", outcome="denied")


class Run:
    """A journal that remembers keys and may run an effect twice, as after a crash."""

    def __init__(self, db):
        self.db = db
        self.names = []

    async def once(self, name, effect, *, transactional, arguments=None):
        self.names.append((name, transactional, arguments()))
        if transactional:
            async with self.db.batch():
                await effect("run-1:audit")
        else:
            await effect("run-1:apart")
            await effect("run-1:apart")
        return "run-1:step"


async def test_in_a_workflow_an_entry_is_a_step(db, trail):
    """It goes through the journal, its id derives from the step's key, and a repeated attempt is one entry."""
    run = Run(db)
    with bind_journal(run):
        await trail.write("a", resource="order/7", detail={"n": 1})
        await trail.write("b", outcome="failed")
    assert run.names == [
        ("audit:a", True, ("order/7", "succeeded", {"n": 1})),
        ("audit:b", False, (None, "failed", None)),
    ]
    entries = await written(db)
    assert [entry.id for entry in entries] == [derived_id("run-1:audit:audit"), derived_id("run-1:apart:audit")]


@pytest.mark.parametrize(
    "detail",
    [
        {"a": 1.5},
        {"a": {"b": float("nan")}},
        {"ключ": 1},
        {1: 1},
        {"a": 2**53},
        {"a": "\ud800"},
        {"a": object()},
        {"a": b"bytes"},
        {"a": "x" * 70_000},
    ],
)
async def test_what_cannot_be_stored_exactly_is_refused(db, trail, detail):
    """The error names the place and the remedy, and nothing is written."""
    with pytest.raises(InvalidEntry):
        await trail.write("x", detail=detail)
    assert await written(db) == []


async def test_an_unknown_outcome_is_refused(trail, db):
    """There are four ways to end."""
    with pytest.raises(InvalidEntry, match="succeeded, failed, denied, unknown"):
        await trail.write("x", outcome="great")


def test_record_refuses_what_it_cannot_keep():
    """Sync functions, generators and unknown parameters are refused at definition, with a sentence."""
    trail = AuditTrail()
    with pytest.raises(TypeError, match="async function"):

        @trail.record("x")
        def sync(): ...

    with pytest.raises(TypeError, match="async function"):

        @trail.record("x")
        async def generator():
            yield

    with pytest.raises(TypeError, match="order_id"):

        @trail.record("x", resource=lambda order_id: order_id)
        async def other(order): ...


async def test_unbound_and_twice_bound(database_settings, trail):
    """Without a running App the remedy is named; a second App is refused; without a database the line is named."""
    with pytest.raises(NotBoundError, match=r"AuditModule.for_feature"):
        await trail.write("x")

    def app():
        return App(
            DatabaseModule.for_root(database_settings),
            AuditModule.for_root(settings()),
            AuditModule.for_feature(trail),
        )

    async with app():
        with pytest.raises(ConfigurationError, match="already running"):
            await app().__aenter__()
    with pytest.raises(ConfigurationError, match=r"DatabaseModule.for_root\(\)"):
        App(AuditModule.for_root(settings()))


async def test_the_sealer_is_a_service(app):
    """Health is told in every process, also where nothing is sealed."""
    assert (await app.get(Sealer).health()).status == "ok"


def test_an_entry_comes_back_from_its_bytes():
    """Round trip; anything but the canonical bytes is refused."""
    entry = Entry(UUID(int=1), "a", "succeeded", "2026-01-01T00:00:00.000000Z", "p", 1, detail={"b": [1, {"c": "é"}]})
    data = entry.to_bytes()
    assert Entry.from_bytes(data) == entry
    for wrong in (
        data + b" ",
        data.replace(b'"v":1', b'"v":2'),
        b"[]",
        b"{}",
        b"\xff",
        data.replace(b"succeeded", b"won"),
    ):
        with pytest.raises(InvalidEntry):
            Entry.from_bytes(wrong)


async def test_the_audit_trail_s_own_action_is_reserved(db, trail):
    """Nobody can make up a producer's statement by accident."""
    with pytest.raises(InvalidEntry, match="own"):
        await trail.write("mainstay.audit.statement")


async def statements(db):
    """How many statements of producers are there."""
    rows = await db.read(sa.select(tables.pending.c.data))
    return sum(Entry.from_bytes(bytes(row.data)).action == "mainstay.audit.statement" for row in rows)


async def test_a_statement_that_could_not_be_written_is_said_later(database_settings, trail, monkeypatch, caplog):
    """Away, then cut off after it had arrived, then there: it is one statement, and it is not lost."""
    app = App(
        DatabaseModule.for_root(database_settings),
        AuditModule.for_root(settings(statement_seconds=0.2)),
        AuditModule.for_feature(trail),
    )
    async with app:
        db, real = app.get(Database), Database.write
        await trail.write("a")
        calls = []

        async def write(self, statement, rows=(), **options):
            calls.append(1)
            if len(calls) == 2:
                await real(self, statement, rows, **options)
            if len(calls) <= 2:
                msg = "away"
                raise DatabaseUnavailable(msg)
            await real(self, statement, rows, **options)

        monkeypatch.setattr(Database, "write", write)
        await eventually(lambda: len(calls) >= 3)
        monkeypatch.undo()
        assert await statements(db) == 1
        assert caplog.text.count("is put off") == 2
        await trail.write("b")
    async with app:
        assert await statements(app.get(Database)) == 2


async def test_the_end_of_stating_is_told(database_settings, trail, monkeypatch, caplog):
    """Should the task that states what was written die of a mistake, log and health say so at once."""
    app = App(
        DatabaseModule.for_root(database_settings), AuditModule.for_root(settings()), AuditModule.for_feature(trail)
    )
    monkeypatch.setattr("mainstay.audit.trail.Intake.state", AsyncMock(side_effect=ValueError))
    async with app:
        await asyncio.sleep(0)
        assert (await app.health())["audit.statements"].status == "down"
        assert "audit.statements stopped" in caplog.text


async def test_a_child_task_of_an_open_unit_can_report_a_failure(db, trail):
    """A task that must not write into its parent's unit still records a failure, and waits for nobody."""
    async with db.transaction():
        async with asyncio.timeout(30):
            await asyncio.get_running_loop().create_task(trail.write("x", outcome="failed"))
    (entry,) = await settled(db, 1)
    assert entry.outcome == "failed"


async def test_recorded_is_the_real_thing_in_memory():
    """Code under test needs no App of its own; two trails are bound, and a rollback leaves only the failure."""
    one, other = AuditTrail(), AuditTrail()

    @one.record("order.cancelled")
    async def cancel():
        await other.write("inner")
        raise ValueError

    async with recorded(one, other) as database:
        await other.write("a")
        with pytest.raises(ValueError):  # noqa: PT011  it is the one above
            await cancel()
        assert [(entry.action, entry.outcome) for entry in await written(database)] == [
            ("a", "succeeded"), ("order.cancelled", "failed"),
        ]  # fmt: skip
        assert [entry.action for entry in await written(database, "a")] == ["a"]
    with pytest.raises(NotBoundError):
        await one.write("b")


class Number(IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    ("wrong", "actor"),
    [
        ({"action": Number.ONE}, None),
        ({"action": None}, None),
        ({"resource": 7}, None),
        ({"resource": ["a"]}, None),
        ({"resource": Number.ONE}, None),
        ({"detail": [1]}, None),
        ({"detail": "text"}, None),
        ({}, 5),
    ],
)
async def test_what_could_not_be_read_again_is_refused(db, trail, wrong, actor):
    """Types that the stored bytes of an entry cannot have are refused before anything is written."""
    with bind(Context(actor=actor)), pytest.raises(InvalidEntry, match="has to be"):
        await trail.write(**{"action": "x", **wrong})
    assert await written(db) == []
    await trail.write("next")
    assert [entry.number for entry in await written(db)] == [1]


anything = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text(max_size=2), max_size=2)
)


@hypothesis_settings(deadline=None)  # a busy machine is no failure
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("action", "time", "resource", "actor", "detail"), anything)))
def test_what_is_written_can_be_read(values):
    """Whatever the attributes are: the bytes are refused, or they are those of an entry that has the same bytes."""
    fields = {
        "id": UUID(int=1),
        "action": "a",
        "outcome": "failed",
        "time": "t",
        "producer": "p",
        "number": 1,
        **values,
    }
    try:
        data = encode({"detail": {}, **fields})
    except InvalidEntry:
        return
    assert Entry.from_bytes(data).to_bytes() == data


def test_bytes_that_no_entry_has_are_refused():
    """What JSON readers take for the same is not: numbers that are true, ids in capitals, empty and unknown members."""
    data = Entry(UUID(int=10), "a", "failed", "t", "p", 1, resource="r").to_bytes()
    for one, other in (
        (b'"number":1', b'"number":true'),
        (b'"v":1', b'"v":true'),
        (b"0000000a", b"0000000A"),
        (b'"resource":"r"', b'"resource":null'),
        (b'"resource":"r"', b'"resource":7'),
        (b'"resource":"r"', b'"resources":"r"'),
        (b'"producer":"p",', b""),
        (b'"resource":"r"', b'"resource":"' + b"r" * 70_000 + b'"'),
    ):
        assert one in data
        with pytest.raises(InvalidEntry):
            Entry.from_bytes(data.replace(one, other))


@pytest.mark.parametrize("resource", ["x" * 70_000, "a\udcff", 7])
async def test_a_denial_is_recorded_whatever_its_resource_is(db, trail, resource):
    """Whoever chooses the resource cannot keep his own denial out of the log: what is left of it is there, marked."""

    @trail.record("file.read", resource=lambda path: path)
    async def read(path):
        raise PermissionError

    with pytest.raises(PermissionError):
        await read(resource)
    (entry,) = await written(db)
    assert (entry.outcome, entry.resource) == ("denied", ascii(resource)[:256])
    assert entry.detail == {"error": "PermissionError", "resource": "cut"}


async def test_a_success_with_such_a_resource_is_not_done(db, trail):
    """It fails closed, and that it failed is recorded."""

    @trail.record("file.written", resource=lambda path: path)
    async def write(path):
        await trail.write("inner")

    with pytest.raises(InvalidEntry):
        await write("a\udcff")
    (entry,) = await written(db)
    assert (entry.action, entry.outcome, entry.resource) == ("file.written", "failed", "'a\\udcff'")


async def test_a_resource_that_cannot_be_told_is_a_failure(db, trail):
    """The function is not run, the caller gets the error, and the log has that somebody tried."""
    ran = []

    @trail.record("order.read", resource=lambda order: order["id"])
    async def read(order):
        ran.append(order)

    with pytest.raises(KeyError):
        await read({})
    (entry,) = await written(db)
    assert (entry.outcome, entry.resource, entry.detail) == ("failed", None, {"error": "KeyError"})
    assert ran == []


class Unspeakable:
    """Has not even a representation."""

    def __repr__(self):
        raise ValueError


@pytest.mark.parametrize(("resource", "recorded_as"), [("a\udcff", "'a\\udcff'"), (Unspeakable(), None)])
async def test_a_cancellation_goes_on_whatever_the_resource_is(db, trail, resource, recorded_as):
    """It is the cancellation that the caller gets; an entry that cannot be written at all is counted."""
    lost = metric("mainstay_audit_lost_total")
    entered = asyncio.Event()

    @trail.record("slow", resource=lambda path: path)
    async def slow(path):
        entered.set()
        await asyncio.Event().wait()

    task = asyncio.ensure_future(slow(resource))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    if recorded_as is None:
        assert metric("mainstay_audit_lost_total") == lost + 1
    else:
        (entry,) = await settled(db, 1)
        assert (entry.resource, entry.detail) == (recorded_as, {"error": "cancelled", "resource": "cut"})


@pytest.mark.parametrize(("fails", "outcomes"), [(False, ["succeeded"]), (True, ["unknown"])])
async def test_cancelled_while_the_commit_is_under_way(database_settings, app, trail, fails, outcomes):
    """What the database committed is no failure; where the commit's end is not known, nothing else is said."""

    @trail.record("order.placed")
    async def place():
        task = asyncio.current_task()
        assert task is not None
        async with app.get(Database).transaction() as session:

            def committing(_session):
                asyncio.get_running_loop().call_soon(task.cancel)
                if fails:
                    raise ValueError

            sa.event.listen(session.sync_session, "before_commit", committing)

    with pytest.raises(asyncio.CancelledError):
        await asyncio.ensure_future(place())
    async with asyncio.timeout(10):
        await app.__aexit__(None, None, None)  # what is written apart is there by then
    async with App(DatabaseModule.for_root(database_settings)) as other:
        entries = await written(other.get(Database))
    assert [entry.outcome for entry in entries] == outcomes


async def test_an_entry_that_is_lost_is_counted_once(db, trail, monkeypatch, caplog):
    """One that cannot be written in a transaction of its own is one line and one count, and hides no error."""
    lost = metric("mainstay_audit_lost_total")

    @trail.record("x")
    async def deny():
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(Database, "write", AsyncMock(side_effect=DatabaseError("away")))
        with pytest.raises(PermissionError):
            await deny()
    assert metric("mainstay_audit_lost_total") == lost + 1
    assert caplog.text.count("could not be written") == 1


async def test_nothing_is_written_after_the_last_word(app, db, trail):
    """A function that outlives its App cannot add to what the App has called final; what it tried is counted."""
    lost = metric("mainstay_audit_lost_total")
    intake = trail.binding.get()  # as a recorded function has it that began before
    await trail.write("a")
    await app.__aexit__(None, None, None)
    with pytest.raises(AuditError, match="has stopped"):
        intake.draft(uuid4(), "b", None, "succeeded", {})
    intake.later("c", None, "failed", {})
    assert metric("mainstay_audit_lost_total") == lost + 1
