"""People decide, cancel, terminate, retry and fork, while the workers that execute the runs are killed and frozen."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mainstay.core import App, bind
from mainstay.core.testing import eventually
from mainstay.database import Database, database_now
from mainstay.database.schema import SCHEMA as DATABASE
from mainstay.workflow import RunStateError, RunStatus, WorkflowEngine
from mainstay.workflow.errors import ApprovalConflict, ApprovalNotFound
from mainstay.workflow.testing import workflows
from mainstay_servers.frozen import frozen
from packages.workflow.tests.forked import Script

SCRIPT = Path(__file__).with_name("features_process.py")
WAIT = 90.0
RUNS, KILLS = 24, 6
REJECTED, CANCELLED, TERMINATED = (4, 9), (5, 17), (10, 22)
FORKED = (3, 11)
LONG = (0, 2, 6, 8)  # those of three generations


class Workers:
    """Two processes; each that is killed is followed by another one."""

    def __init__(self, url: str, directory: Path) -> None:
        self.url = url
        self._directory = directory
        self.processes = [self._start(), self._start()]

    def _start(self) -> Script:
        return Script(SCRIPT, self.url, self._directory, errors=self._directory / "log")

    def kill(self, number: int) -> None:
        """Kill one, and start its successor."""
        self.processes[number % 2].kill()
        self.processes[number % 2].wait()
        self.processes[number % 2] = self._start()

    def end(self) -> None:
        """Kill both."""
        for process in self.processes:
            process.kill()
            process.wait()


@asynccontextmanager
async def workers(url: str, directory: Path) -> AsyncGenerator[Workers]:
    """None of them survives the test."""
    running = Workers(url, directory)
    try:
        yield running
    finally:
        running.end()


def size(ledger: Path) -> int:
    """How much has happened on the other side."""
    return ledger.stat().st_size if ledger.exists() else 0


async def at_most_one_lease(database: Database) -> bool:
    """Whether the lease of one of two workers has ended: its runs may be taken over."""
    leases = DATABASE.metadata.tables["mainstay_database_leases"]
    of_workers = leases.c.name.startswith("mainstay-workflow "), leases.c.expires_at > database_now()
    return len(await database.read(sa.select(leases.c.name).where(*of_workers))) <= 1


async def killing(running: Workers, ledger: Path, database: Database) -> None:
    """Kill one whenever something more was done, or undone; freeze one in the middle for longer than its lease."""
    for number in range(KILLS):
        before = size(ledger)
        with suppress(TimeoutError):  # they wait for people, and die in their sleep
            await eventually(lambda before=before: size(ledger) > before, seconds=3)
        if number == KILLS // 2:
            async with frozen(running.processes[1].pid, running.url):
                await eventually(partial(at_most_one_lease, database), seconds=WAIT, what="the end of its lease")
        running.kill(number)


async def deciding(app: App) -> None:
    """Decide whatever is asked, until every run has ended or is parked."""
    engine = app.get(WorkflowEngine)
    while True:
        for asked in await engine.approvals.waiting(limit=1_000):
            n = int(asked.question)
            if n in CANCELLED + TERMINATED:
                continue
            # It may go on already: the list is from a moment ago.
            with bind(actor="eva"), suppress(ApprovalConflict, ApprovalNotFound):
                approved = n not in REJECTED
                await engine.approvals.decide(asked.run_id, "approve", approved=approved, place=asked.place)
        await asyncio.sleep(0.05)


async def status(engine: WorkflowEngine, id: str, *wanted: RunStatus) -> None:
    """Return once the run is in one of these states."""

    async def reached() -> bool:
        return await engine.status(id) in wanted

    await eventually(reached, seconds=WAIT, what=f"{id} is {' or '.join(wanted)}")


async def retried(engine: WorkflowEngine, id: str) -> None:
    """Retry the step that was parked; a worker that dies at that moment may have been parked already, or not yet."""
    await status(engine, id, RunStatus.PARKED)
    await engine.retry_from(id, "ship:1")


async def ended_by_a_person(engine: WorkflowEngine, n: int) -> None:
    """Cancel or terminate it while it asks."""
    run_id = f"o{n}"

    async def asks() -> bool:
        return any(asked.run_id == run_id for asked in await engine.approvals.waiting(limit=1_000))

    await eventually(asks, seconds=WAIT, what=f"{run_id} asks")
    if n in CANCELLED:
        await engine.cancel(run_id)
    else:
        await engine.terminate(run_id, reason="it was too much")


async def test_every_run_ends_as_people_decided(shared: str, tmp_path: Path, there: Any) -> None:
    """Whatever dies: each decision counts once, what is undone is undone, and what was terminated is left as it was."""
    ledger = tmp_path / "ledger"
    async with workflows(there.flows, url=shared, serve=False) as app, workers(shared, tmp_path) as running:
        engine = app.get(WorkflowEngine)
        inputs = [there.order.input(n, 2 if n in LONG else 0).named(f"o{n}") for n in range(RUNS)]
        await engine.start_batch(inputs)
        people = asyncio.create_task(deciding(app))
        killer = asyncio.create_task(killing(running, ledger, app.get(Database)))
        waits = [n for n in range(RUNS) if n % 6 == 1]
        try:
            async with asyncio.TaskGroup() as group:
                for n in CANCELLED + TERMINATED:
                    group.create_task(ended_by_a_person(engine, n))
            for n in waits:
                await status(engine, f"o{n}", RunStatus.PARKED)
            (tmp_path / "carrier").touch()
            async with asyncio.TaskGroup() as group:
                for n in waits:
                    group.create_task(retried(engine, f"o{n}"))
            for n in range(RUNS):
                await status(engine, f"o{n}", *(each for each in RunStatus if each.terminal))
            for n in FORKED:
                await engine.fork(f"o{n}", before="@approval approve:1", new_id=f"f{n}")
                await status(engine, f"f{n}", RunStatus.COMPLETED)
            await asyncio.wait_for(killer, WAIT)
        finally:
            for task in (people, killer):
                task.cancel()
            await asyncio.gather(people, killer, return_exceptions=True)
        expected = {f"o{n}": RunStatus.COMPLETED for n in range(RUNS)}
        expected |= {f"o{n}": RunStatus.FAILED for n in REJECTED}
        expected |= {f"o{n}": RunStatus.CANCELLED for n in CANCELLED}
        expected |= {f"o{n}": RunStatus.TERMINATED for n in TERMINATED}
        assert {run: await engine.status(run) for run in expected} == expected
        assert await engine.approvals.waiting() == []
        with pytest.raises(RunStateError):
            await engine.terminate("o0", reason="too late")
        for n in LONG:
            assert (await engine.run(f"o{n}")).generation == 3
            assert [value.body for value in await engine.values(f"o{n}")] == ['"asks 0"']
    lines = Counter(ledger.read_text().splitlines())
    done = {line.removeprefix("do ") for line in lines if line.startswith("do ")}
    undone = {line.removeprefix("undo ") for line in lines if line.startswith("undo ")}
    standing = Counter(key.partition(":")[0] for key in done - undone if ":charge" in key)
    assert standing == Counter(
        {f"o{n}": 3 if n in LONG else 1 for n in range(RUNS) if n not in REJECTED + CANCELLED}
    ), "a charge for each generation, of those that were not undone"
    reserved = [key for key in done - undone if ":reserve" in key]
    completed = [n for n in range(RUNS) if expected[f"o{n}"] is RunStatus.COMPLETED]
    assert len(reserved) == sum(3 if n in LONG else 1 for n in completed) + 2, (
        "one for each child, the forks' among them"
    )
    assert not [key for key in undone if key.partition(":")[0] in {f"o{n}" for n in TERMINATED}]
