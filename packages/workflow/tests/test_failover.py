"""PostgreSQL that only reads for a while, or fails over, under running sagas: no step fails, and no run is parked."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa

from mainstay.core import Retry
from mainstay.core.testing import eventually
from mainstay.database import Database
from mainstay.workflow import Done, RunStatus, Unknown, WorkflowRouter, current_step
from mainstay.workflow.testing import workflows
from mainstay_servers import Postgres, fresh_database
from mainstay_servers.failover import Pair
from mainstay_servers.postgres import execute_at

WAIT = 90.0
RUNS = 60
ONCE = Retry(attempts=1)


class Shop:
    """Sagas with writes of every kind; each step has one attempt only, so that one that the database spends shows."""

    def __init__(self) -> None:
        self.executed: Counter[str] = Counter()
        self.database: Database | None = None
        self.ledger = sa.Table("shop_ledger", sa.MetaData(), sa.Column("key", sa.String(200), primary_key=True))
        self.flows = flows = WorkflowRouter()
        told = flows.signal("told", int)

        async def mark() -> None:
            self.executed[current_step().key] += 1
            await asyncio.sleep(0.001)

        @flows.step(retry=ONCE)
        async def charge(n: int) -> int:
            await mark()
            return n

        @charge.compensation
        async def refund(outcome: Done[int] | Unknown, n: int) -> None:
            assert isinstance(outcome, Done), "the database failed a step"
            await mark()

        @flows.step(transactional=True, harmless=True, retry=ONCE)
        async def book(n: int) -> int:
            assert self.database is not None
            await self.database.write(sa.insert(self.ledger), {"key": current_step().key})
            return n

        @flows.step(harmless=True, retry=ONCE, failed_on=(LookupError,))
        async def ship(n: int) -> int:
            await mark()
            if n % 4 == 0:
                raise LookupError(n)
            return n

        @flows.workflow(name="notify")
        async def notify(n: int) -> int:
            return await charge(n)

        @flows.workflow(name="sell")
        async def sell(n: int) -> int:
            for _ in range(3):
                await flows.gather(charge(n), charge(n))
                await book(n)
            await flows.sleep(0.02)
            if n % 3 == 0:
                await notify(n)
            if n % 5 == 0:
                await told.send(f"r{n}", n)
                await told.wait()
            return await ship(n)

        self.sell = sell


@asynccontextmanager
async def selling(url: str) -> AsyncGenerator[Shop]:
    """A worker in the middle of its sagas; behind the block they end as their definition says."""
    shop = Shop()
    async with workflows(shop.flows, url=url, lease_seconds=2.0, max_executing=20) as app:
        shop.database = app.get(Database)
        async with app.get(Database).engine.begin() as connection:
            await connection.run_sync(shop.ledger.metadata.create_all)
        runs = [await shop.sell.start(n, id=f"r{n}") for n in range(RUNS)]
        await eventually(lambda: len(shop.executed) > RUNS, seconds=WAIT)
        yield shop
        for n, run in enumerate(runs):
            await eventually(lambda run=run: ended(run), seconds=WAIT)
            assert await run.status() is (RunStatus.COMPLETED if n % 4 else RunStatus.FAILED)
        rows = await app.get(Database).read(sa.select(shop.ledger.c.key))
        assert {row.key for row in rows} == {f"r{n}:book:{turn}" for n in range(RUNS) for turn in (1, 2, 3)}
    assert {key: times for key, times in shop.executed.items() if times > 1} == {}
    undone = {key.removesuffix(":compensation") for key in shop.executed if key.endswith(":compensation")}
    charged = {key for key in shop.executed if key.endswith("charge:1") and key not in undone}
    assert {key for key in undone if key.startswith("r")} == {
        f"r{n}:{turn}.{branch}/charge:1" for n in range(0, RUNS, 4) for turn in range(3) for branch in range(2)
    }
    assert len(charged) == 45 * 6 + 15, "those of the sagas that completed, and of their children"


async def ended(run: Any) -> bool:
    """Whether the run has ended."""
    status: RunStatus = await run.status()
    assert not status.waits_for_a_person
    return status.terminal


async def admin(url: str, query: str) -> Any:
    """What a connection of one's own sees; it makes no promise to write, as the workers' connections do."""
    connection = await asyncpg.connect(url.replace("postgresql+asyncpg", "postgresql"))
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def refused_meanwhile(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Writes of runs are refused and repeated, and none of them changes what the server has."""
    caplog.clear()
    assert await admin(url, "SHOW transaction_read_only") == "on"
    before = await admin(url, "SELECT count(*) FROM mainstay_workflow_history")
    await eventually(lambda: caplog.text.count("will be again") >= 5, seconds=WAIT, what="refused writes")
    assert await admin(url, "SELECT count(*) FROM mainstay_workflow_history") == before
    assert await admin(url, "SELECT count(*) FROM mainstay_workflow_runs WHERE status LIKE '%parked%'") == 0


async def test_a_server_that_only_reads_for_a_while(own_postgres: Postgres, caplog: pytest.LogCaptureFixture) -> None:
    """While PostgreSQL refuses to write, only writes are repeated; then every saga ends as it would have."""
    caplog.set_level(logging.WARNING)
    with fresh_database(own_postgres.url) as url:
        async with selling(url):
            for setting in ["SET default_transaction_read_only = on", "RESET default_transaction_read_only"]:
                await asyncio.to_thread(execute_at, own_postgres.url, f"ALTER SYSTEM {setting}")
                await asyncio.to_thread(execute_at, own_postgres.url, "SELECT pg_reload_conf()")
                if setting.startswith("SET"):
                    await refused_meanwhile(url, caplog)


@contextmanager
def a_pair() -> Generator[tuple[Pair, str]]:
    """A primary with its standby, and the URL of a database on them."""
    with Pair() as pair:
        execute_at(pair.primary.url, "CREATE DATABASE shop")
        yield pair, pair.url.removesuffix("postgres") + "shop"


async def test_a_standby_is_promoted_after_a_crash() -> None:
    """The primary dies under load, and the address leads to its standby, which has all that was committed."""
    with a_pair() as (pair, url):
        async with selling(url):
            await asyncio.to_thread(pair.promote)


@pytest.mark.parametrize("restart", [False, True])
async def test_the_primary_is_demoted(restart: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The old primary goes on and only reads, with the workers' connections open or not, until the address moves."""
    caplog.set_level(logging.WARNING)
    with a_pair() as (pair, url):
        async with selling(url):
            await asyncio.to_thread(pair.demote, restart=restart)
            await refused_meanwhile(url, caplog)
            pair.move()
