"""What a run waits for: each branch goes on when its own wait is over, and no wait takes a place from others."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from mainstay.core import Drain, FullJitter, MainstayError, Retry
from mainstay.database import Database
from mainstay.workflow import (
    Done,
    Handle,
    NotInRun,
    RunStateError,
    RunStatus,
    StepFailed,
    Unknown,
    WorkflowEngine,
    WorkflowFailed,
    WorkflowRouter,
)
from mainstay.workflow._recording import Recording
from mainstay.workflow.tables import CANCEL, NEXT_SIGNAL, RELEASE
from mainstay.workflow.testing import workflows

WAIT = 30.0
QUICK = Retry(attempts=2, wait=FullJitter(0.001, 0.002))


async def until(condition) -> None:
    """Wait for what another task brings about."""
    async with asyncio.timeout(WAIT):
        while not await condition():  # noqa: ASYNC110  another task's doing
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("suspend_after_seconds", [0.01, 60.0])
async def test_a_branch_that_wakes_does_not_wait_for_its_siblings(suspend_after_seconds: float) -> None:
    """A sleep beside a step that waits for what comes after the sleep ends in its time, long or short."""
    flows, told = WorkflowRouter(), asyncio.Event()

    @flows.step(harmless=True)
    async def tell(n: int) -> int:
        told.set()
        return n

    @flows.step(harmless=True)
    async def hear(n: int) -> int:
        await told.wait()
        return n

    @flows.workflow(name="talk")
    async def talk(n: int) -> list[int]:
        async def late() -> int:
            await flows.sleep(0.1)
            return await tell(n)

        return list(await flows.gather(late(), hear(n)))

    async with workflows(flows, suspend_after_seconds=suspend_after_seconds):
        assert await (await talk.start(1)).result(WAIT) == [1, 1]


async def test_the_run_leaves_memory_only_when_all_of_its_branches_wait() -> None:
    """Two sleeps of different length: the run comes back for the first, and goes again for the second."""
    flows, order = WorkflowRouter(), []

    @flows.step(harmless=True)
    async def note(text: str) -> str:
        order.append(text)
        return text

    @flows.workflow(name="twice")
    async def twice(n: int) -> list[str]:
        async def after(seconds: float, text: str) -> str:
            await flows.sleep(seconds)
            return await note(text)

        return list(await flows.gather(after(0.6, "second"), after(0.3, "first")))

    async with workflows(flows, suspend_after_seconds=0.05) as app:
        run = await twice.start(1)

        async def waits() -> bool:
            return await run.status() is RunStatus.WAITING

        await until(waits)
        assert not app.get(WorkflowEngine).worker.executes(run.id)
        assert await run.result(WAIT) == ["second", "first"]
    assert order == ["first", "second"]


async def test_more_steps_execute_at_once_than_results_may_be_unrecorded() -> None:
    """Three hundred calls that wait for each other need three hundred places, whatever `max_unrecorded` says."""
    flows, here, all_here = WorkflowRouter(), [], asyncio.Event()

    @flows.step(harmless=True)
    async def call(n: int) -> int:
        here.append(n)
        if len(here) == 300:
            all_here.set()
        await all_here.wait()
        return n

    @flows.workflow(name="calls")
    async def calls(n: int) -> int:
        return await call(n)

    async with workflows(flows, max_unrecorded=8):
        runs = [await calls.start(n) for n in range(300)]
        assert [await run.result(WAIT) for run in runs] == list(range(300))


async def test_a_graceful_stop_leaves_no_step_unknown_that_waited_for_a_place(url) -> None:
    """Of five steps that must not be repeated one executes; the others have no intent, and go on after the stop."""
    flows, first, go, done = WorkflowRouter(), asyncio.Event(), asyncio.Event(), []

    @flows.step(harmless=True, on_unknown="park")
    async def charge(n: int) -> int:
        first.set()
        await go.wait()
        done.append(n)
        return n

    @flows.workflow(name="w")
    async def w(n: int) -> int:
        return await charge(n)

    async with workflows(flows, url=url, serve=False, max_executing=1) as app:
        engine = app.get(WorkflowEngine)
        runs = [await w.start(n, id=f"r{n}") for n in range(5)]
        drain = Drain(app.clock)
        worker = asyncio.create_task(engine.worker.work(drain))
        await asyncio.wait_for(first.wait(), WAIT)
        drain.begin()
        go.set()
        await asyncio.wait_for(worker, WAIT)
        assert len(done) == 1
        again = Drain(app.clock)
        worker = asyncio.create_task(engine.worker.work(again))
        assert [await run.result(WAIT) for run in runs] == list(range(5))
        again.begin()
        await worker
    assert sorted(done) == list(range(5))


async def test_an_open_circuit_does_not_grow_the_history(url) -> None:
    """Twenty rejections leave as many entries as one, and none of them counts as an attempt."""
    flows, tried = WorkflowRouter(), []

    @flows.step(one_call=True, retry=Retry(attempts=1))
    async def charge(n: int) -> int:
        tried.append(n)
        if len(tried) <= 20:
            msg = "open"
            raise MainstayError(msg, no_effect=True, retry_after_seconds=0.001)
        return n

    @charge.compensation
    async def refund(outcome: Done[int] | Unknown, n: int) -> None: ...

    @flows.workflow(name="sell")
    async def sell(n: int) -> int:
        return await charge(n)

    async with workflows(flows, url=url) as app:
        run = await sell.start(1, id="r")
        assert await run.result(WAIT) == 1
        (row,) = await app.get(Database).read(sa.text("select count(*) from mainstay_workflow_history"))
        assert row[0] <= 4
        history = await app.get(WorkflowEngine).history("r")
        charged = history.records["charge:1"]
        assert not charged.maybe_twice
        assert not charged.dangling
    assert len(tried) == 21


async def test_a_limit_of_the_function_takes_the_same_way_on_replay() -> None:
    """`asyncio.timeout` around a step leads to plan B live; a replay goes there too, and undoes what may have been."""
    flows, did, gate = WorkflowRouter(), [], asyncio.Event()
    limits: list[asyncio.Timeout] = []

    @flows.step()
    async def slow(n: int) -> int:
        did.append("slow")
        limits[-1].reschedule(0.0)  # it passes now
        await asyncio.sleep(3600)
        return n

    @slow.compensation
    async def undo(outcome: Done[int] | Unknown, n: int) -> None:
        did.append("undo slow")

    @flows.step(harmless=True)
    async def plan_b(n: int) -> int:
        did.append("b")
        return n

    @flows.step(harmless=True)
    async def wait_a_while(n: int) -> int:
        if not gate.is_set():
            gate.set()
            await asyncio.sleep(3600)
        return n

    @flows.workflow(name="w")
    async def w(n: int) -> int:
        try:
            async with asyncio.timeout(None) as limit:
                limits.append(limit)
                await slow(n)
        except TimeoutError:
            await plan_b(n)
        return await wait_a_while(n)

    async with workflows(flows, serve=False) as app:
        engine, run = app.get(WorkflowEngine), await w.start(1, id="r")
        first = asyncio.create_task(engine.worker.work(Drain(app.clock)))
        await asyncio.wait_for(gate.wait(), WAIT)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        drain = Drain(app.clock)
        second = asyncio.create_task(engine.worker.work(drain))
        assert await run.result(WAIT) == 1
        drain.begin()
        await second
    assert did == ["slow", "b", "undo slow"]


async def test_signals_keep_their_order_and_reach_only_those_who_may_receive_them(url) -> None:
    """Two messages of one sender come in their order whatever their ids; one for an ended run is refused by name."""
    flows = WorkflowRouter()
    note = flows.signal("note", str)

    @flows.workflow(name="listen")
    async def listen(n: int) -> str:
        return await note.wait() + await note.wait()

    async with workflows(flows, url=url):
        for n in range(10):
            run = await listen.start(n, id=f"r{n}")
            await note.send(run.id, "1", id="b")
            await note.send(run.id, "2", id="a")
            assert await run.result(WAIT) == "12"
        with pytest.raises(RunStateError, match="it is completed"):
            await note.send("r0", "late")


async def test_children_wait_in_the_queue_and_are_undone_with_their_parent(url) -> None:
    """Twenty parents in two places wait for their children; a parent that fails takes its child back."""
    flows, did = WorkflowRouter(), []

    @flows.step()
    async def book(n: int) -> int:
        did.append(f"book {n}")
        return n

    @book.compensation
    async def free(outcome: Done[int] | Unknown, n: int) -> None:
        did.append(f"free {n}")

    @flows.workflow(name="trip/hotel")
    async def hotel(n: int) -> int:
        return await book(n)

    @flows.step(harmless=True, retry=QUICK)
    async def fly(n: int) -> int:
        if n < 0:
            raise LookupError(n)
        return n

    @flows.workflow(name="trip")
    async def trip(n: int) -> int:
        return await hotel(n) + await fly(n)

    async with workflows(flows, url=url, max_runs=2, suspend_after_seconds=0.01) as app:
        runs = await asyncio.gather(*(trip.start(n) for n in range(20)))
        assert [await run.result(WAIT) for run in runs] == [2 * n for n in range(20)]
        assert not [line for line in did if line.startswith("free")]
        with pytest.raises(WorkflowFailed, match="step fly ended with LookupError") as caught:
            await (await trip.start(-1)).result(WAIT)
        assert caught.value.step == "fly"
        assert did[-2:] == ["book -1", "free -1"]
        views = await app.get(WorkflowEngine).runs(RunStatus.CANCELLED)
        assert [view.workflow for view in views] == ["trip/hotel"]


async def test_a_child_that_fails_fails_the_call_and_the_parent_may_go_another_way() -> None:
    """The parent sees `WorkflowFailed` of the kind of the error behind it, live and on replay."""
    flows, seen = WorkflowRouter(), []

    class Owed(MainstayError):
        """There are fees."""

        code = "BIZ_FEES_OWED"
        status = 402
        title = "Fees owed"
        public_message = "Pay first."

    @flows.step(harmless=True, failed_on=(Owed,))
    async def check(n: int) -> int:
        raise Owed

    @flows.workflow(name="child")
    async def child(n: int) -> int:
        return await check(n)

    @flows.workflow(name="parent")
    async def parent(n: int) -> str:
        try:
            await child(n)
        except WorkflowFailed as failed:
            seen.append((failed.error_code, failed.step, failed.public_message, failed.status, failed.title))
        await flows.sleep(0.2)
        return "another way"

    async with workflows(flows, suspend_after_seconds=0.01):
        assert await (await parent.start(1)).result(WAIT) == "another way"
    assert set(seen) == {("BIZ_FEES_OWED", "check", "Pay first.", 402, "Fees owed")}
    assert len(seen) >= 2


async def test_a_completed_run_is_taken_back_unless_it_is_past_a_pivot() -> None:
    """`compensate` undoes a completed run; one past its pivot is refused by name, and so is its cancellation."""
    flows, did = WorkflowRouter(), []

    @flows.step()
    async def book(n: int) -> int:
        return n

    @book.compensation
    async def free(outcome: Done[int] | Unknown, n: int) -> None:
        did.append(outcome)

    @flows.step(pivot=True, transactional=True)
    async def commit(n: int) -> int:
        return n

    @flows.workflow(name="w")
    async def w(n: int) -> int:
        return await (commit if n else book)(n)

    async with workflows(flows) as app:
        engine = app.get(WorkflowEngine)
        run = await w.start(0, id="r")
        await run.result(WAIT)
        await engine.compensate("r")
        with pytest.raises(WorkflowFailed, match="compensated after its end"):
            await run.result(WAIT)
        assert did == [Done(0)]
        await (await w.start(1, id="past")).result(WAIT)
        with pytest.raises(RunStateError, match="past its pivot"):
            await engine.compensate("past")


async def test_a_transactional_pivot_and_what_comes_after_it(url) -> None:
    """A failure after it reaches the function; what nobody can deal with parks, and is attempted again on resume."""
    flows, broken = WorkflowRouter(), [True]

    @flows.step(pivot=True, transactional=True)
    async def commit(n: int) -> int:
        return n

    @flows.step(after_pivot=True, retry=QUICK)
    async def ship(n: int) -> int:
        if broken[0]:
            raise LookupError(n)
        return n

    @flows.workflow(name="w")
    async def w(n: int) -> str:
        await commit(n)
        if n == 1:
            try:
                await ship(n)
            except StepFailed:
                return "by hand"
        return str(await ship(n))

    @flows.workflow(name="early")
    async def early(n: int) -> int:
        return await ship(n)

    async with workflows(flows, url=url) as app:
        engine = app.get(WorkflowEngine)
        assert await (await w.start(1)).result(WAIT) == "by hand"
        run = await w.start(2, id="r")

        async def parked() -> bool:
            return await run.status() is RunStatus.PARKED

        await until(parked)
        with pytest.raises(RunStateError, match="past its pivot"):
            await run.cancel()
        broken[0] = False
        await engine.resume("r")
        assert await run.result(WAIT) == "2"
        before = await early.start(1, id="early")

        async def refused() -> bool:
            return await before.status() is RunStatus.PARKED

        await until(refused)
        assert "no pivot is done yet" in ((await engine.run("early")).note or "")


async def test_a_step_parks_once_its_attempts_are_used_up() -> None:
    """`exhausted="park"`: every attempt first, then a person, then all attempts again."""
    flows, tried = WorkflowRouter(), []

    @flows.step(harmless=True, retry=QUICK, exhausted="park")
    async def call(n: int) -> int:
        tried.append(n)
        if len(tried) < 4:
            raise LookupError(n)
        return n

    @flows.workflow(name="w")
    async def w(n: int) -> int:
        return await call(n)

    async with workflows(flows) as app:
        run = await w.start(1, id="r")

        async def parked() -> bool:
            return await run.status() is RunStatus.PARKED

        await until(parked)
        assert len(tried) == 2
        assert "used up its 2 attempts: LookupError" in ((await app.get(WorkflowEngine).run("r")).note or "")
        await app.get(WorkflowEngine).resume("r")
        assert await run.result(WAIT) == 1


async def test_a_function_that_swallows_every_stop_is_closed() -> None:
    """A loop that catches whatever a stop raises holds neither the worker nor its own run for ever."""
    flows, rounds = WorkflowRouter(), []

    @flows.workflow(name="stubborn")
    async def stubborn(n: int) -> int:
        while True:
            try:
                await flows.sleep(3600)
            except BaseException:  # noqa: BLE001  what a careless function does
                rounds.append(n)

    async with workflows(flows, suspend_after_seconds=0.01) as app:
        began = time.monotonic()
        run = await stubborn.start(1, id="r")

        async def waits() -> bool:
            return await run.status() is RunStatus.WAITING

        await until(waits)
        assert time.monotonic() - began < WAIT
        await run.cancel()
        with pytest.raises(WorkflowFailed, match="cancelled"):
            await run.result(WAIT)
        assert not app.get(WorkflowEngine).worker.executes("r")
    assert rounds


async def test_a_run_that_does_not_end_in_its_time_fails_and_is_undone(url) -> None:
    """Asleep or executing, in memory or not; and one that is past its pivot goes on."""
    flows, did = WorkflowRouter(), []

    @flows.step()
    async def book(n: int) -> int:
        return n

    @book.compensation
    async def free(outcome: Done[int] | Unknown, n: int) -> None:
        did.append(n)

    @flows.step(pivot=True, transactional=True)
    async def commit(n: int) -> int:
        return n

    @flows.workflow(name="slow", timeout_seconds=0.3)
    async def slow(n: int) -> int:
        await (commit(n) if n == 0 else book(n))
        await flows.sleep(0.6 if n == 0 else 3600.0)
        return n

    for suspend_after_seconds in (0.05, 7200.0):
        did.clear()
        async with workflows(flows, url=url, suspend_after_seconds=suspend_after_seconds):
            run = await slow.start(1, id=f"late-{suspend_after_seconds}")
            with pytest.raises(WorkflowFailed, match=r"DeadlineExceeded: the run did not end within 0\.3 s") as caught:
                await run.result(WAIT)
            assert caught.value.error_code == "EXT_DEADLINE"
            assert await run.status() is RunStatus.FAILED
            assert await (await slow.start(0, id=f"past-{suspend_after_seconds}")).result(WAIT) == 0
        assert did == [1]


async def test_the_time_an_id_and_a_number_are_the_same_on_replay() -> None:
    """`now`, `uuid` and `random` are recorded, and `sleep_until` waits for a moment of the clock."""
    flows, seen = WorkflowRouter(), []

    @flows.workflow(name="w")
    async def w(n: int) -> int:
        began = await flows.now()
        seen.append((began, await flows.uuid(), await flows.random()))
        await flows.sleep_until(began + timedelta(seconds=0.3))
        await flows.sleep_until(began)
        return int(((await flows.now()) - began).total_seconds() >= 0.3)

    async with workflows(flows, suspend_after_seconds=0.05):
        assert await (await w.start(1)).result(WAIT) == 1
    assert len(seen) >= 2
    assert len(set(seen)) == 1


async def test_what_makes_no_sense_outside_a_run_or_without_a_zone_is_refused() -> None:
    """The message names what to use instead."""
    flows = WorkflowRouter()
    for call, remedy in ((flows.now, "datetime.now"), (flows.uuid, "uuid.uuid4"), (flows.random, "random.random")):
        with pytest.raises(NotInRun, match=remedy):
            await call()
    with pytest.raises(ValueError, match="has no time zone: give it one"):
        await flows.sleep_until(datetime(2026, 1, 1))  # noqa: DTZ001  that is the mistake
    with pytest.raises(ValueError, match="more than 0"):
        flows.workflow(name="w", timeout_seconds=0)


async def test_a_run_may_wait_for_ever(url) -> None:
    """Past the last day of the calendar, too: it is listed like any other, and can be cancelled."""
    flows = WorkflowRouter()
    asking = flows.approval("asking", str, may_decide=lambda _asked, _actor: True)

    @flows.workflow(name="wait")
    async def wait(which: str) -> None:
        if which == "approval":
            await asking.ask("whether", timeout_seconds=1e18)
        elif which == "moment":
            await flows.sleep_until(datetime.max.replace(tzinfo=UTC))
        else:
            await flows.sleep(1e18)

    async with workflows(flows, url=url) as app:
        engine = app.get(WorkflowEngine)
        started = [await wait.start(which, id=which) for which in ("sleep", "moment", "approval")]

        async def all_wait() -> bool:
            return len(await engine.runs(RunStatus.WAITING)) == len(started)

        await until(all_wait)
        assert {run.due_at for run in await engine.runs()} == {datetime.max.replace(tzinfo=UTC)}
        assert [asked.due_at for asked in await engine.approvals.waiting()] == [datetime.max.replace(tzinfo=UTC)]
        for run in started:
            await run.cancel()
            with pytest.raises(WorkflowFailed, match="cancelled"):
                await run.result(WAIT)


async def test_a_cancellation_at_the_moment_of_going_to_sleep_is_not_lost(url: str, monkeypatch: Any) -> None:
    """The run has seen no news when it says that it sleeps for an hour; there is some once this is written."""
    flows, real, cancelled = WorkflowRouter(), Recording.end, list[str]()

    async def end(self: Recording, *changes: Any, **options: Any) -> None:
        if not cancelled and any(statement is RELEASE for statement, _ in changes):
            cancelled.append(self.run_id)
            await app.get(WorkflowEngine).cancel(self.run_id)
        await real(self, *changes, **options)

    monkeypatch.setattr(Recording, "end", end)

    @flows.workflow(name="sleeps")
    async def sleeps(n: int) -> int:
        await flows.sleep(3_600.0)
        return n

    async with workflows(flows, url=url, suspend_after_seconds=0.01) as app:
        with pytest.raises(WorkflowFailed, match="cancelled"):
            await (await sleeps.start(1)).result(WAIT)
    assert len(cancelled) == 1


async def test_a_cancellation_that_a_wait_has_taken_for_its_own_news_is_not_lost(url: str, monkeypatch: Any) -> None:
    """Another process asks for it after the claim and before the wait looks, and this one has not been told."""
    flows, real, cancelled = WorkflowRouter(), Recording.read, list[str]()
    answer = flows.signal("answer", int)

    async def read(self: Recording, statement: Any, values: Any) -> Any:
        if statement is NEXT_SIGNAL and not cancelled:
            cancelled.append(self.run_id)
            await app.get(Database).write(CANCEL, {"run": self.run_id})
        return await real(self, statement, values)

    monkeypatch.setattr(Recording, "read", read)

    @flows.workflow(name="waits")
    async def waits(n: int) -> int:
        return await answer.wait(timeout_seconds=3_600.0) + n

    async with workflows(flows, url=url, suspend_after_seconds=0.01) as app:
        with pytest.raises(WorkflowFailed, match="cancelled"):
            await (await waits.start(1)).result(WAIT)
    assert len(cancelled) == 1


async def test_a_cancellation_that_is_rolled_back_cancels_nothing(url) -> None:
    """It joins the caller's transaction: what that leaves out has not been asked for, in memory neither."""
    flows = WorkflowRouter()

    @flows.workflow(name="w")
    async def w(n: int) -> int:
        await flows.sleep(0.5)
        return n

    async with workflows(flows, url=url) as app:
        run = await w.start(1, id="r")
        with pytest.raises(LookupError):
            await _cancel_and_fail(app.get(Database), run)
        assert await run.result(WAIT) == 1


async def _cancel_and_fail(database: Database, run: Handle[int]) -> None:
    async with database.transaction():
        await run.cancel()
        raise LookupError
