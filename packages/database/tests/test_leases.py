"""Leases: one holder, by the database's clock, also where the holder is lost."""

import asyncio
import contextlib
import time

import asyncpg
import pytest
import sqlalchemy as sa
from prometheus_client import REGISTRY

from mainstay.core.testing import VirtualClock
from mainstay.database import DatabaseUnavailable, FenceLost, UnitOfWorkError
from mainstay.database.testing import database, expire_lease

LEASES = sa.table("mainstay_database_leases", sa.column("name"), sa.column("epoch"), sa.column("expires_at"))


@pytest.fixture
def lease_clock(monkeypatch):
    """The clock that leases of Databases opened from now on are measured by, on both sides."""
    clock = VirtualClock()
    monkeypatch.setattr("mainstay.database.module.LEASE_CLOCK", clock)
    return clock


async def test_one_holder_at_a_time(db, tables, count):
    """A lease that is held cannot be had; released, it can be had at once, with the next epoch; the old fence fails."""
    lease = await db.lease("one")
    assert (lease.held, lease.epoch) == (True, 1)
    assert await db.lease("one") is None
    await db.write(tables.add, {"id": 1, "text": "x"}, fence=lease.fence)
    await lease.release()
    assert not lease.held
    again = await db.lease("one")
    assert again.epoch == 2
    with pytest.raises(FenceLost):
        await db.write(tables.add, {"id": 2, "text": "x"}, fence=lease.fence)
    await lease.release()  # a second time, and it has another owner by now
    await db.write(tables.add, {"id": 3, "text": "x"}, fence=again.fence)
    assert again.held
    assert await count(db) == 2


async def test_of_many_who_ask_at_once_one_gets_it(url, open_database):
    """Thirty requests from two Databases lead to one lease."""
    async with contextlib.AsyncExitStack() as stack:
        databases = [await stack.enter_async_context(open_database(url))]
        if ":memory:" not in url:  # which cannot be opened twice
            databases.append(await stack.enter_async_context(database(url)))
        answers = await asyncio.gather(*(db.lease("busy") for db in databases for _ in range(15)))
        assert sum(answer is not None for answer in answers) == 1


async def test_workflow_7_blocking_code_does_not_lose_a_lease(db):
    """The event loop is blocked for three times the lease; it is held afterwards, and no other owner got it."""
    lease = await db.lease("blocked", seconds=0.5)
    time.sleep(1.5)  # noqa: ASYNC251  that is what is tested
    assert lease.held
    assert await db.lease("blocked") is None
    assert lease.epoch == 1


async def test_workflow_7_leases_are_renewed_together(postgres, open_database):
    """Forty leases take a few statements a renewal, not forty."""
    commits = sa.text("SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()")
    async with open_database(postgres) as db:
        leases = [await db.lease(f"lease {i}", seconds=1.0) for i in range(40)]
        await asyncio.sleep(1.5)  # the server counts a second late
        (before,) = await db.read(commits)
        await asyncio.sleep(2.2)
        (after,) = await db.read(commits)
        assert all(lease.held for lease in leases)
        assert after[0] - before[0] < 150  # one by one it would be more than 350


async def test_the_holder_stops_before_the_database_does(url, open_database, lease_clock):
    """By its own clock the holder's time is up while the lease still stands for others."""
    async with open_database(url) as db:
        lease = await db.lease("margin", seconds=1000.0)
        lease_clock.tick(799)
        assert lease.held
        lease_clock.tick(2)
        assert not lease.held
        assert await db.lease("margin") is None
        lease_clock.tick(200)
        other = await db.lease("margin")
        assert other.epoch == 2


async def test_workflow_6_an_expired_lease_that_was_renewed_is_not_stolen(url, open_database, until, lease_clock):
    """A late holder keeps the lease if it was not taken, with the same epoch; else it is lost for good."""
    async with open_database(url) as db:
        late = await db.lease("late", seconds=1.0)
        taken = await db.lease("taken", seconds=1.0)
        lost = REGISTRY.get_sample_value("mainstay_database_leases_lost_total") or 0.0
        async with db.transaction() as session:
            await session.execute(sa.text("UPDATE mainstay_database_leases SET epoch = 7 WHERE name = 'taken'"))
        lease_clock.tick(100)
        assert not late.held
        await until(lambda: late.held)
        assert late.epoch == 1
        await until(lambda: REGISTRY.get_sample_value("mainstay_database_leases_lost_total") == lost + 1)
        assert not taken.held


async def test_a_fenced_unit_costs_the_other_leases_nothing(postgres, open_database, tables, until):
    """A long unit fenced with one lease holds its row; the process's other leases are renewed, and it is not taken."""
    async with open_database(postgres) as db:
        fenced, other = await db.lease("fenced", seconds=1.0), await db.lease("other", seconds=1.0)
        async with db.transaction():
            await db.write(tables.add, {"id": 1, "text": "x"}, fence=fenced.fence)
            await asyncio.sleep(1.6)
            assert other.held
            assert not fenced.held
        await until(lambda: fenced.held)
        assert fenced.epoch == 1


async def test_waiting_for_a_lease_costs_neither_party_anything(postgres, open_database, tables):
    """Who polls for a lease whose holder is in a long fenced unit is answered at once, and keeps his own leases."""
    async with open_database(postgres) as holder, database(postgres) as waiting:
        work = await holder.lease("work", seconds=3.0)
        mine = await waiting.lease("mine", seconds=3.0)
        assert work is not None
        assert mine is not None
        async with holder.transaction():
            await holder.write(tables.add, {"id": 1, "text": "x"}, fence=work.fence)
            # Beyond the lease: it expires, and cannot be taken while the unit is open. An answer that waited for the
            # unit would never come, since the unit ends after it.
            end = time.monotonic() + 4.5
            while time.monotonic() < end:
                assert await waiting.lease("work", seconds=3.0) is None
                assert mine.held
                await asyncio.sleep(0.02)


async def test_a_holder_that_froze_between_two_messages_of_a_statement_is_ended(postgres, open_database, tables, until):
    """Its fenced unit does not count as idle, so that no timeout of the server ends it: who asks for the lease does."""
    state = "SELECT state || wait_event FROM pg_stat_activity WHERE pid = "
    async with open_database(postgres, idle_transaction_seconds=1.0) as db:
        await expire_lease(db, await db.lease("work", seconds=1000.0))
        frozen = await asyncpg.connect(postgres.replace("+asyncpg", ""))
        busy = await asyncpg.connect(postgres.replace("+asyncpg", ""))
        try:
            for holder in (frozen, busy):
                await holder.execute("BEGIN")
                await holder.execute("SELECT * FROM mainstay_database_leases WHERE name = 'work' FOR SHARE")
            await frozen.prepare("SELECT 1")  # and the message to run it does not come
            working = asyncio.ensure_future(busy.execute("SELECT pg_sleep(2.5); COMMIT"))
            assert await db.read(sa.text(f"{state}{frozen.get_server_pid()}")) == [("activeClientRead",)]
            taken = []

            async def take():
                taken.append(await db.lease("work", seconds=1000.0))
                return taken[-1] is not None

            await until(take, seconds=60)
            assert taken[-1].epoch == 2
            await working  # what only takes long was waited for
            assert await db.read(sa.text(f"{state}{frozen.get_server_pid()}")) == []
        finally:
            frozen.terminate()
            busy.terminate()


async def test_a_process_that_was_late_may_take_its_own_lease_again(url, open_database, lease_clock):
    """Expired and taken again by the same process, the lease has a new epoch, and the old one is lost for good."""
    async with open_database(url) as db:
        old = await db.lease("again", seconds=1000.0)
        lease_clock.tick(2000)
        new = await db.lease("again", seconds=1000.0)
        assert (old.held, new.held, new.epoch) == (False, True, 2)
        await old.release()
        assert new.held
        assert await db.lease("again") is None


async def test_misuse_is_refused(db):
    """Inside a unit of work, for no time at all, or by a name that does not fit, no lease is taken."""
    async with db.transaction():
        with pytest.raises(UnitOfWorkError, match="take it before"):
            await db.lease("x")
    for seconds in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="more than 0"):
            await db.lease("x", seconds=seconds)
    for name in ("", "x" * 256):
        with pytest.raises(ValueError, match="1 to 255"):
            await db.lease(name)
    assert await db.lease("x" * 255) is not None


async def test_closing_releases_every_lease(tmp_path, open_database):
    """The next owner need not wait for the leases of a process that ended in order, and it can take no more."""
    url = f"sqlite:///{tmp_path / 'x.db'}"
    async with open_database(url) as db:
        lease = await db.lease("one", seconds=60)
    assert not lease.held
    await lease.release()
    with pytest.raises(DatabaseUnavailable):
        await db.lease("two")
    async with database(url) as db:
        again = await db.lease("one")
        assert again is not None
        assert again.epoch == 2


async def test_a_cancelled_request_leaves_no_lease_behind(db, until):
    """What was taken for a caller who went away is given back, so that it can be had soon."""
    for i in range(5):
        task = asyncio.create_task(db.lease("orphan", seconds=60))
        for _ in range(i * 2 + 1):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            lease = await task
            if lease is not None:  # the one before it may still be on its way back
                await lease.release()

    async def free() -> bool:
        lease = await db.lease("orphan", seconds=60)
        if lease is not None:
            await lease.release()
        return lease is not None

    await until(free)
