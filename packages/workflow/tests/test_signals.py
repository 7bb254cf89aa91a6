"""Signals reach a run that waits, that will wait, that sleeps, and that does not exist yet; each is received once."""

import asyncio
from collections import Counter

import pytest
from pydantic import BaseModel

from mainstay.database import Database
from mainstay.workflow import (
    NotInRun,
    RunStateError,
    RunStatus,
    SignalConflict,
    StepFailed,
    WorkflowEngine,
    WorkflowFailed,
    WorkflowRouter,
)
from mainstay.workflow.testing import explore, workflows

WAIT = 15.0


class Approval(BaseModel):
    by: str
    amount: int


flows = WorkflowRouter()
approved = flows.signal("order/approved", Approval)
noted = flows.signal("noted", str)
undone: list[str] = []


@flows.step()
async def hold(n: int) -> int:
    return n


@hold.compensation
async def release(outcome: object, n: int) -> None:
    undone.append("hold")


@flows.workflow(name="approve")
async def approve(n: int) -> str:
    await hold(n)
    approval = await approved.wait()
    return f"{approval.by} {approval.amount + n}"


@flows.workflow(name="two")
async def two(n: int) -> list[str]:
    return sorted(await flows.gather(noted.wait(), noted.wait()))


@flows.workflow(name="limited")
async def limited(seconds: float) -> str:
    try:
        return await noted.wait(seconds)
    except StepFailed as error:
        return f"{error.step} {error.error_type} {error.outcome}"


async def waits(app, id):
    async with asyncio.timeout(WAIT):
        while not any(  # noqa: ASYNC110  the run makes it true
            key.startswith("@signal") for key in (await app.get(WorkflowEngine).history(id)).records
        ):
            await asyncio.sleep(0.002)


async def test_a_waiting_run_receives(url):
    """The value comes back typed, and what comes twice under one id is one message."""
    async with workflows(flows, url=url) as app:
        run = await approve.start(1, id="r")
        await waits(app, "r")
        for _ in range(2):
            await approved.send("r", Approval(by="ann", amount=5), id="form-1")
        assert await run.result(WAIT) == "ann 6"


async def test_a_known_message_with_another_value_is_refused(url):
    """Equal is equal by value; another value or signal under the id is no repetition, in either order."""
    loose = flows.signal("loose", set[str])
    try:
        async with workflows(flows, url=url) as app:
            database = app.get(Database)
            await two.start(1, id="there")
            for run_id in ("there", "later"):
                await approved.send(run_id, Approval(by="ann", amount=5), id="form-1")
                await app.get(WorkflowEngine).send(run_id, "order/approved", '{"amount": 5, "by": "ann"}', "raw")
                await approved.send(run_id, Approval(by="ann", amount=5), id="raw")
                await loose.send(run_id, {"a", "b", "c"}, id="set")
                await app.get(WorkflowEngine).send(run_id, "loose", '["c","b","a"]', "list")
                await loose.send(run_id, {"a", "b", "c"}, id="list")
                for again in (
                    lambda to: approved.send(to, Approval(by="ann", amount=6), id="form-1"),
                    lambda to: noted.send(to, "ann", id="form-1"),
                    lambda to: loose.send(to, {"a"}, id="set"),
                ):
                    with pytest.raises(SignalConflict, match=f"of run '{run_id}' was sent as (another value|signal )"):
                        await again(run_id)
                    with pytest.raises(SignalConflict):
                        async with database.transaction():
                            await again(run_id)
            await approved.send("r", Approval(by="ann", amount=5), id="form-1")
            assert await (await approve.start(1, id="r")).result(WAIT) == "ann 6"
            await approved.send("r", Approval(by="ann", amount=5), id="form-1")  # known, though its run has ended
            with pytest.raises(SignalConflict):
                await approved.send("r", Approval(by="ann", amount=6), id="form-1")
            with pytest.raises(RunStateError, match="would never be received"):
                await approved.send("r", Approval(by="ann", amount=5), id="form-2")
            sends = [approved.send("race", Approval(by="ann", amount=n % 4), id="one") for n in range(16)]
            ends = await asyncio.gather(*sends, return_exceptions=True)
            assert Counter(type(end) for end in ends) == {type(None): 4, SignalConflict: 12}
    finally:
        del flows.signals["loose"]


async def test_trap_13_a_signal_may_come_before_anyone_waits(url):
    """Sent before the run waits, and before it exists, a message is there when it is waited for."""
    async with workflows(flows, url=url):
        await approved.send("early", Approval(by="eve", amount=1))
        run = await approve.start(1, id="early")
        assert await run.result(WAIT) == "eve 2"


async def test_a_rolled_back_signal_was_never_sent(url):
    """A message joins the transaction around it."""
    async with workflows(flows, url=url) as app:
        run = await approve.start(1, id="r")
        with pytest.raises(LookupError):
            async with app.get(Database).transaction():
                await approved.send("r", Approval(by="eve", amount=1))
                raise LookupError
        async with app.get(Database).transaction():
            await approved.send("r", Approval(by="ann", amount=1))
        assert await run.result(WAIT) == "ann 2"


async def test_two_branches_receive_two_messages(url):
    """Each message goes to one branch only, in the order of their arrival."""
    async with workflows(flows, url=url):
        run = await two.start(1, id="r")
        await noted.send("r", "one")
        await noted.send("r", "two")
        await noted.send("r", "three")
        assert await run.result(WAIT) == ["one", "two"]


@pytest.mark.parametrize("seconds", [0.0, 0.2])
async def test_a_wait_may_be_limited(url, seconds):
    """After its time a wait fails like a step, whether the run stayed in memory or not."""
    async with workflows(flows, url=url, suspend_after_seconds=0.1):
        run = await limited.start(seconds)
        assert await run.result(WAIT) == "signal noted DeadlineExceeded failed"
        run = await limited.start(60.0, id="r")
        await noted.send("r", "in time")
        assert await run.result(WAIT) == "in time"


async def test_a_run_that_waits_for_long_leaves_memory_and_is_woken(url, tmp_path):
    """It costs no place in a worker; a signal from another process brings it back; cancelled, it is compensated."""
    address = f"sqlite+aiosqlite:///{tmp_path / 'shared.db'}" if ":memory:" in url else url
    async with workflows(flows, url=address, suspend_after_seconds=0.01, max_runs=1) as app:
        worker = app.get(WorkflowEngine).worker
        sleeping = [await approve.start(n, id=f"r{n}") for n in range(3)]
        for run in sleeping:
            await waits(app, run.id)
        async with asyncio.timeout(WAIT):
            while any([await run.status() is not RunStatus.WAITING for run in sleeping]):  # noqa: ASYNC110  it lets go
                await asyncio.sleep(0.01)
        assert not any(worker.executes(run.id) for run in sleeping)
        await asyncio.to_thread(asyncio.run, _send_from_elsewhere(address))
        assert await sleeping[0].result(WAIT) == "bob 10"
        await approved.send("r1", Approval(by="ann", amount=1))
        assert await sleeping[1].result(WAIT) == "ann 2"
        undone.clear()
        await sleeping[2].cancel()
        with pytest.raises(WorkflowFailed, match="cancelled"):
            await sleeping[2].result(WAIT)
        assert undone == ["hold"]


async def _send_from_elsewhere(address):
    there = WorkflowRouter()
    signal = there.signal("order/approved", Approval)
    async with workflows(there, url=address, serve=False):
        await signal.send("r0", Approval(by="bob", amount=10))


async def test_no_message_is_lost_or_doubled_whenever_the_worker_dies():
    """Two messages are received once each, in their order, after a death at any moment."""

    @flows.workflow(name="order", version=len(flows.workflows) + 1)
    async def in_order(n: int) -> str:
        return await noted.wait() + await noted.wait()

    async def start(_app):
        run = await in_order.start(1, id="r")
        await noted.send("r", "a")
        await noted.send("r", "b")
        return run

    async def check(run, _app):
        assert await run.result() == "ab"

    assert await explore(flows, start=start, check=check) >= 8
    del flows.workflows["order", in_order.version]


async def test_no_wake_up_is_lost():
    """A run that is being put to sleep at the moment in which its signal is sent wakes up all the same."""
    async with workflows(flows, suspend_after_seconds=0.001):
        for n in range(40):
            run = await approve.start(n, id=f"r{n}")
            await asyncio.sleep(n / 4_000)  # the sending moves across the moment of going to sleep
            await approved.send(f"r{n}", Approval(by="ann", amount=0))
            assert await run.result(WAIT) == f"ann {n}"


async def test_mistakes_are_said():
    """A wrong value, a wait outside a run, a negative limit and a name that is taken name the remedy."""
    async with workflows(flows):
        with pytest.raises(TypeError, match="signal order/approved: its value cannot be kept"):
            await approved.send("r", "yes")  # type: ignore[arg-type]  # what the test is about
    with pytest.raises(NotInRun, match="only workflow functions wait for signals"):
        await approved.wait()
    with pytest.raises(ValueError, match="a finite number of seconds, 0 or more"):
        await approved.wait(-1)
    with pytest.raises(ValueError, match="already has a signal 'noted'"):
        flows.signal("noted", str)
    assert repr(noted) == "<signal noted>"
