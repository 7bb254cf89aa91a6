"""What a run costs by itself, and what many runs, workers and ended runs cost, all on PostgreSQL."""

import asyncio
import gc
import itertools
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import sqlalchemy as sa

from benchmarks.rows import Row, compare, row
from mainstay.core import App
from mainstay.database import Database
from mainstay.workflow import RunStatus, WorkflowEngine, WorkflowRouter
from mainstay.workflow.testing import workflows
from mainstay_servers import Postgres, fresh_database

SETTINGS: dict[str, Any] = {"lease_seconds": 5.0, "poll_seconds": 0.2}

flows = WorkflowRouter()


@flows.step(harmless=True)
async def increment(n: int) -> int:
    return n + 1


told = flows.signal("told", int)


@flows.workflow(name="steps")
async def steps(times: int) -> int:
    n = 0
    for _ in range(times):
        n = await increment(n)
    return n


@flows.workflow(name="wait")
async def wait() -> int:
    return await told.wait()


def spare_the_collector() -> None:
    """What `app.run()` does in a worker's process once it serves."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, *gc.get_threshold()[1:])


async def rows(server: Postgres, *, quick: bool) -> AsyncIterator[Row]:
    rounds = 1 if quick else 5
    async with AsyncExitStack() as stack:
        url = stack.enter_context(fresh_database(server.url))
        await stack.enter_async_context(workflows(flows, url=url, **SETTINGS))
        spare_the_collector()
        count = 1_000 if quick else 3_000
        yield await compare("processor per run, 1,000 at once", "µs", partial(processor, count), rounds=rounds)
        times = 50 if quick else 300
        yield await compare("a run of three steps, alone", "ms", partial(alone, times), rounds=rounds)
        raw = await stack.enter_async_context(fenced(url))
        yield await compare(
            "a step, alone",
            "ms",
            partial(one_step, times),
            peer=("a fenced commit by asyncpg", partial(commit, raw, times * 3)),
            rounds=rounds,
        )
    many = 2_000 if quick else 10_000
    yield row("seconds until a live peer has executed 10,000 interrupted runs", "s", await taken_over(server, many))
    for workers in (1, 2, 4):
        figures = [await by_workers(server, workers, 1_000 if quick else 4_000) for _ in range(1 if quick else 3)]
        middle = sorted(figures)[len(figures) // 2]
        yield row(
            f"queued runs by {workers} worker processes",
            "runs/s",
            middle,
            low=min(figures),
            high=max(figures),
            rounds=len(figures),
            better="higher",
        )
    yield await beside_ended(server, 50_000 if quick else 1_000_000, rounds)
    waiting = 1_000 if quick else 10_000
    yield row("memory of 10,000 runs that wait", "MiB", (await memory(server, waiting)) * 10_000 / waiting)


async def processor(count: int) -> float:
    """Processor time of a run of three steps, of 1,000 at once."""
    numbers = iter(range(count))

    async def caller() -> None:
        for _ in numbers:
            assert await (await steps.start(3)).result() == 3

    began = time.process_time()
    await asyncio.gather(*(caller() for _ in range(1_000)))
    return (time.process_time() - began) / count * 1e6


async def alone(times: int, length: int = 3) -> float:
    """Milliseconds for a run that nothing shares the machine with."""
    began = time.perf_counter()
    for _ in range(times):
        assert await (await steps.start(length)).result() == length
    return (time.perf_counter() - began) / times * 1e3


async def one_step(times: int) -> float:
    """Milliseconds for one step more."""
    few, many = 1, 11
    return (await alone(times, many) - await alone(times, few)) / (many - few)


@asynccontextmanager
async def fenced(url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection with the two tables of a hand-made fenced write."""
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        await connection.execute(
            "CREATE TABLE owner (id text PRIMARY KEY, epoch bigint NOT NULL);"
            "CREATE TABLE entry (run text, seq bigint, body text, PRIMARY KEY (run, seq));"
            "INSERT INTO owner VALUES ('run', 1)"
        )
        yield connection
    finally:
        await connection.close()


_numbers = itertools.count()


async def commit(connection: asyncpg.Connection, times: int) -> float:
    """Milliseconds for one insert that the owner's epoch guards, its own commit."""
    statement = await connection.prepare(
        "WITH held AS (SELECT id FROM owner WHERE id = $1 AND epoch = $2 FOR SHARE) "
        "INSERT INTO entry SELECT held.id, $3, $4 FROM held RETURNING seq"
    )
    began = time.perf_counter()
    for _ in range(times):
        assert await statement.fetch("run", 1, next(_numbers), '{"n":1}')
    return (time.perf_counter() - began) / times * 1e3


async def taken_over(server: Postgres, count: int) -> float:
    """Seconds until the runs of a worker whose lease has ended are executed by another one that lives."""
    with fresh_database(server.url) as url:
        async with workflows(flows, url=url, **SETTINGS) as app:
            spare_the_collector()
            database = app.get(Database)
            async with database.transaction() as session:
                await session.execute(sa.text(_INSERT), {**_DEAD, "count": count})
            began = time.perf_counter()
            await until_none_is(app, "status <> 'completed'")
            return time.perf_counter() - began


_INSERT = """
    INSERT INTO mainstay_workflow_runs
        (id, workflow, version, status, epoch, worker, attempts, progress, wake_at, cancel_requested, input, context)
    SELECT :name || n, 'steps', 1, :status, 1, :worker, 1, 0, extract(epoch from now()), false, :input, '{}'
    FROM generate_series(1, :count) AS n
"""
_DEAD = {"name": "dead-", "status": "running", "worker": "mainstay-workflow dead", "input": '{"times":3}'}
_ENDED = {"name": "ended-", "status": "completed", "worker": None, "input": '{"times":3}'}


async def until_none_is(app: App, condition: str) -> None:
    left = sa.text(f"SELECT count(*) FROM mainstay_workflow_runs WHERE {condition}")  # noqa: S608
    while (await app.get(Database).read(left))[0][0]:  # noqa: ASYNC110  other processes' work
        await asyncio.sleep(0.02)


async def by_workers(server: Postgres, workers: int, count: int) -> float:
    """Runs a second that so many processes take out of the queue and execute."""
    with fresh_database(server.url) as url:
        async with workflows(flows, url=url, serve=False) as app:
            command = [sys.executable, "-m", "benchmarks.workflow.fleet", url]
            processes = [
                subprocess.Popen(command, stdout=subprocess.PIPE)  # noqa: ASYNC220  it takes no time
                for _ in range(workers)
            ]
            try:
                for process in processes:
                    assert process.stdout is not None
                    await asyncio.to_thread(process.stdout.readline)  # it serves
                began = time.perf_counter()
                async with app.get(Database).transaction():
                    for _ in range(count):
                        await steps.start(3)
                await until_none_is(app, "status <> 'completed'")
                return count / (time.perf_counter() - began)
            finally:
                for process in processes:
                    process.kill()
                    process.wait()


async def beside_ended(server: Postgres, ended: int, rounds: int) -> Row:
    """How long a queued run takes until it has ended, with many ended runs in the table and without."""
    with fresh_database(server.url) as full, fresh_database(server.url) as empty:
        async with (
            workflows(flows, url=full, **_UNHURRIED) as app,
        ):
            async with app.get(Database).transaction() as session:
                await session.execute(sa.text(_INSERT), {**_ENDED, "count": ended})
                await session.execute(sa.text("ANALYZE mainstay_workflow_runs"))
            beside = [await claims(app) for _ in range(rounds)]
        async with workflows(flows, url=empty, **_UNHURRIED) as app:
            without = [await claims(app) for _ in range(rounds)]
    pairs = [here / there for here, there in zip(sorted(beside), sorted(without), strict=True)]
    middle = len(pairs) // 2
    return row(
        "a claim beside 1,000,000 ended runs",
        "ms",
        sorted(beside)[middle],
        peer=("in an empty table", sorted(without)[middle]),
        low=min(pairs),
        high=max(pairs),
        rounds=rounds,
    )


_UNHURRIED = SETTINGS | {"poll_seconds": 10}


async def claims(app: App, times: int = 100) -> float:
    """Milliseconds for a run without steps that goes through the queue."""
    began = time.perf_counter()
    for _ in range(times):
        async with app.get(Database).transaction():
            run = await steps.start(0)
        assert await run.result() == 0
    return (time.perf_counter() - began) / times * 1e3


async def memory(server: Postgres, count: int) -> float:
    """MiB by which a worker has grown once so many runs wait."""
    with fresh_database(server.url) as url:
        command = [sys.executable, "-m", "benchmarks.workflow.fleet", url, str(count)]
        done = await asyncio.to_thread(subprocess.run, command, stdout=subprocess.PIPE, check=True)
    return float(json.loads(done.stdout))


def resident() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


async def grown(url: str, count: int) -> None:
    async with workflows(flows, url=url, **SETTINGS, suspend_after_seconds=0.5) as app:
        engine = app.get(WorkflowEngine)

        async def waiting(number: int) -> None:
            for at in range(0, number, 500):
                await asyncio.gather(*(wait.start() for _ in range(at, min(at + 500, number))))
            while await engine.runs(RunStatus.RUNNING, limit=1) or await engine.runs(RunStatus.QUEUED, limit=1):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            gc.collect()

        await waiting(200)  # what is made once
        before = resident()
        await waiting(count)
        print(json.dumps(max(0.0, resident() - before)))


async def serve(url: str) -> None:
    async with workflows(flows, url=url, **SETTINGS):
        spare_the_collector()
        print("serving", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]) if len(sys.argv) == 2 else grown(sys.argv[1], int(sys.argv[2])))
