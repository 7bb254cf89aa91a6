"""Sagas of any form, whose workers die at any moments, end as a plain interpreter says."""

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mainstay.core import App, Clock, Drain, FullJitter, Retry
from mainstay.database import Database
from mainstay.workflow import (
    Done,
    RunStateError,
    RunStatus,
    StepFailed,
    Unknown,
    WorkflowEngine,
    WorkflowFailed,
    WorkflowRouter,
    WorkflowSettings,
    current_step,
)
from mainstay.workflow._history import StepState
from mainstay.workflow._payloads import Payloads
from mainstay.workflow._worker import Worker
from mainstay.workflow.testing import DyingDatabase, workflows

WAIT = 60.0

Node = dict[str, Any]


def _leaf(kind: str) -> st.SearchStrategy[Node]:
    return st.fixed_dictionaries({"kind": st.just(kind), "n": st.integers(1, 9)})


def _inner(kind: str, inside: st.SearchStrategy[Node], most: int) -> st.SearchStrategy[Node]:
    return st.fixed_dictionaries({"kind": st.just(kind), "of": st.lists(inside, min_size=1, max_size=most)})


LEAVES = st.one_of(_leaf("step"), _leaf("step"), _leaf("fails"), _leaf("sleep"), _leaf("signal"))
SAGAS = st.recursive(
    LEAVES,
    lambda inside: st.one_of(
        _inner("sequence", inside, 3),
        _inner("gather", inside, 3),
        _inner("child", inside, 2),
        _inner("catch", inside, 2),
    ),
    max_leaves=8,
)
DEATHS = st.lists(st.tuples(st.integers(1, 25), st.booleans()), max_size=2)


class Undone(Exception):
    """What the interpreter's sagas fail with."""


def interpret(saga: Node, done: list[int]) -> int:
    """What a saga comes to, and the steps that it leaves done."""
    kind = saga["kind"]
    if kind == "fails":
        raise Undone
    if kind in {"step", "sleep", "signal"}:
        if kind == "step":
            done.append(saga["n"])
        return 0 if kind == "sleep" else int(saga["n"]) if kind == "step" else 1
    if kind == "child":
        own: list[int] = []
        total = sum(interpret(each, own) for each in saga["of"])
        done += own  # of one that fails nothing is left
        return total
    if kind == "catch":
        try:
            return sum(interpret(each, done) for each in saga["of"])
        except Undone:
            done.append(100)
            return 100
    total, failed = 0, False
    for each in saga["of"]:
        try:
            total += interpret(each, done)
        except Undone:
            if kind == "sequence":
                raise
            failed = True  # the other branches end all the same
    if failed:
        raise Undone
    return total


class Provider:
    """The other side, which knows idempotency keys."""

    def __init__(self) -> None:
        self.effects: dict[str, int] = {}
        self.asked: Counter[str] = Counter()
        self.undone: set[str] = set()
        self.flows = flows = WorkflowRouter()
        quick = Retry(attempts=2, wait=FullJitter(0.001, 0.002))
        self.told = told = flows.signal("told", int)

        @flows.step(retry=quick, failed_on=(LookupError,))
        async def work(n: int, fails: bool) -> int:
            key = current_step().key
            assert key not in self.undone, "a late original after its compensation"
            self.asked[key] += 1
            if fails:
                raise LookupError(n)
            self.effects[key] = n
            return n

        @work.compensation
        async def undo_work(outcome: Done[int] | Unknown, n: int, fails: bool) -> None:
            key = current_step().undoes
            assert key is not None
            self.undone.add(key)
            self.effects.pop(key, None)

        @flows.workflow(name="saga")
        async def saga(of: list[Node]) -> int:
            return sum([await run(each) for each in of])

        async def run(node: Node) -> int:
            kind = node["kind"]
            if kind == "sleep":
                await flows.sleep(0.001 * node["n"])
                return 0
            if kind == "signal":
                return await told.wait()
            if kind in {"step", "fails"}:
                return await work(node["n"], kind == "fails")
            if kind == "child":
                return await saga(node["of"])
            if kind == "gather":
                return sum(await flows.gather(*(run(each) for each in node["of"])))
            if kind == "sequence":
                return sum([await run(each) for each in node["of"]])
            try:
                return sum([await run(each) for each in node["of"]])
            except (StepFailed, WorkflowFailed):
                return await work(100, False)

        self.saga = saga


def _nobody(*_args: object) -> None: ...


@asynccontextmanager
async def serving(database: Any, provider: Provider, clock: Clock) -> AsyncGenerator[None]:
    """A worker on another view of the database, which is cancelled at the end."""
    worker = Worker(
        database=database,
        clock=clock,
        settings=WorkflowSettings(lease_seconds=0.5, poll_seconds=0.01, suspend_after_seconds=0.005),
        workflows=provider.flows.workflows,
        steps=provider.flows.steps,
        payloads=Payloads(),
        ended=_nobody,
    )
    task = asyncio.create_task(worker.work(Drain()))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def told_to_all(provider: Provider, app: App, told: set[str]) -> None:
    """Send every run, and every child, more messages than it can wait for."""
    for view in await app.get(WorkflowEngine).runs(limit=1_000):
        if view.id not in told and not view.status.terminal:
            told.add(view.id)
            with suppress(RunStateError):  # it has ended meanwhile
                async with app.get(Database).transaction():
                    for number in range(10):
                        await provider.told.send(view.id, 1, id=f"m{number}")


async def end_of(saga: Node, deaths: list[tuple[int, bool]]) -> tuple[Provider, RunStatus, int | None]:
    """Let workers die at these moments of theirs, and the last one take the run to its end."""
    provider, told = Provider(), set[str]()
    async with asyncio.timeout(WAIT), workflows(provider.flows, serve=False) as app:
        run, engine = await provider.saga.start([saga], id="r"), app.get(WorkflowEngine)
        views = [DyingDatabase(app.get(Database), at, after=after) for at, after in deaths]
        for view in [*views, app.get(Database)]:
            async with serving(view, provider, app.clock):
                while True:
                    status = await run.status()
                    if status.terminal or status.waits_for_a_person:
                        break
                    if isinstance(view, DyingDatabase) and view.dead.is_set():
                        break
                    await told_to_all(provider, app, told)
                    await asyncio.sleep(0.002)
        records = (await engine.history("r")).records.values()
        if status is RunStatus.COMPLETED:
            assert [record.key for record in records if record.state is StepState.OPEN] == []
        for view in await engine.runs(limit=1_000):
            assert view.status.terminal, f"{view.id} is {view.status}: {view.note}"
        return provider, status, await run.result() if status is RunStatus.COMPLETED else None


# A worker that dies in a transaction leaves its connection as a dead process does: nobody closes it.
@pytest.mark.filterwarnings("ignore:.*unclosed database:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(saga=SAGAS, deaths=DEATHS)
def test_any_saga_whose_workers_die_at_any_moment(saga: Node, deaths: list[tuple[int, bool]]) -> None:
    """Its result, its end and what is left at the provider are those of a plain interpreter."""
    done: list[int] = []
    try:
        expected: int | None = interpret(saga, done)
    except Undone:
        expected, done = None, []
    provider, status, result = asyncio.run(end_of(saga, deaths))
    assert status is (RunStatus.FAILED if expected is None else RunStatus.COMPLETED)
    assert result == expected
    assert sorted(provider.effects.values()) == sorted(done)
    assert max(provider.asked.values(), default=0) <= 1 + len(deaths)
    gc.collect()  # what the dead left is noticed here, and not in a test that comes later
