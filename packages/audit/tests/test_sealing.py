"""Sealing: batches, two sealers, many writers, a killed sealer, and a log that says when it was changed."""

import asyncio
import logging
import signal
import subprocess
import sys
import textwrap
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from mainstay.audit import AuditModule, AuditTrail, Checkpoint, Entry, Sealer, SigningKey, tables, verify
from mainstay.audit._producer import STATEMENT
from mainstay.audit.merkle import Frontier, leaf_hash
from mainstay.audit.testing import KEY, settings, written
from mainstay.core import App, Clock, bind, spawn, uuid7
from mainstay.core.testing import eventually
from mainstay.database import Database, DatabaseModule, DatabaseSettings, DatabaseUnavailable, upgrade
from mainstay.database.schema import SCHEMA as DATABASE
from mainstay.observability.testing import metric


@asynccontextmanager
async def service(database_settings, *, serve=False, **values):
    """A running App with a trail of its own."""
    trail = AuditTrail()
    app = App(
        DatabaseModule.for_root(database_settings),
        AuditModule.for_root(settings(**values)),
        AuditModule.for_feature(trail),
    )
    async with app.running(serve=serve):
        yield app, trail


async def report(database_settings, **options):
    async with App(DatabaseModule.for_root(database_settings)) as app:
        return await verify(app.get(Database), [KEY.verifier], **options)


async def until(condition, seconds=30):
    """Wait until the awaited condition holds."""
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110  it is other processes' work, and no event tells of it
            await asyncio.sleep(0.01)


async def count_of(db, table):
    return (await db.read(sa.select(sa.func.count()).select_from(table)))[0][0]


async def sealed(db, count):
    """Wait until so many entries are in the log."""

    async def there():
        return await count_of(db, tables.log) >= count

    await until(there)


async def down(app):
    """Wait until the sealer says that it is down."""

    async def said():
        return (await app.get(Sealer).health()).status == "down"

    await until(said)


async def test_what_is_written_is_sealed_and_verified(database_settings):
    """After a drain everything is in the log, nothing is pending, every checkpoint holds and every number is stated."""
    async with service(database_settings, serve=True, batch_size=10) as (app, trail):
        for n in range(25):
            await trail.write("n", detail={"n": n})
        await sealed(app.get(Database), 25)
    found = await report(database_settings)
    assert found.problems == ()
    assert found.ok
    assert (found.entries, found.pending, found.producers) == (25, 1, 1)
    async with service(database_settings, serve=True) as (app, _):
        await sealed(app.get(Database), 26)
    found = await report(database_settings)
    assert (found.ok, found.entries, found.pending, found.statements, found.unstated) == (True, 26, 0, 1, 0)


async def test_an_entry_that_is_sealed_while_it_is_looked_for_is_found_once(database_settings):
    """One that is sealed between two reads of `written` is neither missing nor there twice."""

    class Sealing:
        """A database where a sealer finishes its work after every read."""

        async def read(self, query):
            rows = await db.read(query)
            async with service(database_settings, serve=True) as (other, _):
                await sealed(other.get(Database), 1)
            return rows

    async with service(database_settings) as (app, trail):
        db = app.get(Database)
        await trail.write("a")
        assert [entry.action for entry in await written(Sealing())] == ["a"]  # type: ignore[arg-type]  # it stands in for one
        assert [entry.action for entry in await written(db)] == ["a"]


async def test_the_log_is_the_tree_of_its_exact_bytes(database_settings):
    """The signed root is that of a tree made by hand from the stored bytes, in the order of the leaves."""
    async with service(database_settings, serve=True) as (app, trail):
        db = app.get(Database)
        await asyncio.gather(*(trail.write("n", detail={"n": n}) for n in range(600)))
        await sealed(db, 600)
        tree = Frontier()
        for row in await db.read(sa.select(tables.log.c.data).order_by(tables.log.c.leaf).limit(600)):
            tree.append(leaf_hash(bytes(row.data)))
        notes = await db.read(sa.select(tables.checkpoints.c.note).order_by(tables.checkpoints.c.number))
        checkpoints = [Checkpoint.open(row.note, [KEY.verifier]) for row in notes]
        assert (600, tree.root()) in [(checkpoint.size, checkpoint.root) for checkpoint in checkpoints]
        assert metric("mainstay_audit_log_entries") >= 600


async def test_trap_sixteen_writers_make_no_fork_and_no_gap(database_settings):
    """1,600 entries, some rolled back, two sealers: one line, every commit in it once, and no rollback."""
    kept: set[int] = set()

    async def writer(db, trail, w):
        for n in range(100):
            number = w * 100 + n
            if n % 10 == 3:
                with pytest.raises(ZeroDivisionError):
                    async with db.transaction():
                        await trail.write("n", detail={"n": number})
                        1 / 0  # noqa: B018  any exception
            elif n % 2:
                async with db.transaction():
                    await trail.write("n", detail={"n": number})
                kept.add(number)
            else:
                await trail.write("n", detail={"n": number})
                kept.add(number)

    values = {"batch_size": 50, "lease_seconds": 2.0}
    async with (
        service(database_settings, serve=True, **values) as (app, trail),
        service(database_settings, serve=True, **values),
    ):
        db = app.get(Database)
        await asyncio.gather(*(writer(db, trail, w) for w in range(16)))
        await sealed(db, len(kept))
    async with service(database_settings, serve=True) as (app, _):
        await sealed(app.get(Database), len(kept) + 1)
        entries = await written(app.get(Database), "n")
    assert sorted(entry.detail["n"] for entry in entries) == sorted(kept)
    found = await report(database_settings)
    assert found.problems == ()
    assert (found.pending, found.unstated) == (0, 0)


async def test_trap_a_row_that_commits_late_is_sealed(postgres):
    """An entry whose transaction was open while later ones were sealed is not passed over.

    On SQLite, which has one writer at a time, nothing can commit late.
    """
    await upgrade(postgres, [DATABASE, tables.SCHEMA])
    database_settings = DatabaseSettings(url=postgres)
    async with service(database_settings, serve=True) as (app, trail):
        db = app.get(Database)
        async with db.transaction():
            await trail.write("late")
            for n in range(5):
                await spawn(trail.write("n", detail={"n": n}), name="apart from this unit of work")
            await sealed(db, 5)
        await sealed(db, 6)
        assert [entry.action for entry in await written(db)][-1] == "late"
    assert (await report(database_settings)).ok


async def test_an_idle_log_still_signs(database_settings):
    """Silence is noticed: with nothing to seal, checkpoints of the same size keep coming."""
    async with service(database_settings, serve=True, idle_checkpoint_seconds=0.05) as (app, trail):
        db = app.get(Database)
        await trail.write("only")
        await sealed(db, 1)

        async def three():
            return await count_of(db, tables.checkpoints) >= 3

        await until(three)
        rows = await db.read(sa.select(tables.checkpoints.c.size))
    assert {row.size for row in rows} == {1}
    found = await report(database_settings)
    assert found.ok
    assert found.checkpoints >= 3


KILLED = """
    import asyncio, os, sys
    from mainstay.core import App
    from mainstay.database import DatabaseModule, DatabaseSettings, Database
    from mainstay.audit import AuditModule, AuditTrail
    from mainstay.audit.testing import settings

    async def main():
        trail = AuditTrail()
        app = App(
            DatabaseModule.for_root(DatabaseSettings(url=sys.argv[1])),
            AuditModule.for_root(settings(batch_size=7, lease_seconds=1.0, poll_seconds=0.001, statement_seconds=0.05)),
            AuditModule.for_feature(trail),
        )
        async with app.running(serve=True):
            async def writer(w):
                for n in range(10**6):
                    await trail.write("n", detail={"w": w, "n": n})
                    os.write(1, b"%d %d\\n" % (w, n))
            await asyncio.gather(*(writer(w) for w in range(4)))

    asyncio.run(main())
"""


async def _stated(database_settings):
    """Whether a statement of a producer has been sealed."""
    async with App(DatabaseModule.for_root(database_settings)) as app:
        rows = await app.get(Database).read(sa.select(tables.log.c.data))
        return any(Entry.from_bytes(bytes(row.data)).action == STATEMENT for row in rows)


async def test_a_killed_sealer_leaves_no_half_batch(database_settings, url):
    """SIGKILL in the middle, several times: every acknowledged entry is there once, and the log goes on."""
    acknowledged: set[tuple[int, int, int]] = set()
    for life in range(3):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", textwrap.dedent(KILLED), url, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        async with asyncio.timeout(60):
            while len([one for one in acknowledged if one[0] == life]) < 150:
                line = await child.stdout.readline()
                assert line, "the child ended by itself"
                w, n = line.split()
                acknowledged.add((life, int(w), int(n)))
        if life == 0:  # one of them lives for long enough to say what it wrote
            reading = spawn(child.stdout.read(), name="what the child prints meanwhile")
            await eventually(lambda: _stated(database_settings), every_seconds=0.2)
            reading.cancel()
        child.send_signal(signal.SIGKILL)
        await child.wait()
    async with service(database_settings, serve=True) as (app, _):
        db = app.get(Database)

        async def nothing_pending():
            return await count_of(db, tables.pending) == 0

        await until(nothing_pending)
        entries = await written(db, "n")
    written_by: dict[str, set[tuple[int, int]]] = {}
    for entry in entries:
        pair = (entry.detail["w"], entry.detail["n"])
        assert pair not in written_by.setdefault(entry.producer, set())
        written_by[entry.producer].add(pair)
    for life in range(3):
        told = {(w, n) for one, w, n in acknowledged if one == life}
        assert any(told <= pairs for pairs in written_by.values())
    found = await report(database_settings)
    assert found.problems == ()
    assert found.producers == 3
    assert found.statements > 0


async def test_a_sealer_that_lost_its_lease_writes_nothing(database_settings, caplog):
    """Fenced: when somebody else has taken over, the old sealer's batch is refused, and it starts anew."""
    async with service(database_settings, serve=True, lease_seconds=600.0) as (app, trail):
        db = app.get(Database)
        await trail.write("first")
        await sealed(db, 1)
        leases = sa.table("mainstay_database_leases", sa.column("name"), sa.column("epoch"), sa.column("expires_at"))
        await db.write(
            sa.update(leases).where(leases.c.name == "mainstay.audit.sealer").values(epoch=leases.c.epoch + 1)
        )
        await trail.write("second")

        async def refused():
            return "sealing is interrupted" in caplog.text

        await until(refused)
        assert await count_of(db, tables.log) == 1
        await db.write(sa.update(leases).values(expires_at=0))
        await sealed(db, 2)
    assert (await report(database_settings)).problems == ()


async def test_a_sealer_does_not_continue_a_log_that_was_changed(database_settings, caplog):
    """It signs nothing more, is down, says so once, and entries keep arriving unsealed."""
    async with service(database_settings, serve=True) as (app, trail):
        await trail.write("a")
        await trail.write("b")
        await sealed(app.get(Database), 2)
    with caplog.at_level(logging.CRITICAL):
        async with service(database_settings) as (app, _):
            await app.get(Database).write(sa.update(tables.log).where(tables.log.c.leaf == 0).values(data=b"other"))
        async with service(database_settings, serve=True) as (app, trail):
            db = app.get(Database)
            await down(app)
            checkpoints = await db.read(sa.select(tables.checkpoints.c.number))
            await trail.write("c")
            await asyncio.sleep(0)
            assert len(await db.read(sa.select(tables.checkpoints.c.number))) == len(checkpoints)
            assert len(await db.read(sa.select(tables.log.c.leaf))) == 2
    assert caplog.text.count("tampered with") == 1


@pytest.mark.parametrize(
    "damage",
    [
        sa.delete(tables.checkpoints),
        sa.update(tables.checkpoints).values(note="x\n\n— y z\n"),
        sa.delete(tables.log).where(tables.log.c.leaf == 0),
        sa.insert(tables.log).values(leaf=99, entry_id=uuid7(), data=b"{}"),
    ],
    ids=["no checkpoint", "forged checkpoint", "deleted", "added"],
)
async def test_a_sealer_refuses_every_damage_that_it_can_see(database_settings, damage):
    """A log without its checkpoint, with a forged one, with entries gone or added is not continued."""
    async with service(database_settings, serve=True) as (app, trail):
        await trail.write("a")
        await sealed(app.get(Database), 1)
    async with service(database_settings) as (app, _):
        await app.get(Database).write(damage)
    async with service(database_settings, serve=True) as (app, _):
        await down(app)


async def test_lag_is_degraded(database_settings):
    """Nobody seals: after the limit the health says so, with a question that helps."""
    async with service(database_settings, lag_seconds=0.001) as (app, trail):
        sealer = app.get(Sealer)
        assert (await sealer.health()).status == "ok"
        await trail.write("a")

        async def late():
            return (await sealer.health()).status != "ok"

        await until(late)
        health = await sealer.health()
        assert health.status == "degraded"
        assert "is a sealer running?" in health.detail
        assert metric("mainstay_audit_lag_seconds") > 0
        assert metric("mainstay_audit_lag_asked_timestamp_seconds") > 0


class _Ahead(Clock):
    """The system's clock, but for the wall clock, which a test puts ahead."""

    ahead = timedelta()

    def now(self):
        return super().now() + self.ahead


async def test_the_lag_is_known_without_anybody_who_asks(database_settings):
    """The process looks by itself, and what it found goes on growing at each scrape, also without another look."""
    clock, trail = _Ahead(), AuditTrail()
    app = App(
        DatabaseModule.for_root(database_settings),
        AuditModule.for_root(settings(lag_seconds=0.04)),
        AuditModule.for_feature(trail),
        clock=clock,
    )
    async with app:
        await trail.write("a")

        async def seen():
            return metric("mainstay_audit_lag_seconds") > 0

        await until(seen)
        (look,) = [task for task in asyncio.all_tasks() if task.get_name() == "audit.lag"]
        look.cancel()
        await asyncio.wait([look])
        asked = metric("mainstay_audit_lag_asked_timestamp_seconds")
        clock.ahead = timedelta(hours=1)
        assert metric("mainstay_audit_lag_seconds") > 3600
        assert metric("mainstay_audit_lag_asked_timestamp_seconds") == asked


async def test_an_interrupted_sealer_goes_on(database_settings, monkeypatch, caplog):
    """The database away for a moment is a warning and a new start, not the end of sealing."""
    real = Database.read
    failures = iter([DatabaseUnavailable("away"), DatabaseUnavailable("away")])

    async def read(self, statement, parameters=None):
        if "mainstay_audit_pending" in str(statement) and "count" in (parameters or {}):
            error = next(failures, None)
            if error is not None:
                raise error
        return await real(self, statement, parameters)

    monkeypatch.setattr(Database, "read", read)
    with caplog.at_level(logging.WARNING):
        async with service(database_settings, serve=True) as (app, trail):
            await trail.write("a")
            await sealed(app.get(Database), 1)
    assert "sealing is interrupted" in caplog.text


async def test_a_process_without_the_signing_key_does_not_seal(database_settings):
    """A web service has a producer's key only: it writes and states, and leaves sealing to others."""
    mine = SigningKey.generate("web")
    values = {"signing_key": None, "producer_key": SecretStr(mine.private_text())}
    async with service(database_settings, serve=True, **values) as (app, trail):
        with bind(actor="ann"):
            await trail.write("a")
        assert await app.get(Database).read(sa.select(tables.log.c.leaf)) == []
    async with service(database_settings, serve=True) as (app, _):
        await sealed(app.get(Database), 2)
    assert (await report(database_settings, producers=[mine.verifier.text])).ok
    strict = await report(database_settings)
    assert [problem.kind for problem in strict.problems] == ["forged"]


async def test_a_sealer_refuses_rows_where_the_next_ones_belong(database_settings, caplog):
    """A node or a checkpoint that lies in wait is tampering, found when the log is opened or with the next batch."""
    rows = [
        sa.insert(tables.nodes).values(level=8, position=0, hash=b"0" * 32),
        sa.insert(tables.checkpoints).values(number=2**63 - 1, size=0, note="x\n0\n\n— y z\n"),
    ]
    for row in rows:
        async with service(database_settings) as (app, _):
            await app.get(Database).write(row)
        async with service(database_settings, serve=True) as (app, _):
            await down(app)
            await app.get(Database).write(sa.delete(row.table))
    async with service(database_settings, serve=True) as (app, trail):
        db = app.get(Database)
        await trail.write("a")
        await sealed(db, 1)
        rows = await db.read(sa.select(tables.checkpoints.c.number, tables.checkpoints.c.note))
        await db.write(sa.insert(tables.checkpoints).values(number=rows[-1].number + 1, size=1, note=rows[-1].note))
        caplog.clear()
        await trail.write("b")

        async def said():
            return "somebody else's rows" in caplog.text

        await until(said)


async def test_every_process_is_well_again_after_a_repair(database_settings):
    """Two sealers are down because the log was changed; restored, both are up and not only the one that seals."""
    values = {"lease_seconds": 1.0}
    async with service(database_settings, serve=True) as (app, trail):
        await trail.write("a")
        await sealed(app.get(Database), 1)
        data = (await app.get(Database).read(sa.select(tables.log.c.data)))[0].data
    async with service(database_settings) as (app, _):
        await app.get(Database).write(sa.update(tables.log).values(data=b"other"))
    async with (
        service(database_settings, serve=True, **values) as (one, _),
        service(database_settings, serve=True, **values) as (other, _),
    ):
        await down(one)
        await down(other)
        await one.get(Database).write(sa.update(tables.log).values(data=data))

        async def well():
            return [(await app.get(Sealer).health()).status for app in (one, other)] == ["ok", "ok"]

        await until(well)


async def test_what_is_no_entry_is_put_aside(database_settings, caplog):
    """Garbage among the pending entries is not sealed, which would spoil the log for ever; it is kept and told of."""
    refused = metric("mainstay_audit_refused_total")
    async with service(database_settings, serve=True) as (app, trail):
        db = app.get(Database)
        await trail.write("a")
        other = (await written(db))[0].to_bytes()
        for data in (b"not even JSON", b"{}", other):  # the last one under another id
            await db.write(tables.INSERT_PENDING, {"entry_id": uuid7(), "recorded_at": 0, "data": data})
        await trail.write("b")
        await sealed(db, 2)

        async def told():
            return (await app.get(Sealer).health()).status == "degraded"

        await until(told)
        assert "mainstay_audit_refused" in (await app.get(Sealer).health()).detail
        rows = await db.read(sa.select(tables.refused.c.data).order_by(tables.refused.c.id))
        assert [bytes(row.data) for row in rows] == [b"not even JSON", b"{}", other]
        await db.write(sa.delete(tables.refused))
        assert (await app.get(Sealer).health()).status == "ok"
    assert metric("mainstay_audit_refused_total") == refused + 3
    assert "were moved to mainstay_audit_refused" in caplog.text
    found = await report(database_settings)
    assert found.problems == ()


async def test_a_clock_that_is_ahead_does_not_mute_the_alarm(database_settings):
    """The oldest entry counts, not the one that was inserted first with a moment of next year."""
    async with service(database_settings, lag_seconds=0.001) as (app, trail):
        await trail.write("first")
        db, sealer = app.get(Database), app.get(Sealer)
        await db.write(sa.update(tables.pending).values(recorded_at=tables.pending.c.recorded_at + 10**13))
        assert (await sealer.health()).status == "ok"
        await trail.write("second")

        async def late():
            return (await sealer.health()).status == "degraded"

        await until(late)


class SetBack(Clock):
    """Each moment is an hour before the last one."""

    def __init__(self):
        self.moment = datetime(2026, 1, 1, tzinfo=UTC)

    def now(self):
        self.moment -= timedelta(hours=1)
        return self.moment


async def test_trap_05_nothing_is_ordered_by_a_clock(database_settings):
    """The clock runs backwards from entry to entry: they are sealed in the order of their writing, and verify."""
    trail = AuditTrail()
    app = App(
        DatabaseModule.for_root(database_settings),
        AuditModule.for_root(settings(batch_size=3)),
        AuditModule.for_feature(trail),
        clock=SetBack(),
    )
    async with app:
        for n in range(10):
            await trail.write("n", detail={"n": n})
    async with service(database_settings, serve=True) as (app, _):
        await sealed(app.get(Database), 11)
        entries = await written(app.get(Database), "n")
    assert [entry.detail["n"] for entry in entries] == list(range(10))
    assert sorted(entries, key=lambda entry: entry.time) == entries[::-1]
    assert (await report(database_settings)).problems == ()
