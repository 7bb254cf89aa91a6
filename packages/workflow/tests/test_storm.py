"""Sagas over a flaky provider, whose workers are killed and frozen, and whose database crashes: no cent is lost.

`MAINSTAY_STORM=full` makes it a thousand sagas, a hundred kills, ten freezes past the lease and five crashes.
"""

import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Coroutine, Generator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import sqlalchemy as sa

from mainstay.core import App
from mainstay.core.testing import eventually
from mainstay.database import Database, DatabaseError, database_now, upgrade
from mainstay.database.schema import SCHEMA as DATABASE
from mainstay.workflow.tables import SCHEMA, history, runs
from mainstay_servers import Postgres, fresh_database

SCRIPT = Path(__file__).with_name("storm_process.py")
PROVIDER = Path(__file__).with_name("provider_process.py")
FULL = os.environ.get("MAINSTAY_STORM") == "full"
WORKERS = 4
WAIT = 120.0
leases = sa.table("mainstay_database_leases", sa.column("name"), sa.column("expires_at", sa.Double))


@dataclass
class Numbers:
    """How much of what."""

    sagas: int
    kills: int
    freezes: int = 0
    crashes: int = 0

    def disasters(self) -> list[str]:
        """All of them, mixed; always in the same order."""
        mixed = ["kill"] * self.kills + ["freeze"] * self.freezes + ["crash"] * self.crashes
        random.Random(8).shuffle(mixed)  # noqa: S311  the same in every run, on purpose
        return mixed


@contextmanager
def processes(url: str, directory: Path) -> Generator["subprocess.Popen[str]"]:
    """The provider, and the process that workers are forked from."""
    with (directory / "log").open("w") as log:
        provider = subprocess.Popen([sys.executable, PROVIDER, directory], stderr=log)
        nursery = subprocess.Popen(
            [sys.executable, SCRIPT, url, directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            bufsize=1,
            start_new_session=True,
        )
        try:
            yield nursery
        finally:
            for process in (provider, nursery):
                process.kill()
                process.wait()
            with suppress(ProcessLookupError):
                os.killpg(nursery.pid, signal.SIGKILL)
            for pipe in (nursery.stdin, nursery.stdout):
                if pipe is not None:
                    pipe.close()
    print((directory / "log").read_text()[-4_000:])


class Storm:
    """One storm.

    Args:
        app: starts the sagas, and executes none.
        there: the module that the workers run.
        server: PostgreSQL, where it is to crash.
    """

    def __init__(
        self,
        app: App,
        there: ModuleType,
        directory: Path,
        nursery: "subprocess.Popen[str]",
        server: Postgres | None,
    ) -> None:
        self._app = app
        self._there = there
        self._directory = directory
        self._nursery = nursery
        self._server = server
        self._choose = random.Random(9)  # noqa: S311  the same in every run, on purpose
        self._workers: list[int] = []
        self._frozen: set[int] = set()
        self._thawing: list[asyncio.Task[None]] = []
        self._started = 0
        self._effects = 0
        self.done = {"kill": 0, "freeze": 0, "crash": 0, "replaced": 0}

    async def rage(self, numbers: Numbers) -> None:
        """Let it happen; returns when every saga has ended."""
        disasters = numbers.disasters()
        backlog = numbers.sagas // 5
        await self._start(backlog)
        ahead = self._effects
        for number, disaster in enumerate(disasters, 1):
            self._complete()
            # Kept in balance: what has happened decides when the next disaster comes, and each comes with more to do.
            await eventually(lambda: self._progressed(self._effects - ahead), seconds=WAIT, what=f"progress ({number})")
            await getattr(self, f"_{disaster}")()
            self.done[disaster] += 1
            await self._start(backlog + (numbers.sagas - backlog) * number // len(disasters))
        await asyncio.gather(*self._thawing)
        await eventually(self._all_ended, seconds=WAIT, every_seconds=0.1, what="the end of all sagas")

    async def _start(self, until: int) -> None:
        while self._started < until:
            n = self._started + 1
            await self.insist(partial(self._there.sale.start, n, id=f"sale-{n}"))
            self._started = n
            self._effects += effects_of(self._there, n)

    async def insist(self, ask: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Ask until the database is there."""
        async with asyncio.timeout(WAIT):
            while True:
                try:
                    return await ask()
                except DatabaseError:
                    await asyncio.sleep(0.02)

    async def read(self, query: sa.Executable) -> Any:
        """Rows, as soon as the database is there."""
        return await self.insist(lambda: self._app.get(Database).read(query))

    async def _progressed(self, effects: int) -> bool:
        self._complete()
        return bool((await self._there.ask(what="stats"))["progress"] >= effects)

    async def _all_ended(self) -> bool:
        self._complete()
        query = sa.select(sa.func.count()).where(runs.c.status.in_(["queued", "running", "compensating"]))
        return bool((await self.read(query))[0][0] == 0)

    # Disasters

    def _complete(self) -> None:
        """Start workers in the place of those that are not there: at first, or where a start met a crash."""
        alive = [worker for worker in self._workers if Path(f"/proc/{worker}").exists()]
        for worker in {*self._workers}.difference(alive):
            assert self._lease(worker) is None, "a worker that served has ended by itself"
            self.done["replaced"] += 1
        self._workers = alive
        while len(self._workers) < WORKERS:
            assert self._nursery.stdin is not None
            assert self._nursery.stdout is not None
            print(file=self._nursery.stdin)
            self._workers.append(int(self._nursery.stdout.readline()))

    def _lease(self, worker: int) -> str | None:
        told = self._directory / f"lease-{worker}"
        return told.read_text() if told.exists() else None

    async def _victim(self) -> int:
        """A worker that serves."""

        def found() -> list[int]:
            self._complete()
            return [each for each in self._workers if each not in self._frozen and self._lease(each)]

        await eventually(found, seconds=WAIT, what="a worker that serves")
        return self._choose.choice(found())

    async def _kill(self) -> None:
        victim = await self._victim()
        os.kill(victim, signal.SIGKILL)
        self._workers.remove(victim)
        self._complete()

    async def _freeze(self) -> None:
        await eventually(lambda: not self._frozen, seconds=WAIT, what="the end of the freeze before")
        victim = await self._victim()
        os.kill(victim, signal.SIGSTOP)
        self._frozen.add(victim)
        self._thawing.append(asyncio.create_task(self._thaw(victim, self._lease(victim))))

    async def _thaw(self, worker: int, lease: str | None) -> None:
        """Let a worker go on as soon as its lease is over and others have its runs, but those whose rows it locks."""
        held = sa.select(leases.c.name).where(leases.c.name == lease, leases.c.expires_at > database_now())
        had = sa.select(runs.c.id).where(runs.c.worker == lease, runs.c.status == "running")

        async def over() -> bool:
            return not await self.read(held) and not await self.read(had.with_for_update(skip_locked=True))

        try:
            await eventually(over, seconds=WAIT, every_seconds=0.05, what="the takeover")
        finally:
            os.kill(worker, signal.SIGCONT)
            self._frozen.discard(worker)

    async def _crash(self) -> None:
        assert self._server is not None
        await asyncio.to_thread(self._server.kill)
        await asyncio.to_thread(self._server.start)


def effects_of(there: ModuleType, n: int) -> int:
    """How many effects a saga has at the provider, with those that undo others."""
    done = 3 + there.packs(n)
    return int(done * 2 if there.fails(n) else done + 1)


async def storm(url: str, directory: Path, there: ModuleType, numbers: Numbers, server: Postgres | None = None) -> None:
    """Let a storm pass, and look at what is left."""
    vars(there)["directory"] = directory
    with processes(url, directory) as nursery:
        app = there.app_for(url)
        async with app.running():
            async with app.get(Database).engine.begin() as connection:
                await connection.run_sync(there.books.metadata.create_all)
            await eventually((directory / "port").exists, seconds=WAIT, what="the provider")
            raging = Storm(app, there, directory, nursery, server)
            await raging.rage(numbers)
            stats = await there.ask(what="stats")
            print(raging.done, stats)
            assert raging.done["kill"] == numbers.kills
            await _every_saga_ended_as_it_says(raging, there, numbers)
            await _ledgers_are_equal(raging, there, numbers, directory)
            disasters = numbers.kills + numbers.freezes + numbers.crashes
            lost = (disasters + raging.done["replaced"]) * (there.EXECUTING + there.UNRECORDED)
            assert stats["repeats"] <= lost, "more was repeated than may be executing and unrecorded"


async def _every_saga_ended_as_it_says(raging: Storm, there: ModuleType, numbers: Numbers) -> None:
    rows = await raging.read(sa.select(runs).where(runs.c.workflow == "sale"))
    assert {row.id for row in rows} == {f"sale-{n}" for n in range(1, numbers.sagas + 1)}
    wrong = {}
    for row in rows:
        n = int(row.id.partition("-")[2])
        end = ("failed", None) if there.fails(n) else ("completed", there.cents_of(n))
        if (row.status, json.loads(row.output or "null")) != end:
            wrong[row.id] = f"{row.status} {row.output}: {row.failure or row.note}"
    assert wrong == {}
    children = await raging.read(
        sa.select(runs.c.parent, runs.c.status, runs.c.note).where(runs.c.workflow == "packing")
    )
    assert {(row.parent, row.status) for row in children} == {
        (f"sale-{n}", "cancelled" if there.fails(n) else "completed")
        for n in range(1, numbers.sagas + 1)
        if there.packs(n)
    }


async def _ledgers_are_equal(raging: Storm, there: ModuleType, numbers: Numbers, directory: Path) -> None:
    sold = {n: there.cents_of(n) for n in range(1, numbers.sagas + 1) if not there.fails(n)}
    books = {row.sale: row.cents for row in await raging.read(sa.select(there.books))}
    assert books == sold, "the service's own books"
    with closing(sqlite3.connect(directory / "provider.db")) as ledger:
        effects = ledger.execute("SELECT number, key, kind, cents, at FROM effects").fetchall()
        undone = {key for (key,) in ledger.execute("SELECT key FROM undone")}
        late = ledger.execute("SELECT count(*) FROM late").fetchone()
    print("late", late, "effects", len(effects), "undone", len(undone))
    kept: dict[str, list[tuple[str, int]]] = {}
    for _, key, kind, cents, _ in effects:
        run = key.partition(":")[0]
        if key not in undone:
            kept.setdefault(run, []).append((kind, cents))
    packing = {row.parent: row.id for row in await raging.read(sa.select(runs.c.parent, runs.c.id)) if row.parent}
    expected = {}
    for n, cents in sold.items():
        expected[f"sale-{n}"] = sorted([("hold seat", 0), ("hold meal", 0), ("charge", cents), ("ship", 0)])
        if there.packs(n):
            expected[packing[f"sale-{n}"]] = [("pack", 0)]
    assert {run: sorted(each) for run, each in kept.items()} == expected, "the provider's ledger"
    entries = await raging.read(
        sa.select(history.c.run_id, history.c.step, history.c.kind, history.c.body, history.c.at)
    )
    intended: dict[str, float] = {}
    recorded: dict[str, str] = {}
    for entry in entries:
        key = f"{entry.run_id}:{entry.step}"
        if entry.kind == "intent":
            intended[key] = min(entry.at, intended.get(key, entry.at))
        elif entry.kind == "done":
            recorded[key] = entry.body
    too_early = [key for _, key, _, _, at in effects if intended.get(key, at + 1) > at + 0.01]
    assert too_early == [], "an effect before its intent was durable"
    wrong = [key for number, key, *_ in effects if key in recorded and recorded[key] != str(number)]
    assert wrong == [], "a result that is not the provider's"


async def test_a_storm_over_postgresql(own_postgres: Postgres, tmp_path: Path, there: ModuleType) -> None:
    """Workers are killed and frozen past their leases, and PostgreSQL crashes."""
    numbers = Numbers(1_000, 100, 10, 5) if FULL else Numbers(300, 24, 3, 2)
    with fresh_database(own_postgres.url) as url:
        await upgrade(url, [DATABASE, SCHEMA])
        await storm(url, tmp_path, there, numbers, own_postgres)


async def test_a_storm_over_sqlite(tmp_path: Path, there: ModuleType) -> None:
    """Workers that share one file are killed."""
    numbers = Numbers(1_000, 100) if FULL else Numbers(200, 20)
    await storm(f"sqlite+aiosqlite:///{tmp_path / 'storm.db'}", tmp_path, there, numbers)
