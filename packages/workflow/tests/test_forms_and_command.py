"""The command for people, and what it shares with the engine."""

import asyncio
import json
from datetime import timedelta

import pytest
import sqlalchemy as sa

from mainstay.cli import main
from mainstay.core import NotBoundError
from mainstay.core.testing import eventually
from mainstay.database import Database
from mainstay.workflow import (
    Done,
    RunParked,
    RunStatus,
    Unknown,
    WorkflowEngine,
    WorkflowFailed,
    WorkflowRouter,
)
from mainstay.workflow.tables import runs
from mainstay.workflow.testing import workflows

WAIT = 15.0


async def test_compensate_undoes_a_parked_run():
    """`WorkflowEngine.compensate` takes a run back that waits for a person."""
    flows = WorkflowRouter()
    log: list[object] = []

    @flows.step(on_unknown="park")
    async def charge(n: int) -> int:
        raise OSError(n)

    @charge.compensation
    async def refund(outcome: Done[int] | Unknown, n: int) -> None:
        log.append(outcome)

    @flows.workflow(name="buy")
    async def buy(n: int) -> int:
        return await charge(n)

    async with workflows(flows) as app:
        run = await buy.start(1)
        with pytest.raises(RunParked):
            await run.result(WAIT)
        await app.get(WorkflowEngine).compensate(run.id)
        with pytest.raises(WorkflowFailed, match="cancelled"):
            await run.result(WAIT)
    assert len(log) == 1


def _under(arguments):
    """`--url` belongs to the command that follows it."""
    url, address, verb, *rest = arguments
    return ["workflow", verb, *rest, url, address]


async def command(*arguments: str) -> int:
    """The command in a thread, since it has a loop of its own."""
    return await asyncio.to_thread(main, _under(arguments))


async def test_the_command_shows_and_decides(tmp_path, capsys):
    """list, show, resume and cancel, on a run that nobody knows the outcome of."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"
    flows = WorkflowRouter()
    tried: list[int] = []

    @flows.step(harmless=True, on_unknown="park")
    async def charge(n: int) -> int:
        tried.append(n)
        if len(tried) < 3:
            raise OSError(n)
        return n

    @flows.workflow(name="buy")
    async def buy(n: int) -> int:
        return await charge(n)

    async with workflows(flows, url=url):
        run = await buy.start(7, id="order-7")
        other = await buy.start(8, id="order-8")
        for parked in (run, other):
            with pytest.raises(RunParked):
                await parked.result(WAIT)

        assert await command("--url", url, "list", "--status", "parked") == 0
        listed = capsys.readouterr().out
        assert "parked" in listed
        assert "buy v1" in listed
        assert "order-7" in listed
        assert "it is unknown whether charge:1 took effect" in listed
        assert await command("--url", url, "list", "--status", "completed", "--limit", "5") == 0
        assert "order-7" not in capsys.readouterr().out

        assert await command("--url", url, "show", "order-7") == 0
        shown = capsys.readouterr().out
        assert "workflow  buy version 1" in shown
        assert 'input     {"n":7}' in shown
        assert "it is being attempted, or may have happened: no end of its last attempt is recorded" in shown
        assert "more than once" not in shown  # it was attempted once

        assert await command("--url", url, "resume", "order-7") == 0
        assert "order-7 goes on" in capsys.readouterr().out
        assert await run.result(WAIT) == 7
        assert await command("--url", url, "cancel", "order-8", "--json") == 0
        assert json.loads(capsys.readouterr().out)["run"] == "order-8"
        with pytest.raises(WorkflowFailed):
            await other.result(WAIT)
        assert await other.status() is RunStatus.CANCELLED
        assert await command("--url", url, "show", "order-8") == 0
        assert "failure   Cancelled: the run was cancelled" in capsys.readouterr().out
        assert await command("--url", url, "show", "order-7") == 0
        assert "OSError" not in capsys.readouterr().out.split("result")[0]

    assert await command("--url", url, "cancel", "order-8") == 2
    assert "run 'order-8' cannot be cancelled: it is cancelled" in capsys.readouterr().err
    assert await command("--url", url, "retry", "order-8", "--from", "charge:1") == 2
    assert "cannot be retried from charge:1: it is cancelled, and not parked" in capsys.readouterr().err
    assert await command("--url", url, "start", "buy", "--version", "1", "--input", "[" * 100_000) == 2
    assert "no JSON" in capsys.readouterr().err
    assert await command("--url", url, "show", "nobody") == 2
    assert "there is no run 'nobody'" in capsys.readouterr().err


async def test_the_list_says_why_a_run_failed_and_how_long_another_one_waits(capsys, tmp_path):
    """A run that sleeps is queued until its time has come; the list tells it from one that no worker takes."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'runs.db'}"
    flows = WorkflowRouter()

    @flows.workflow(name="sleep")
    async def sleep(n: int) -> None:
        if n < 0:
            raise ValueError(n)
        await flows.sleep(n * 86_400)

    async with workflows(flows, url=url) as app:
        await sleep.start(14, id="asleep")
        with pytest.raises(WorkflowFailed):
            await (await sleep.start(-1, id="failed")).result(WAIT)

        async def put_to_sleep() -> bool:
            view = await app.get(WorkflowEngine).run("asleep")
            return view.due_at is not None and view.due_at - view.created_at > timedelta(days=13)

        await eventually(put_to_sleep)
    async with workflows(flows, url=url, serve=False):
        await sleep.start(1, id="awake")
    assert await command("--url", url, "list", "--json") == 0
    notes = {row["id"]: row["note"] for row in json.loads(capsys.readouterr().out)}
    assert notes["failed"] == "ValueError: -1"
    assert notes["asleep"].startswith("waits until ")
    assert notes["awake"] is None
    assert await command("--url", url, "show", "asleep", "--json") == 0
    assert json.loads(capsys.readouterr().out)["waits"] == notes["asleep"].removeprefix("waits ")


async def test_the_command_leads_from_parent_to_child_and_back(capsys, tmp_path):
    """Each names the other; an exception without a text leaves no colon behind."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'runs.db'}"
    flows = WorkflowRouter()

    @flows.workflow(name="inner")
    async def inner() -> None:
        raise LookupError

    @flows.workflow(name="outer")
    async def outer() -> None:
        await inner()

    async with workflows(flows, url=url):
        with pytest.raises(WorkflowFailed, match=r"ended with LookupError$"):
            await (await outer.start(id="o")).result(WAIT)
    assert await command("--url", url, "show", "o", "--json") == 0
    (step,) = json.loads(capsys.readouterr().out)["steps"]
    child = step["note"].removeprefix("run ").partition(";")[0]
    assert step["note"] == f"run {child}; LookupError"
    assert await command("--url", url, "show", child, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["parent"], shown["failure"]) == ("o", "LookupError")


async def test_the_command_shows_what_waits_to_be_undone():
    """A run on its way back is shown as compensating, wherever it waits."""
    flows = WorkflowRouter()

    @flows.workflow(name="buy")
    async def buy(n: int) -> int:
        return n

    async with workflows(flows, serve=False) as app:
        run = await buy.start(1)
        async with app.get(Database).transaction() as session:
            await session.execute(sa.update(runs).values(failure='{"type": "X", "detail": "y"}'))
        assert await run.status() is RunStatus.COMPENSATING
        assert [view.id for view in await app.get(WorkflowEngine).runs(RunStatus.COMPENSATING)] == [run.id]
        assert await app.get(WorkflowEngine).runs(RunStatus.QUEUED) == []


async def test_whoever_waits_is_told_that_the_app_stops():
    """A result that is waited for when the App stops does not hang; the run goes on elsewhere."""
    flows = WorkflowRouter()

    @flows.workflow(name="buy")
    async def buy(n: int) -> int:
        return n

    async with workflows(flows, serve=False) as app:
        run = await buy.start(1)
        waiting = asyncio.create_task(run.result())
        await eventually(lambda: run.id in app.get(WorkflowEngine)._results._waiters)
    with pytest.raises(NotBoundError, match="the App stopped before the run ended"):
        await waiting
