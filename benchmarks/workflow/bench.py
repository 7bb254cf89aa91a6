"""Three empty steps, durable: runs a second, and how many steps a kill repeats."""

import asyncio
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from benchmarks.rows import Peers, Row, compare, row
from benchmarks.workflow import fleet
from benchmarks.workflow.fleet import SETTINGS, spare_the_collector
from mainstay.workflow import WorkflowEngine, WorkflowRouter, current_step
from mainstay.workflow.testing import workflows
from mainstay_servers import Postgres, fresh_database

flows = WorkflowRouter()
_ledger: list[int] = []


@flows.step(harmless=True)
async def first(n: int) -> int:
    note()
    return n + 1


@flows.step(harmless=True)
async def second(n: int) -> int:
    note()
    return n + 1


@flows.step(harmless=True)
async def third(n: int) -> int:
    note()
    return n + 1


@flows.workflow(name="three-steps")
async def three(n: int) -> int:
    return await third(await second(await first(n)))


def note() -> None:
    """Where somebody counts: a line that outlives the process."""
    if _ledger:
        os.write(_ledger[0], f"{current_step().key}\n".encode())


async def runs(at_once: int, count: int) -> float:
    numbers = itertools.count()

    async def caller() -> None:
        for n in numbers:
            if n >= count:
                return
            assert await (await three.start(n)).result() == n + 3

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(at_once)))
    return count / (time.perf_counter() - started)


async def rows(quick: bool) -> AsyncIterator[Row]:  # noqa: FBT001  the runner's contract
    rounds = 1 if quick else 5
    sizes = [(1, 50), (32, 100), (1_000, 200)] if quick else [(1, 200), (32, 500), (1_000, 1_000)]
    with tempfile.TemporaryDirectory() as directory, Postgres() as server:
        with fresh_database(server.url) as ours, fresh_database(server.url) as theirs:
            databases = {
                "SQLite": (f"sqlite+aiosqlite:///{directory}/ours.db", f"sqlite:///{directory}/theirs.db"),
                "PostgreSQL": (ours, theirs.replace("+asyncpg", "")),
            }
            for name, (url, peer_url) in databases.items():
                async with AsyncExitStack() as stack:
                    peers = stack.enter_context(Peers("workflow"))
                    await stack.enter_async_context(workflows(flows, url=url, **SETTINGS))
                    spare_the_collector()
                    for at_once, count in sizes:
                        yield await compare(
                            f"three steps, {at_once:,} at once, {name}",
                            "runs/s",
                            partial(runs, at_once, count),
                            peer=("DBOS", peers("runs", peer_url, at_once, count)),
                            better="higher",
                            rounds=rounds,
                        )
        with fresh_database(server.url) as ours, fresh_database(server.url) as theirs:
            at_once, count = sizes[-1]
            async with AsyncExitStack() as stack:
                peers = stack.enter_context(Peers("workflow"))
                await stack.enter_async_context(workflows(flows, url=ours, **SETTINGS))
                spare_the_collector()
                yield await compare(
                    f"three steps, {at_once:,} at once, PostgreSQL, beside absurd",
                    "runs/s",
                    partial(runs, at_once, count),
                    peer=("absurd", peers("absurd_runs", theirs.replace("+asyncpg", ""), at_once, count)),
                    better="higher",
                    rounds=rounds,
                )
        with fresh_database(server.url) as url:
            async with workflows(flows, url=url, serve=False) as app:
                engine, number = app.get(WorkflowEngine), 1_000 if quick else 10_000
                rates = [await batch(engine, number, turn) for turn in range(rounds)]
                yield row(
                    f"start_batch of {number:,}, PostgreSQL",
                    "runs/s",
                    statistics.median(rates),
                    low=min(rates),
                    high=max(rates),
                    rounds=rounds,
                    better="higher",
                )
        async for each in fleet.rows(server, quick=quick):
            yield each
        repeated = [await kill(Path(directory) / f"kill-{n}", 1_000, n) for n in range(1 if quick else 5)]
        yield row(
            "steps repeated by a kill, of 3,000",
            "steps",
            max(repeated),
            low=min(repeated),
            high=max(repeated),
            rounds=len(repeated),
        )


async def batch(engine: WorkflowEngine, number: int, turn: int) -> float:
    """Start many runs together."""
    inputs = [three.input(n).named(f"batch-{turn}-{n}") for n in range(number)]
    started = time.perf_counter()
    await engine.start_batch(inputs)
    return number / (time.perf_counter() - started)


async def kill(directory: Path, count: int, turn: int) -> float:
    """Kill a worker in the middle of its runs, let this process take them over, and count what was done twice."""
    directory.mkdir()  # noqa: ASYNC240  nobody else is on this loop yet
    ledger = directory / "ledger"
    url = f"sqlite+aiosqlite:///{directory}/kill.db"
    async with workflows(flows, url=url, serve=False):
        handles = [await three.start(n, id=f"r{n}") for n in range(count)]
        command = [sys.executable, "-m", "benchmarks.workflow.bench", url, str(ledger)]
        worker = subprocess.Popen(command)  # noqa: ASYNC220  it takes no time, and is killed below
        try:
            enough = count * (turn + 1) // 2
            while not ledger.exists() or ledger.read_bytes().count(b"\n") < enough:  # noqa: ASYNC110  over there
                await asyncio.sleep(0.001)
        finally:
            worker.send_signal(signal.SIGKILL)
            worker.wait()
    open_ledger(ledger)
    async with workflows(flows, url=url, **SETTINGS):
        assert [await three.handle(handle.id).result(120) for handle in handles] == [n + 3 for n in range(count)]
    os.close(_ledger.pop())
    done = Counter(ledger.read_text().splitlines())
    assert len(done) == 3 * count
    return float(sum(done.values()) - len(done))


def open_ledger(path: Path) -> None:
    _ledger[:] = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)]


async def worker(url: str) -> None:
    async with workflows(flows, url=url, **SETTINGS):
        await asyncio.Event().wait()


if __name__ == "__main__":
    open_ledger(Path(sys.argv[2]))
    asyncio.run(worker(sys.argv[1]))
