"""What lies between commit and seal is a row like any other: everything that can be done to it, and what is seen."""

import asyncio
from dataclasses import replace
from uuid import uuid4

import pytest
import sqlalchemy as sa

from mainstay.audit import AuditModule, AuditTrail, Entry, tables, verify
from mainstay.audit._producer import STATEMENT
from mainstay.audit.testing import KEY, settings, written
from mainstay.core import App, bind
from mainstay.database import CommitUnknown, Database, DatabaseModule, DatabaseSettings, upgrade
from mainstay.database.schema import SCHEMA as DATABASE

ENTRIES = 6


def service(database_settings, trail=None):
    return App(
        DatabaseModule.for_root(database_settings),
        AuditModule.for_root(settings()),
        AuditModule.for_feature(trail or AuditTrail()),
    )


async def sealed(database_settings):
    """Seal what is pending, as another process does, and verify it."""
    app = service(database_settings)
    async with app.running(serve=True), asyncio.timeout(20):
        while await app.get(Database).read(sa.select(tables.pending.c.seq).limit(1)):  # noqa: ASYNC110  another task
            await asyncio.sleep(0.01)
    async with App(DatabaseModule.for_root(database_settings)) as app:
        return await verify(app.get(Database), [KEY.verifier])


async def tampered(database_settings, tamper):
    """Entries of a process that stopped, changed before another one seals them: what the verifier says."""
    trail = AuditTrail()
    async with service(database_settings, trail) as app:
        with bind(actor="mallory"):
            for n in range(ENTRIES - 1):
                await trail.write("money.moved", resource=f"account/{n}", detail={"amount": 1000})
            with pytest.raises(ZeroDivisionError):
                async with app.get(Database).transaction():
                    await trail.write("money.moved", resource="rolled back")
                    _ = 1 / 0
            await trail.write("money.moved", resource="account/last", detail={"amount": 1000})
    async with App(DatabaseModule.for_root(database_settings)) as app:
        await tamper(app.get(Database))
    return await sealed(database_settings)


async def pending(db):
    rows = await db.read(sa.select(tables.pending.c.seq, tables.pending.c.data).order_by(tables.pending.c.seq))
    return [(row.seq, Entry.from_bytes(bytes(row.data))) for row in rows]


async def put(db, seq, entry):
    """Write another entry in the place of one."""
    statement = sa.update(tables.pending).where(tables.pending.c.seq == seq)
    await db.write(statement.values(data=entry.to_bytes(), entry_id=entry.id))


async def add(db, **changes):
    """Write one more entry, which nobody has written."""
    _, entry = (await pending(db))[0]
    entry = replace(entry, id=uuid4(), actor="ceo", resource="account/forged", **changes)
    await db.write(tables.INSERT_PENDING, {"entry_id": entry.id, "recorded_at": 0, "data": entry.to_bytes()})


async def nothing(_db):
    pass


async def change(db):
    seq, entry = (await pending(db))[2]
    await put(db, seq, replace(entry, actor="innocent", detail={"amount": 1}))


async def swap(db):
    (one, first), (two, second) = (await pending(db))[1:3]
    aside = replace(first, id=uuid4())
    await put(db, one, aside)
    await put(db, two, replace(first, id=second.id, number=second.number))
    await put(db, one, replace(second, id=first.id, number=first.number))


async def delete(db):
    await db.write(sa.delete(tables.pending).where(tables.pending.c.seq == (await pending(db))[3][0]))


async def delete_the_end(db):
    for seq, _ in (await pending(db))[3:]:
        await db.write(sa.delete(tables.pending).where(tables.pending.c.seq == seq))


async def speak_for_another(db):
    seq, entry = (await pending(db))[-1]
    assert entry.action == STATEMENT
    await put(db, seq, replace(entry, producer="another"))


async def say_more(db):
    seq, entry = (await pending(db))[-1]
    await put(db, seq, replace(entry, actor="ceo"))


@pytest.mark.parametrize(
    ("tamper", "kinds"),
    [
        (nothing, set()),
        (change, {"changed"}),
        (swap, {"changed"}),
        (delete, {"unsealed"}),
        (lambda db: add(db, number=0), {"forged"}),
        (lambda db: add(db, number=-1), {"forged"}),
        (lambda db: add(db, number=ENTRIES), {"forged"}),  # where one was rolled back
        (lambda db: add(db, number=99), {"forged"}),
        (lambda db: add(db, number=0, action=STATEMENT), {"forged"}),
        (speak_for_another, {"forged"}),
        (say_more, {"forged"}),
    ],
    ids=[
        *("nothing", "change", "swap", "delete", "no number", "negative number", "number of a rollback"),
        *("number beyond the last", "no statement", "statement of another", "more than a statement"),
    ],
)
async def test_trap_04_what_is_done_before_the_seal_is_seen(database_settings, tamper, kinds):
    """A change, a swap, a deletion and an addition each make the log not intact, although its tree is perfect."""
    report = await tampered(database_settings, tamper)
    assert {problem.kind for problem in report.problems} == kinds
    if not kinds:
        assert (report.unfinished, report.unstated, report.entries) == (0, 0, ENTRIES + 1)


async def test_trap_04_a_final_statement_deleted_with_entries_is_missed(database_settings):
    """No number is known to be missing then; that the producer has not said its last word is counted."""
    report = await tampered(database_settings, delete_the_end)
    assert report.ok
    assert (report.entries, report.producers, report.unfinished, report.unstated) == (3, 1, 1, 3)


async def test_trap_04_a_savepoint_that_was_rolled_back_is_no_deletion(database_settings):
    """The entry is gone with its savepoint, and no statement claims it: the log stays intact."""
    trail = AuditTrail()

    @trail.record("order.placed")
    async def place():
        return 1

    async with service(database_settings, trail) as app:
        db = app.get(Database)
        async with db.transaction() as session:
            await trail.write("outer")
            with pytest.raises(ZeroDivisionError):
                async with session.begin_nested():
                    _ = await place() / 0
        assert [entry.action for entry in await written(db)] == ["outer"]
    report = await sealed(database_settings)
    assert report.problems == ()
    assert report.unstated == 0


async def test_an_entry_whose_commit_nobody_heard_of_is_no_addition(database_settings, monkeypatch):
    """The connection broke after the commit: the number is missing in the final statement, and its bytes are known."""
    trail = AuditTrail()
    real = Database.write

    async def cut_off(self, *arguments, **options):
        await real(self, *arguments, **options)
        msg = "the connection was lost while committing"
        raise CommitUnknown(msg)

    async with service(database_settings, trail):
        await trail.write("a")
        with monkeypatch.context() as patch:
            patch.setattr(Database, "write", cut_off)
            with pytest.raises(CommitUnknown):
                await trail.write("b")
    report = await sealed(database_settings)
    assert report.problems == ()
    assert (report.entries, report.unstated) == (3, 1)


async def test_trap_02_an_audited_transaction_needs_no_second_connection_of_the_pool(postgres):
    """With a pool of one, entries of a success, a denial and a failure inside a transaction deadlock with nobody."""
    await upgrade(postgres, [DATABASE, tables.SCHEMA])
    database_settings = DatabaseSettings(url=postgres, pool_size=1, pool_timeout_seconds=5)
    trail = AuditTrail()

    @trail.record("order.placed")
    async def place(fails):
        await trail.write("order.looked.at", outcome="denied")
        if fails:
            raise ValueError

    async with service(database_settings, trail) as app:
        db = app.get(Database)
        async with db.transaction():
            await trail.write("outer")
            await place(fails=False)
        with pytest.raises(ValueError):  # noqa: PT011  it is the one above
            async with db.transaction():
                await place(fails=True)
        actions = sorted((entry.action, entry.outcome) for entry in await written(db))
    assert actions == [
        ("order.looked.at", "denied"),
        ("order.looked.at", "denied"),
        ("order.placed", "failed"),
        ("order.placed", "succeeded"),
        ("outer", "succeeded"),
    ]
