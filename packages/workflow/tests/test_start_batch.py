"""Many runs in one commit, and runs of workflows whose code is elsewhere."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import BaseModel

from mainstay.cli import main
from mainstay.core import App
from mainstay.database import Database
from mainstay.workflow import RunConflict, RunParked, RunStatus, WorkflowEngine, WorkflowFailed, WorkflowRouter
from mainstay.workflow.tables import runs
from mainstay.workflow.testing import explore, workflows

WAIT = 60.0


class Order(BaseModel):
    """What is ordered."""

    number: int
    note: str = ""


def shop() -> tuple[WorkflowRouter, Any]:
    """A workflow of one step."""
    flows = WorkflowRouter()

    @flows.step(harmless=True)
    async def pack(order: Order) -> int:
        return order.number

    @flows.workflow(name="sell", timeout_seconds=600)
    async def sell(order: Order, times: int = 1) -> int:
        return times * await pack(order)

    return flows, sell


async def number_of_runs(database: Database) -> int:
    """How many runs there are."""
    return int((await database.read(sa.select(sa.func.count()).select_from(runs)))[0][0])


async def test_all_are_started_in_their_order(url: str) -> None:
    """Arguments, defaults, ids and time limits are those of `start`; started again they are the same runs."""
    flows, sell = shop()
    async with workflows(flows, url=url) as app:
        engine, database = app.get(WorkflowEngine), app.get(Database)
        inputs = [sell.input(Order(number=n), times=2).named(f"sale-{n}") for n in range(1_200)]
        handles = await engine.start_batch(inputs)
        assert [handle.id for handle in handles] == [f"sale-{n}" for n in range(1_200)]
        assert await asyncio.gather(*(handle.result(WAIT) for handle in handles)) == [2 * n for n in range(1_200)]
        again = await engine.start_batch([*inputs[:3], sell.input(Order(number=7)), *inputs[:1]])
        assert [await handle.result(WAIT) for handle in again] == [0, 2, 4, 7, 0]
        assert await number_of_runs(database) == 1_201
        assert await engine.start_batch([]) == []
        assert not await database.read(sa.select(runs.c.id).where(runs.c.deadline.is_(None)))


async def test_one_conflict_starts_nothing(url: str) -> None:
    """The message names each id; equal inputs are no conflict, whatever wrote them."""
    flows, sell = shop()

    @flows.workflow(name="other")
    async def other() -> None:
        return None

    async with workflows(flows, url=url, serve=False) as app:
        engine, database = app.get(WorkflowEngine), app.get(Database)
        await sell.start(Order(number=1), id="a")
        await other.start(id="b")
        named = [sell.input(Order(number=1, note=note)).named(run) for run, note in (("a", "x"), ("b", ""), ("c", ""))]
        with pytest.raises(RunConflict) as refused:
            await engine.start_batch(named)
        assert "'a' exists, with another input" in str(refused.value)
        assert "'b' exists, with workflow 'other'" in str(refused.value)
        with pytest.raises(RunConflict, match="'c'"):
            await engine.start_batch([named[2], sell.input(Order(number=2)).named("c")])
        assert await number_of_runs(database) == 2
        await database.write(
            sa.update(runs).where(runs.c.id == "a").values(input='{"times":1,"order":{"note":"","number":1}}')
        )
        await engine.start_batch([sell.input(Order(number=1)).named("a"), named[2]])
        assert await number_of_runs(database) == 3


async def test_they_begin_with_the_transaction_around_them(url: str) -> None:
    """Rolled back there is none of them, also where some ids were there before."""
    flows, sell = shop()
    async with workflows(flows, url=url) as app:
        engine, database = app.get(WorkflowEngine), app.get(Database)
        inputs = [sell.input(Order(number=n)).named(f"s{n}") for n in range(20)]

        async def start(*, fail: bool) -> list[Any]:
            async with database.transaction():
                handles = await engine.start_batch(inputs)
                if fail:
                    raise LookupError
                return handles

        with pytest.raises(LookupError):
            await start(fail=True)
        assert await number_of_runs(database) == 0
        await inputs[3].start()
        assert [await handle.result(WAIT) for handle in await start(fail=False)] == list(range(20))
        assert await number_of_runs(database) == 20


async def test_inside_a_workflow_they_are_started_once() -> None:
    """Wherever the worker dies, a replay starts nothing again, with or without ids."""
    flows, sell = shop()
    seen: list[list[str]] = []

    @flows.workflow(name="many")
    async def many(engine_of: str) -> int:
        inputs = [sell.input(Order(number=1)).named("one"), sell.input(Order(number=2))]
        handles = await engines[engine_of].start_batch(inputs)
        by_name = await engines[engine_of].start_by_name("sell", {"order": {"number": 3}})
        seen.append([*(handle.id for handle in handles), by_name])
        return len(handles)

    engines: dict[str, WorkflowEngine] = {}

    async def start(app: App) -> Any:
        seen.clear()
        engines["e"] = app.get(WorkflowEngine)
        return await many.start("e", id="m")

    async def check(handle: Any, app: App) -> None:
        assert await handle.status() is RunStatus.COMPLETED
        assert await number_of_runs(app.get(Database)) == 4
        assert len({tuple(ids) for ids in seen}) == 1

    await explore(flows, start=start, check=check)


async def test_a_name_is_enough_where_the_code_is_elsewhere(postgres: str) -> None:
    """The worker that has the code reads the input; what does not fit parks the run, and says which parameter."""
    flows, sell = shop()
    del sell
    async with workflows(WorkflowRouter(), url=postgres, serve=False) as app:
        engine = app.get(WorkflowEngine)
        with pytest.raises(ValueError, match="say version="):
            await engine.start_by_name("sell", {"order": {"number": 1}})
        with pytest.raises(TypeError, match="nothing that JSON can say"):
            await engine.start_by_name("sell", {"order": object()}, version=1)
        good = {"order": {"number": 4}}
        assert await engine.start_by_name("sell", good, version=1, id="good") == "good"
        assert await engine.start_by_name("sell", good, version=1, id="good") == "good"
        assert await engine.start_by_name("sell", {**good, "times": 1}, version=1, id="two") == "two"
        assert await engine.start_by_name("sell", {"times": 1, **good}, version=1, id="two") == "two"
        for other in ({}, {"order": {"number": 4.0}}, {"order": {"number": "4"}}):
            with pytest.raises(RunConflict):
                await engine.start_by_name("sell", other, version=1, id="good")
        await engine.start_by_name("sell", {"order": {"number": "secret"}}, version=1, id="bad")
        await engine.start_by_name("sell", {"times": 1}, version=1, id="missing")
        await engine.start_by_name("sell", {**good, "colour": "secret"}, version=1, id="surplus")
        await engine.start_by_name("sell", good, version=7, id="later")
    async with workflows(flows, url=postgres) as app:
        engine = app.get(WorkflowEngine)
        assert await engine.ended("good", WAIT) == "4"
        for run_id, parameter in (("bad", "order"), ("missing", "order"), ("surplus", "colour")):
            with pytest.raises(RunParked, match=parameter) as parked:
                await engine.ended(run_id, WAIT)
            assert "secret" not in str(parked.value)
        assert (await engine.run("later")).status == "queued"
        assert await engine.ended(await engine.start_by_name("sell", good), WAIT) == "4"
        assert (await engine.run("good")).due_at is None
        for wrong, parameter in (({"times": 1}, "order"), ({**good, "tmies": 2}, "tmies")):
            with pytest.raises(TypeError, match=parameter):
                await engine.start_by_name("sell", wrong)


async def test_a_run_that_is_started_by_name_has_the_time_limit_of_its_workflow(shared: str) -> None:
    """The first worker that has the code gives it that, counted from the start, once; a limit that was named counts."""
    stopped = asyncio.Event()

    def release(limit: float | None) -> WorkflowRouter:
        flows = WorkflowRouter()

        @flows.step(harmless=True)
        async def look(n: int) -> int:
            stopped.set()
            return n

        @flows.workflow(name="slow", timeout_seconds=limit)
        async def slow(n: int) -> int:
            await look(n)
            await flows.sleep(3_600)
            return n

        return flows

    async with workflows(WorkflowRouter(), url=shared, serve=False) as app:
        engine = app.get(WorkflowEngine)
        await engine.start_by_name("slow", {"n": 1}, version=1, id="own")
        await engine.start_by_name("slow", {"n": 1}, version=1, id="named", timeout_seconds=0.25)
    async with workflows(release(0.5), url=shared, suspend_after_seconds=0.05) as app:
        engine = app.get(WorkflowEngine)
        for run_id, limit in (("own", "0.5"), ("named", "0.25")):
            with pytest.raises(WorkflowFailed, match=f"the run did not end within {limit} s"):
                await engine.ended(run_id, WAIT)

    async with workflows(WorkflowRouter(), url=shared, serve=False) as app:
        await app.get(WorkflowEngine).start_by_name("slow", {"n": 1}, version=1, id="none")
        await app.get(WorkflowEngine).start_by_name("slow", {"n": 1}, version=1, id="stays", timeout_seconds=0.25)
    stopped.clear()
    async with workflows(release(None), url=shared) as app:
        await asyncio.wait_for(stopped.wait(), WAIT)
        with pytest.raises(WorkflowFailed, match=r"the run did not end within 0\.25 s"):
            await app.get(WorkflowEngine).ended("stays", WAIT)
    # A run that has begun without a limit keeps none: a release that sets one does not end it in the middle.
    async with workflows(release(0.001), url=shared) as app:
        engine = app.get(WorkflowEngine)
        await engine.cancel("none")
        with pytest.raises(WorkflowFailed, match="cancelled"):
            await engine.ended("none", WAIT)


def test_the_command_starts_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the App the input is checked at once; without it the worker does."""
    url = f"sqlite+aiosqlite:///{tmp_path}/runs.db"
    flows, sell = shop()

    async def migrate() -> None:
        async with workflows(flows, url=url, serve=False):
            pass

    asyncio.run(migrate())
    command = ["workflow", "start", "sell", "--url", url]
    assert main([*command, "--input", '{"order": {"number": 6}}', "--version", "1", "--id", "r"]) == 0
    assert "r begins as soon as a worker takes it" in capsys.readouterr().out
    for wrong in ("[]", "{", '{"order": 1}'):
        assert main([*command, "--input", wrong]) == 2
    capsys.readouterr()
    for wrong, why in (
        ('{"order": {"number": 6}, "order": {"number": 7}}', "has the member 'order' twice"),
        ('{"order": {"number": 6, "number": 6}}', "has the member 'number' twice"),
        ('{"order": [{"a": {"b": 1, "b": null}}]}', "has the member 'b' twice"),
        ('{"order": NaN}', "nothing that JSON can say"),
        ('{"order": 1e999}', "nothing that JSON can say"),
        ('{"order": "\\ud800"}', "nothing that JSON can say"),
        ('{"order": ' + "1" * 5_000 + "}", "no JSON"),
    ):
        assert main([*command, "--version", "1", "--id", "wrong", "--input", wrong]) == 2
        assert why in capsys.readouterr().err.replace("\n", " ")

    monkeypatch.setattr(sys, "stdin", None)
    assert main([*command, "--version", "1", "--input", "-"]) == 2
    assert "standard input is closed" in capsys.readouterr().err

    async def result() -> int:
        async with workflows(flows, url=url):
            return int(await sell.handle("r").result(WAIT))

    assert asyncio.run(result()) == 6
