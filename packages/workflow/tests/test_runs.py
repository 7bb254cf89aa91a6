"""Runs that go well, go wrong, and go back; on every database."""

import asyncio
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from pydantic import BaseModel

from mainstay.core import (
    App,
    DeadlineExceeded,
    Drain,
    FullJitter,
    MainstayError,
    Retry,
    once,
    timeout,
)
from mainstay.core.testing import VirtualClock, eventually
from mainstay.database import Database, WrongEventLoop
from mainstay.workflow import (
    Done,
    RunConflict,
    RunNotFound,
    RunParked,
    RunStateError,
    RunStatus,
    StepFailed,
    Unknown,
    WorkflowEngine,
    WorkflowFailed,
    WorkflowRouter,
    current_step,
)
from mainstay.workflow.tables import runs
from mainstay.workflow.testing import workflows

QUICK = FullJitter(0.001, 0.002)
WAIT = 15.0


class Order(BaseModel):
    id: UUID
    total: Decimal
    at: datetime


class Declined(Exception):
    """The provider said no, so nothing was charged."""


class Shop:
    """Three steps that note what they do, and a workflow over them; `behave` makes a step misbehave."""

    def __init__(self):
        self.flows = flows = WorkflowRouter()
        self.log: list[object] = []
        self.behave: dict[str, object] = {}

        @flows.step(compensation_retry=Retry(4, QUICK))
        async def hold(n: int) -> int:
            return int(await self.act("hold", n))

        @hold.compensation
        async def release(outcome: Done[int] | Unknown, n: int) -> None:
            await self.act("release", outcome)

        @flows.step(
            retry=Retry(attempts=3, wait=QUICK),
            failed_on=(Declined,),
            compensation_retry=Retry(4, QUICK),
            one_call=True,
        )
        async def charge(n: int) -> int:
            return int(await self.act("charge", n))

        @charge.compensation
        async def refund(outcome: Done[int] | Unknown, n: int) -> None:
            await self.act("refund", outcome)

        @flows.step(harmless=True, retry=Retry(attempts=2, wait=QUICK))
        async def ship(n: int) -> int:
            return int(await self.act("ship", n))

        @flows.workflow(name="buy")
        async def buy(n: int) -> int:
            return await ship(await charge(await hold(n)))

        self.hold, self.charge, self.ship, self.buy = hold, charge, ship, buy

    async def act(self, name: str, value: Any) -> Any:
        self.log.append(name if not isinstance(value, Unknown | Done) else (name, value))
        how = self.behave.get(name)
        if isinstance(how, list):
            how = how.pop(0) if how else None
        if isinstance(how, BaseException):
            raise how
        if callable(how):
            return await how(value)
        return value + 1 if isinstance(value, int) else None


async def test_a_run_goes_through_its_steps_in_order(url):
    """Every step runs once, the result comes back typed, and the run is completed."""
    shop = Shop()
    async with workflows(shop.flows, url=url):
        run = await shop.buy.start(1, id="one")
        assert await run.result(WAIT) == 4
        assert await run.status() is RunStatus.COMPLETED
        assert await shop.buy.handle("one").result(WAIT) == 4
    assert shop.log == ["hold", "charge", "ship"]


async def test_starting_from_another_loop_is_refused_at_once(url):
    """A thread with an event loop of its own gets an error that names the remedy, and nothing hangs."""
    shop = Shop()
    async with workflows(shop.flows, url=url):
        with pytest.raises(WrongEventLoop, match="run_coroutine_threadsafe"):
            await asyncio.to_thread(lambda: asyncio.run(shop.buy.start(1, id="one")))
        assert await (await shop.buy.start(1, id="one")).result(WAIT) == 4


async def test_starting_again_is_the_same_run(url):
    """The same id and input return the run that exists; other input or another workflow is refused."""
    shop = Shop()

    @shop.flows.workflow(name="other")
    async def other(n: int) -> int:
        return n

    async with workflows(shop.flows, url=url):
        await (await shop.buy.start(1, id="one")).result(WAIT)
        assert await (await shop.buy.start(1, id="one")).result(WAIT) == 4
        with pytest.raises(RunConflict, match="with another input"):
            await shop.buy.start(2, id="one")
        with pytest.raises(RunConflict, match="with workflow 'buy'"):
            await other.start(1, id="one")
        same = await asyncio.gather(*(shop.buy.start(7, id="many") for _ in range(20)))
        assert {await run.result(WAIT) for run in same} == {10}
    assert shop.log == ["hold", "charge", "ship"] * 2


async def test_a_start_shares_the_transaction_around_it(url):
    """Rolled back, the run never was; committed, it runs; and inside a transaction, too, an id names one run."""
    shop = Shop()
    async with workflows(shop.flows, url=url) as app:
        db = app.get(Database)
        with pytest.raises(LookupError):
            async with db.transaction():
                gone = await shop.buy.start(1, id="gone")
                raise LookupError
        with pytest.raises(RunNotFound):
            await gone.result(WAIT)
        async with db.transaction():
            run = await shop.buy.start(1, id="there")
            await asyncio.sleep(0)
            assert shop.log == []
        assert await run.result(WAIT) == 4
        async with db.transaction():
            assert (await shop.buy.start(1, id="there")).id == "there"
        with pytest.raises(RunConflict):
            async with db.transaction():
                await shop.buy.start(2, id="there")
        async with db.batch():
            run = await shop.buy.start(5, id="collected")
        assert await run.result(WAIT) == 8
    assert len(shop.log) == 6


async def test_ids_are_made_up_if_need_be(url):
    """Without an id every start is a new run."""
    shop = Shop()
    async with workflows(shop.flows, url=url):
        first, second = await shop.buy.start(1), await shop.buy.start(1)
        assert first.id != second.id
        assert [await first.result(WAIT), await second.result(WAIT)] == [4, 4]
        with pytest.raises(TypeError, match="arguments cannot be kept"):
            await shop.buy.start("one")  # type: ignore[call-overload]  # what the test is about


async def test_values_come_back_as_their_types(url):
    """A model with UUID, Decimal and time is the same in the step, in its result and in its compensation."""
    flows = WorkflowRouter()
    seen: list[object] = []

    async def price(order: Order) -> dict[str, Order]:
        seen.append(order)
        return {"order": order}

    price.__annotations__ |= {"order": Order, "return": dict[str, Order]}
    step = flows.step()(price)

    async def unprice(outcome: Done[dict[str, Order]] | Unknown, order: Order) -> None:
        seen.extend([outcome, order])

    step.compensation(unprice)

    async def quote(order: Order) -> Order:
        found = await step(order)
        seen.append(found["order"])
        raise LookupError

    quote.__annotations__ |= {"order": Order, "return": Order}
    workflow = flows.workflow(name="quote")(quote)
    order = Order(id=uuid4(), total=Decimal("12.50"), at=datetime(2026, 1, 2, tzinfo=UTC) + timedelta(microseconds=3))
    async with workflows(flows, url=url):
        with pytest.raises(WorkflowFailed, match="LookupError"):
            await (await workflow.start(order)).result(WAIT)
    assert seen == [order, order, Done({"order": order}), order]


async def test_a_failure_is_compensated_in_reverse(url):
    """A step that fails for good raises StepFailed, and what was done before is undone, the last first."""
    shop = Shop()
    shop.behave["ship"] = LookupError("no truck")
    async with workflows(shop.flows, url=url):
        run = await shop.buy.start(1, id="one")
        with pytest.raises(WorkflowFailed, match="StepFailed: step ship ended with LookupError: no truck") as caught:
            await run.result(WAIT)
        assert caught.value.error_type == "StepFailed"
        assert await run.status() is RunStatus.FAILED
    assert shop.log == ["hold", "charge", "ship", "ship", ("refund", Done(3)), ("release", Done(2))]


async def test_failed_means_that_nothing_happened(url):
    """An error of `failed_on` ends the step at once, and the step itself is not compensated."""
    shop = Shop()
    shop.behave["charge"] = Declined("no money")
    async with workflows(shop.flows, url=url):
        with pytest.raises(WorkflowFailed, match="nothing happened"):
            await (await shop.buy.start(1)).result(WAIT)
    assert shop.log == ["hold", "charge", ("release", Done(2))]


async def test_no_effect_errors_are_failures(url):
    """In a step of one call it is attempted again while it is retryable, and then fails without compensation."""
    shop = Shop()
    shop.behave["charge"] = MainstayError("refused", no_effect=True, retryable=True)
    async with workflows(shop.flows, url=url):
        with pytest.raises(WorkflowFailed, match="nothing happened"):
            await (await shop.buy.start(1)).result(WAIT)
    assert shop.log == ["hold", "charge", "charge", "charge", ("release", Done(2))]


async def test_trap_10_an_unknown_outcome_is_compensated(url):
    """After an error that proves nothing the step counts as perhaps done, and its compensation is told so."""
    shop = Shop()
    shop.behave["charge"] = OSError("connection lost")
    async with workflows(shop.flows, url=url):
        with pytest.raises(WorkflowFailed, match="it may have happened"):
            await (await shop.buy.start(1)).result(WAIT)
    unknown = Unknown("OSError: connection lost")
    assert shop.log == ["hold", "charge", "charge", "charge", ("refund", unknown), ("release", Done(2))]


async def test_one_unknown_attempt_makes_the_step_unknown(url):
    """A clean refusal after a lost answer does not prove that the first attempt did nothing."""
    shop = Shop()
    shop.behave["charge"] = [OSError("lost"), Declined("no money")]
    async with workflows(shop.flows, url=url):
        with pytest.raises(WorkflowFailed, match="it may have happened"):
            await (await shop.buy.start(1)).result(WAIT)
    assert shop.log[-2:] == [("refund", Unknown("Declined: no money")), ("release", Done(2))]


async def test_a_rejection_is_waited_out_and_is_no_attempt(url):
    """Twelve rejections with retry_after do not use up three attempts, and nothing is compensated."""
    shop = Shop()
    shop.behave["charge"] = [MainstayError("open", no_effect=True, retry_after_seconds=0.001) for _ in range(12)]
    attempts: list[int] = []
    act = shop.act

    async def note(name, value):
        if name == "charge":
            attempts.append(current_step().attempt)
        return await act(name, value)

    shop.act = note  # type: ignore[method-assign]  # the steps look it up when they are called
    async with workflows(shop.flows, url=url):
        assert await (await shop.buy.start(1)).result(WAIT) == 4
    assert attempts == [1] * 13


async def test_a_function_may_go_another_way(url):
    """A StepFailed that the function catches is not the run's failure; its fields say what happened."""
    shop = Shop()
    shop.behave["charge"] = Declined("no money")
    seen: list[object] = []

    @shop.flows.workflow(name="try")
    async def attempt(n: int) -> int:
        try:
            return await shop.charge(n)
        except StepFailed as error:
            seen.append((error.step, error.outcome, error.error_type, error.detail, error.no_effect))
            return await shop.hold(n)

    async with workflows(shop.flows, url=url):
        assert await (await attempt.start(1)).result(WAIT) == 2
    assert seen == [("charge", "failed", "Declined", "no money", True)]
    assert shop.log == ["charge", "hold"]


async def test_an_unknown_step_is_undone_even_where_the_run_completes(url):
    """A function that goes another way after a lost answer does not leave the perhaps-made charge behind."""
    shop = Shop()
    shop.behave["charge"] = OSError("lost")

    @shop.flows.workflow(name="try")
    async def attempt(n: int) -> int:
        try:
            return await shop.charge(n)
        except StepFailed:
            return await shop.hold(n)

    async with workflows(shop.flows, url=url):
        run = await attempt.start(1)
        assert await run.result(WAIT) == 2
        assert await run.status() is RunStatus.COMPLETED
    assert shop.log == ["charge", "charge", "charge", "hold", ("refund", Unknown("OSError: lost"))]


async def test_trap_11_a_stuck_compensation_parks_the_run_and_is_resumed_there(url):
    """After its budget the run is COMPENSATION_FAILED; resumed, only what is left is undone."""
    shop = Shop()
    shop.behave |= {"ship": LookupError("no truck"), "release": OSError("provider away")}
    async with workflows(shop.flows, url=url) as app:
        engine = app.get(WorkflowEngine)
        run = await shop.buy.start(1, id="one")
        with pytest.raises(RunParked, match=r"compensation_failed: hold:1:compensation used up its 4 attempts"):
            await run.result(WAIT)
        assert await run.status() is RunStatus.COMPENSATION_FAILED
        assert shop.log[-5:] == [("refund", Done(3)), *[("release", Done(2))] * 4]
        with pytest.raises(RunStateError, match="cannot be cancelled"):
            await run.cancel()
        shop.behave.clear()
        shop.log.clear()
        await engine.resume("one")
        with pytest.raises(WorkflowFailed):
            await run.result(WAIT)
        assert await run.status() is RunStatus.FAILED
        with pytest.raises(RunStateError, match="cannot be resumed: it is failed"):
            await engine.resume("one")
    assert shop.log == [("release", Done(2))]


async def test_a_pivot_allows_no_way_back(url):
    """What fails after the pivot parks the run with everything in place, and resumes forward."""
    shop = Shop()
    flows = shop.flows

    @flows.step(on_unknown="park", pivot=True)
    async def commit(n: int) -> int:
        return int(await shop.act("commit", n))

    @flows.workflow(name="pivot")
    async def pivoting(n: int) -> int:
        return await shop.ship(await commit(await shop.hold(n)))

    shop.behave["ship"] = LookupError("no truck")
    async with workflows(flows, url=url) as app:
        run = await pivoting.start(1, id="one")
        with pytest.raises(RunParked, match="step ship ended with LookupError"):
            await run.result(WAIT)
        assert shop.log == ["hold", "commit", "ship", "ship"]
        shop.behave.clear()
        await app.get(WorkflowEngine).resume("one")
        assert await run.result(WAIT) == 4
    assert shop.log == ["hold", "commit", "ship", "ship", "ship"]


async def test_all_branches_end_before_a_failure_goes_on(url):
    """A branch that fails does not cut its siblings off in the middle; what they did is undone."""
    shop = Shop()

    @shop.flows.workflow(name="split")
    async def split(n: int) -> int:
        await shop.flows.gather(shop.charge(n), shop.hold(n))
        return n

    async def slow(n):
        await eventually(declined, seconds=WAIT)
        shop.log.append("held")
        return n

    async def declined():
        (run,) = await app.get(WorkflowEngine).runs()
        charge = (await app.get(WorkflowEngine).history(run.id)).records.get("0.0/charge:1")
        return charge is not None and charge.state == "failed"

    shop.behave |= {"charge": Declined("no"), "hold": slow}
    async with workflows(shop.flows, url=url) as app:
        with pytest.raises(WorkflowFailed, match="Declined"):
            await (await split.start(1)).result(WAIT)
    assert shop.log == ["charge", "hold", "held", ("release", Done(1))]


async def test_prototype_6_steps_side_by_side_without_gather_park_the_run(url):
    """Occurrence numbers that would depend on who comes first are refused, and the message names the remedy."""
    shop = Shop()

    @shop.flows.workflow(name="race")
    async def race(n: int) -> int:
        await asyncio.gather(shop.hold(1), shop.hold(2))
        return n

    async with workflows(shop.flows, url=url):
        with pytest.raises(RunParked, match=r"use flows\.gather"):
            await (await race.start(1)).result(WAIT)


async def test_trap_14_a_function_that_does_something_else_on_replay_is_parked(url):
    """Another step where the record has one, and an end before a recorded step, park the run; neither fails it."""
    shop = Shop()
    way = ["hold"]
    gate = asyncio.Event()

    @shop.flows.workflow(name="fickle")
    async def fickle(n: int) -> int:
        if way[0] == "hold":
            await shop.hold(n)
        elif way[0] == "charge":
            await shop.charge(n)
        if way[0] == "nothing":
            return n
        return await shop.ship(n)

    async def wait(n):
        gate.set()
        await asyncio.sleep(60)

    shop.behave["ship"] = wait
    async with workflows(shop.flows, url=url, serve=False) as app:
        run = await fickle.start(1, id="one")
        drain = Drain()
        first = asyncio.create_task(app.get(WorkflowEngine).worker.work(drain))
        await gate.wait()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert await run.status() is RunStatus.QUEUED
        way[0] = "charge"
        second = asyncio.create_task(app.get(WorkflowEngine).worker.work(drain))
        with pytest.raises(RunParked, match=r"asked for charge:1 where its record has hold:1.*new version"):
            await run.result(WAIT)
        way[0] = "nothing"
        await app.get(WorkflowEngine).resume("one")
        with pytest.raises(RunParked, match="ended before hold:1"):
            await run.result(WAIT)
        way[0] = "hold"
        shop.behave.clear()
        await app.get(WorkflowEngine).resume("one")
        assert await run.result(WAIT) == 2
        drain.begin()
        await second
    assert shop.log == ["hold", "ship", "ship"]


async def test_trap_18_signals_pass_by_except_exception(url):
    """A workflow function that swallows every Exception is nevertheless cancelled, and its steps undone."""
    shop = Shop()
    gate = asyncio.Event()

    async def wait(n):
        gate.set()
        await asyncio.sleep(0.05)
        return n

    @shop.flows.workflow(name="stubborn")
    async def stubborn(n: int) -> int:
        for _ in range(1_000):
            try:
                await shop.hold(n)
            except Exception:  # noqa: BLE001  what the test is about
                shop.log.append("swallowed")
        return n

    shop.behave["hold"] = wait
    async with workflows(shop.flows, url=url):
        run = await stubborn.start(1)
        await gate.wait()
        await run.cancel()
        with pytest.raises(WorkflowFailed) as caught:
            await run.result(WAIT)
        assert caught.value.error_type == "Cancelled"
        assert await run.status() is RunStatus.CANCELLED
        with pytest.raises(RunStateError, match="it is cancelled"):
            await run.cancel()
    assert "swallowed" not in shop.log
    assert shop.log.count("hold") == shop.log.count(("release", Done(1)))


async def test_a_queued_run_is_cancelled_without_ever_running(url):
    """A run that nobody has begun is cancelled, and nothing of it happens."""
    shop = Shop()
    async with workflows(shop.flows, url=url, serve=False) as app:
        run = await shop.buy.start(1)
        await run.cancel()
        drain = Drain()
        worker = asyncio.create_task(app.get(WorkflowEngine).worker.work(drain))
        with pytest.raises(WorkflowFailed, match="cancelled"):
            await run.result(WAIT)
        drain.begin()
        await worker
    assert shop.log == []


async def test_what_does_not_exist_is_said(url):
    """Result, status, cancel and resume of a run that was never started name it."""
    shop = Shop()
    async with workflows(shop.flows, url=url) as app:
        run = shop.buy.handle("nobody")
        for ask in (run.result(WAIT), run.status(), run.cancel(), app.get(WorkflowEngine).resume("nobody")):
            with pytest.raises(RunNotFound, match="there is no run 'nobody'"):
                await ask


async def test_a_result_may_be_waited_for_with_a_limit(url):
    """The limit ends the wait and not the run."""
    shop = Shop()
    gate = asyncio.Event()

    async def wait(n):
        await gate.wait()
        return n

    shop.behave["hold"] = wait
    async with workflows(shop.flows, url=url):
        run = await shop.buy.start(1)
        with pytest.raises(DeadlineExceeded):
            await run.result(0.05)
        assert await run.status() is RunStatus.RUNNING
        gate.set()
        assert await run.result(WAIT) == 3


async def test_a_timeout_of_the_function_itself_leaves_an_unknown_step(url):
    """A step that the workflow function stopped waiting for may have happened: it is undone, after a crash as well."""
    shop, clock = Shop(), VirtualClock()

    async def hang(n):
        await asyncio.sleep(60)

    @shop.flows.workflow(name="impatient")
    async def impatient(n: int) -> int:
        async with timeout(1.0, clock=clock):
            await shop.flows.gather(shop.hold(n), shop.charge(n))
        return n

    shop.behave |= {"hold": hang, "charge": hang}
    async with workflows(shop.flows, url=url) as app:
        run = await impatient.start(1, id="r")
        await eventually(lambda: len(shop.log) == 2, seconds=WAIT)
        await clock.advance(1.0)
        with pytest.raises(WorkflowFailed, match="StepCancelled"):
            await run.result(WAIT)
        history = await app.get(WorkflowEngine).history("r")
        assert {record.state for record in history.records.values()} == {"unknown", "done"}
    assert sorted(shop.log[:2], key=str) == ["charge", "hold"]
    undone = sorted((entry for entry in shop.log[2:] if isinstance(entry, tuple)), key=str)
    unknown = Unknown("StepCancelled: the function did not wait for its end")
    assert undone == [("refund", unknown), ("release", unknown)]


async def test_a_cancellation_that_nobody_asked_for_is_an_error_like_any_other(url):
    """A step, or a function, into which a stray CancelledError leaks does not take the worker with it."""
    shop = Shop()
    shop.behave["hold"] = [asyncio.CancelledError()]

    @shop.flows.workflow(name="stray")
    async def stray(n: int) -> int:
        raise asyncio.CancelledError

    async with workflows(shop.flows, url=url):
        with pytest.raises(WorkflowFailed, match="StepFailed: step hold ended with CancelledError"):
            await (await shop.buy.start(1)).result(WAIT)
        with pytest.raises(WorkflowFailed, match="CancelledError"):
            await (await stray.start(1)).result(WAIT)
        assert await (await shop.buy.start(1)).result(WAIT) == 4


async def test_any_text_can_be_the_reason(url):
    """An error with characters that a database refuses parks the run like any other."""
    shop = Shop()

    @shop.flows.step(harmless=True, on_unknown="park")
    async def odd(n: int) -> int:
        text = "nul \0 and a lone surrogate \ud800"
        raise OSError(text)

    @shop.flows.workflow(name="odd")
    async def being_odd(n: int) -> int:
        return await odd(n)

    async with workflows(shop.flows, url=url):
        with pytest.raises(RunParked, match=r"nul \? and a lone surrogate \?"):
            await (await being_odd.start(1)).result(WAIT)


async def test_an_effect_that_cannot_be_carried_out_fails_like_a_step(url):
    """A bug in an effect is not tried for ever: nothing of it is written, and the run is compensated."""
    shop = Shop()

    async def broken(key):
        msg = "a bug"
        raise LookupError(msg)

    @shop.flows.workflow(name="publish")
    async def publishing(n: int) -> int:
        await shop.hold(n)
        await once("publish", broken, transactional=n == 1)
        return n

    async with workflows(shop.flows, url=url):
        for n in (1, 2):
            with pytest.raises(WorkflowFailed, match="step publish ended with LookupError: a bug"):
                await (await publishing.start(n)).result(WAIT)
    assert shop.log == ["hold", ("release", Done(2)), "hold", ("release", Done(3))]


async def test_a_step_inside_an_open_transaction_parks_the_run(url):
    """A workflow function that holds a transaction open across steps is told where its writes belong."""
    shop = Shop()

    @shop.flows.workflow(name="holding")
    async def holding(n: int) -> int:
        async with app.get(Database).transaction():
            return await shop.hold(n)

    async with workflows(shop.flows, url=url) as app:
        with pytest.raises(RunParked, match="belongs into a transactional step"):
            await (await holding.start(1)).result(WAIT)


async def test_a_workflow_may_be_part_of_another(url):
    """Called inside a run, a workflow is a run of its own, a child, and the parent waits for its result."""
    shop = Shop()

    @shop.flows.workflow(name="outer")
    async def outer(n: int) -> int:
        return await shop.buy(n) + await shop.buy(n)

    async with workflows(shop.flows, url=url) as app:
        assert await (await outer.start(1)).result(WAIT) == 8
        assert len(await app.get(WorkflowEngine).runs()) == 3
    assert shop.log == ["hold", "charge", "ship"] * 2


async def test_trap_15_an_unknown_workflow_waits_visibly(url):
    """A run of a version that no worker knows stays queued, and health says so."""
    shop = Shop()
    async with workflows(shop.flows, url=url) as app:
        engine, db = app.get(WorkflowEngine), app.get(Database)
        run = await shop.buy.start(1, id="old")
        await run.result(WAIT)
        async with db.transaction() as session:
            await session.execute(sa.update(runs).values(status="queued", version=9, output=None))
        async with asyncio.timeout(WAIT):
            while (await engine.health()).status != "degraded":  # noqa: ASYNC110  found by polling, here and there
                await asyncio.sleep(0.01)
        assert (await engine.health()).detail == "no worker knows the workflow of 1 of 'buy' version 9"
        assert await run.status() is RunStatus.QUEUED
        assert (await app.health())["workflow.WorkflowEngine"].status == "degraded"


async def test_trap_9_a_run_that_kills_its_worker_is_parked(url):
    """Every claim counts; when they bring the run no further, it is parked, and the others go on."""
    shop = Shop()
    async with workflows(shop.flows, url=url, serve=False, max_attempts=3) as app:
        db = app.get(Database)
        poison = await shop.buy.start(1, id="poison")
        async with db.transaction() as session:  # three claims, each of which ended with its worker
            await session.execute(sa.update(runs).values(attempts=3))
        healthy = await shop.buy.start(1, id="healthy")
        drain = Drain()
        worker = asyncio.create_task(app.get(WorkflowEngine).worker.work(drain))
        with pytest.raises(RunParked, match="claimed 3 times without getting any further"):
            await poison.result(WAIT)
        assert await healthy.result(WAIT) == 4
        await app.get(WorkflowEngine).resume("poison")
        assert await poison.result(WAIT) == 4
        drain.begin()
        await worker


async def test_lists_for_people(url):
    """Runs are listed by status with what a person needs to know."""
    shop = Shop()
    shop.behave["charge"] = [Declined("no money")]
    async with workflows(shop.flows, url=url) as app:
        engine = app.get(WorkflowEngine)
        with pytest.raises(WorkflowFailed):
            await (await shop.buy.start(1, id="one")).result(WAIT)
        await (await shop.buy.start(2, id="two")).result(WAIT)
        assert {view.id for view in await engine.runs()} == {"one", "two"}
        (failed,) = await engine.runs(RunStatus.FAILED)
        assert failed.failure is not None
        assert failed.failure["type"] == "StepFailed"
        assert (failed.input, failed.workflow, failed.version) == ('{"n":1}', "buy", 1)
        (done,) = await engine.runs(RunStatus.COMPLETED)
        assert done.output == "5"
        assert done.ended_at is not None
        assert timedelta(0) <= done.ended_at - done.created_at < timedelta(minutes=1)
        for status in (RunStatus.QUEUED, RunStatus.RUNNING, RunStatus.COMPENSATING, RunStatus.PARKED):
            assert await engine.runs(status) == []
        assert (await engine.health()).status == "ok"


async def test_a_thousand_runs_at_once(url):
    """Many runs share few commits, and every one ends with its own result."""
    shop = Shop()
    async with workflows(shop.flows, url=url):
        started = await asyncio.gather(*(shop.buy.start(n, id=f"r{n}") for n in range(300)))
        results = await asyncio.gather(*(run.result(60) for run in started))
    assert results == [n + 3 for n in range(300)]
    assert len(shop.log) == 900


async def test_an_app_that_only_starts_lets_others_execute(url, tmp_path):
    """A web process starts and awaits; the worker is another App on the same database."""
    if ":memory:" in url:
        url = f"sqlite+aiosqlite:///{tmp_path / 'shared.db'}"
    shop, there = Shop(), Shop()
    async with workflows(shop.flows, url=url, serve=False) as web, workflows(there.flows, url=url):
        assert isinstance(web, App)
        run = await shop.buy.start(1)
        assert await run.result(WAIT) == 4
    assert (shop.log, there.log) == ([], ["hold", "charge", "ship"])
