"""What the code of steps and functions raises is told of them, and decides nothing about who executes the run."""

import asyncio
from collections.abc import Callable
from datetime import date, datetime
from typing import Any

import pytest
import sqlalchemy as sa

from mainstay.core import FullJitter, MainstayError, Retry, once
from mainstay.core.testing import eventually
from mainstay.database import Database, Fence, FenceLost
from mainstay.workflow import (
    Done,
    Failed,
    RunParked,
    RunStateError,
    RunStatus,
    StepCancelled,
    StepFailed,
    Unknown,
    WorkflowEngine,
    WorkflowFailed,
    WorkflowRouter,
)
from mainstay.workflow.errors import (
    CancelRequested,
    CompensationExhausted,
    Continued,
    Ended,
    Lost,
    Parked,
    Released,
    Suspended,
)
from mainstay.workflow.tables import runs
from mainstay.workflow.testing import workflows

WAIT = 60.0
QUICK = Retry(2, FullJitter(0.001), retry=lambda state: state.outcome.exception() is not None)

Make = Callable[[], BaseException]


def named(name: str) -> Make:
    """An exception of the service's own with the name of one of ours."""
    return type(name, (Exception,), {})


RAISED: dict[str, Make] = {
    "Lost": Lost,
    "Released": Released,
    "Suspended": lambda: Suspended(1e9),
    "CancelRequested": CancelRequested,
    "Continued": lambda: Continued("w", 1, "{}"),
    "Ended": Ended,
    "Parked": lambda: Parked("by hand"),
    "CompensationExhausted": lambda: CompensationExhausted("by hand"),
    "GeneratorExit": GeneratorExit,
    "FenceLost": lambda: FenceLost("of a fence of the step's own"),
    "Cancelled": named("Cancelled"),
    "StepCancelled": named("StepCancelled"),
    "Terminated": named("Terminated"),
    "SystemExit": lambda: SystemExit(3),
}


class Service:
    """A workflow for each place at which code of others is executed."""

    def __init__(self, make: Make) -> None:
        self.calls: list[str] = []
        self.flows = flows = WorkflowRouter()

        def fail(where: str) -> None:
            self.calls.append(where)
            raise make()

        @flows.step(retry=QUICK)
        async def plain(n: int) -> int:
            fail("step")
            return n

        @flows.step(retry=QUICK)
        def threaded(n: int) -> int:
            fail("step")
            return n

        @flows.step(transactional=True, retry=QUICK)
        async def transactional(n: int) -> int:
            fail("step")
            return n

        @flows.step(cancellable=True, retry=QUICK)
        async def cancellable(n: int) -> int:
            fail("step")
            return n

        @flows.step(on_unknown="probe", harmless=True, retry=QUICK)
        async def probed(n: int) -> int:
            self.calls.append("step")
            raise OSError

        @probed.probe
        async def ask(n: int) -> Done[int] | Failed | Unknown:
            if self.calls.count("probe"):
                return Done(n)
            fail("probe")
            return Failed()

        for step in (plain, threaded, transactional, cancellable):

            @step.compensation
            async def undo(outcome: Done[int] | Unknown, n: int) -> None:
                self.calls.append("undo")

        @flows.step(compensation_retry=QUICK)
        async def good(n: int) -> int:
            return n

        @good.compensation
        async def fails_once(outcome: Done[int] | Unknown, n: int) -> None:
            if not self.calls.count("undo"):
                fail("undo")

        async def effect(_key: str | None) -> None:
            fail("effect")

        async def branch() -> int:
            fail("branch")
            return 1

        async def raises(_n: int) -> int:
            fail("function")
            return 1

        async def by_once(_n: int) -> int:
            await once("effect", effect, transactional=False)
            return 1

        async def by_entry(_n: int) -> int:
            await once("effect", effect, transactional=True)
            return 1

        async def gathers(_n: int) -> int:
            return sum(await flows.gather(branch(), good(1)))

        async def goes_back(_n: int) -> int:
            await good(1)
            raise LookupError

        self.acts: dict[str, Callable[[int], Any]] = {
            "step": plain, "thread": threaded, "transactional": transactional, "cancellable": cancellable,
            "function": raises, "branch": gathers, "once": by_once, "entry": by_entry,
            "compensation": goes_back, "probe": probed,
        }  # fmt: skip

        @flows.workflow(name="w")
        async def act(place: str) -> int:
            return int(await self.acts[place](1))

        self.act = act


@pytest.mark.parametrize("make", RAISED.values(), ids=RAISED)
async def test_what_code_raises_decides_nothing_about_the_run(make: Make) -> None:
    """Wherever it is raised: it is an error like any other, attempted again, recorded by its name, and undone."""
    service = Service(make)
    name = type(make()).__name__
    async with workflows(service.flows) as app:
        for place in service.acts:
            service.calls.clear()
            run = await service.act.start(place, id=f"in-{place}")
            if place == "probe":
                assert await run.result(WAIT) == 1
                continue
            with pytest.raises(WorkflowFailed) as failed:
                await run.result(WAIT)
            assert await run.status() is RunStatus.FAILED, place
            view = await app.get(WorkflowEngine).run(run.id)
            assert view.attempts == 1, f"{place}: it was claimed again"
            if place == "compensation":
                assert service.calls == ["undo"]
                continue
            assert failed.value.error_type in {name, "StepFailed", "NoException"}, place
            assert name in str(failed.value) or "NoException" in str(failed.value), place
            if place in {"step", "thread", "transactional", "cancellable"}:
                undone = [] if place == "transactional" else ["undo"]
                assert service.calls == ["step", "step", *undone], place


async def test_a_function_is_told_what_a_step_raised() -> None:
    """A step's own error of the name of one of ours is no end of a wait by the function."""
    service = Service(named("StepCancelled"))
    seen: list[StepFailed] = []

    @service.flows.workflow(name="looks")
    async def looks() -> int:
        try:
            return int(await service.acts["step"](1))
        except StepFailed as error:
            seen.append(error)
            raise

    async with workflows(service.flows):
        with pytest.raises(WorkflowFailed):
            await (await looks.start()).result(WAIT)
    assert not isinstance(seen[0], StepCancelled)
    assert (seen[0].error_type, seen[0].outcome) == ("StepCancelled", "unknown")


async def test_the_fence_of_a_lease_of_the_steps_own_is_its_own_error(url: str) -> None:
    """A transactional step that writes under a lease of its own, and has lost that, has lost no run."""
    flows = WorkflowRouter()
    fences: list[tuple[Database, Fence]] = []
    raised: list[str] = []

    @flows.step(transactional=True, harmless=True, failed_on=(FenceLost,))
    async def write(n: int) -> int:
        ((database, fence),) = fences
        try:
            await database.write(sa.delete(runs).where(runs.c.id == "none"), {}, fence=fence)
        except FenceLost:
            raised.append("FenceLost")
            raise
        return n

    @flows.workflow(name="w")
    async def w(n: int) -> int:
        return await write(n)

    async with workflows(flows, url=url) as app:
        database = app.get(Database)
        lease = await database.lease("own", seconds=60)
        assert lease is not None
        await lease.release()
        fences.append((database, lease.fence))
        other = await database.lease("own", seconds=60)
        assert other is not None
        run = await w.start(1)
        with pytest.raises(WorkflowFailed, match=r"FenceLost.*nothing happened"):
            await run.result(WAIT)
        assert (await app.get(WorkflowEngine).run(run.id)).attempts == 1
    assert raised == ["FenceLost"]


async def test_a_step_that_cancels_its_own_task_ends_no_run() -> None:
    """Neither now nor later: what follows is executed, and the run can be stopped and cancelled as before."""
    flows = WorkflowRouter()
    began, go = asyncio.Event(), asyncio.Event()

    @flows.step(harmless=True, retry=QUICK)
    async def cancels(n: int) -> int:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)
        return n

    @flows.step(harmless=True)
    async def holds(n: int) -> int:
        began.set()
        await go.wait()
        return n

    @flows.workflow(name="w")
    async def w(n: int) -> str:
        try:
            await cancels(n)
        except StepFailed as error:
            return f"{error.error_type} {await holds(n)}"
        return "not cancelled"

    async with workflows(flows) as app:
        run = await w.start(1, id="r")
        await asyncio.wait_for(began.wait(), WAIT)
        go.set()
        assert await run.result(WAIT) == "StepCancelled 1"
        assert (await app.get(WorkflowEngine).run("r")).attempts == 1


@pytest.mark.parametrize("decision", ["terminate", "terminate the parent", "cancel in a pivot"])
async def test_a_transactional_step_cannot_decide_against_its_own_commit(url: str, decision: str) -> None:
    """It is refused by name where it is called, at once; in a step that is not transactional it is carried out."""
    flows = WorkflowRouter()
    engines: list[WorkflowEngine] = []
    said: list[str] = []

    async def decide(run_id: str) -> None:
        try:
            if "terminate" in decision:
                await engines[0].terminate(run_id, reason="it is enough")
            else:
                await engines[0].cancel(run_id)
        except RunStateError as error:
            said.append(str(error))
            raise

    @flows.step(transactional=True, harmless=True, retry=Retry(1))
    async def within(run_id: str) -> None:
        await decide(run_id)

    @flows.step(transactional=True, pivot=True, retry=Retry(1))
    async def pivot(run_id: str) -> None:
        await decide(run_id)

    @flows.step(harmless=True, retry=Retry(1))
    async def outside(run_id: str) -> None:
        await decide(run_id)

    @flows.workflow(name="inner")
    async def inner(run_id: str) -> str:
        for step in (pivot if "pivot" in decision else within, outside):  # after the second one it is stopped
            with pytest.raises(StepFailed, match=r"RunStateError.*nothing happened"):
                await step(run_id)
        return "went on"

    @flows.workflow(name="outer")
    async def outer() -> str:
        return await inner("parent")

    async with workflows(flows, url=url) as app:
        engines.append(app.get(WorkflowEngine))
        run = await (outer.start(id="parent") if "parent" in decision else inner.start("r", id="r"))
        ended = RunStatus.CANCELLED if "pivot" in decision else RunStatus.TERMINATED

        async def has_ended() -> bool:
            return await run.status() is ended

        await eventually(has_ended, seconds=WAIT)
        assert (await engines[0].run(run.id)).attempts == 1
    (why,) = said
    assert "decide it in a step that is not transactional" in why


SECONDS: list[tuple[Any, type[Exception], str]] = [
    (-1, ValueError, "seconds=-1: a finite number of seconds, 0 or more"),
    (float("nan"), ValueError, "seconds=nan: a finite number"),
    (float("inf"), ValueError, "seconds=inf: a finite number"),
    (10**400, ValueError, "seconds is too large: a finite number"),
    (10**5_000, ValueError, "seconds is too large: a finite number"),
    ("5", TypeError, "seconds is a number of seconds, an int or a float, and not str"),
    (True, TypeError, "and not bool"),
    (None, TypeError, "and not NoneType"),
]


IDS = ["negative", "nan", "inf", "too large", "far too large", "text", "bool", "None"]


@pytest.mark.parametrize(("seconds", "kind", "message"), SECONDS, ids=IDS)
async def test_a_length_of_time_that_is_none_is_refused_where_it_is_given(
    seconds: Any, kind: type[Exception], message: str
) -> None:
    """In a workflow function it fails the run by that name; a limit is refused where it is declared."""
    flows = WorkflowRouter()
    told = flows.signal("told", str)
    approval = flows.approval("approval", str, may_decide=lambda _asked, _actor: True)
    limit = 5.0 if seconds is None else seconds

    @flows.workflow(name="w")
    async def w(which: str) -> str:
        try:
            if which == "sleep":
                await flows.sleep(seconds)
            elif which == "wait":
                await told.wait(limit)
            else:
                await approval.ask("?", **{which: limit})
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "waited"

    async with workflows(flows) as app:
        places = ["sleep"] if seconds is None else ["sleep", "wait", "timeout_seconds", "escalate_after_seconds"]
        for which in places:
            run = await w.start(which)
            said = await run.result(WAIT)
            assert said.startswith(f"{kind.__name__}: ")
            assert message in said
        if seconds is not None:
            with pytest.raises(kind, match="seconds"):
                flows.step(timeout_seconds=seconds)
            with pytest.raises(kind, match="seconds"):
                flows.workflow(name="x", timeout_seconds=seconds)
            with pytest.raises(kind, match="seconds"):
                await app.get(WorkflowEngine).start_by_name("y", version=1, timeout_seconds=seconds)


async def test_a_moment_that_is_none_is_refused_where_it_is_given() -> None:
    """A text, a date and a datetime without a time zone are no moment."""
    flows = WorkflowRouter()
    for wrong, kind in (("2026-01-01", TypeError), (date(2026, 1, 1), TypeError), (datetime(2026, 1, 1), ValueError)):  # noqa: DTZ001  what is refused
        with pytest.raises(kind, match=r"sleep_until.* time zone"):
            await flows.sleep_until(wrong)  # type: ignore[arg-type]  # what a caller may give


def nested() -> BaseException:
    """A group that is deeper than Python's stack."""
    group: ExceptionGroup[Exception] = ExceptionGroup("innermost", [OSError()])
    for _ in range(3_000):
        group = ExceptionGroup("in another", [group])
    return group


class NoAnswer(BaseException):
    """What a policy may raise."""


def no_answer(_state: Any) -> Any:
    """Say nothing about an attempt."""
    raise NoAnswer


ANSWERS: dict[str, Any] = {
    "raises": no_answer,
    "text": lambda _state: "soon",
    "too large": lambda _state: 10**400,
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
async def test_a_retry_policy_that_breaks_parks_the_run(answer: Any) -> None:
    """At once, by the step's name, on the way back as well; mended, the run goes on from there."""
    flows, broken, calls = WorkflowRouter(), [True], list[str]()

    def wait(state: Any) -> float:
        waited: float = answer(state) if broken else 0.001
        return waited

    policy = Retry(4, wait, retry=QUICK.retry)

    @flows.step(retry=policy)
    async def act(n: int) -> int:
        calls.append("act")
        if n and calls.count("act") < 3:
            raise nested()
        return n

    @act.compensation
    async def undo_act(outcome: Done[int] | Unknown, n: int) -> None:
        calls.append("undo act")

    @flows.step(compensation_retry=policy)
    async def good(n: int) -> int:
        return n

    @good.compensation
    async def undo(outcome: Done[int] | Unknown, n: int) -> None:
        calls.append("undo")
        if calls.count("undo") < 2:
            raise OSError

    @flows.workflow(name="w")
    async def w(n: int) -> int:
        await good(n)
        await act(n)
        raise LookupError

    async with workflows(flows) as app:
        engine = app.get(WorkflowEngine)
        for n, key in ((1, "act:1"), (0, "good:1:compensation")):
            calls.clear()
            broken[:] = [True]
            run = await w.start(n)
            with pytest.raises(RunParked, match=f"the retry policy of {key} could not say how to go on"):
                await run.result(WAIT)
            assert (await engine.run(run.id)).attempts == 1
            broken.clear()
            await engine.resume(run.id)
            with pytest.raises(WorkflowFailed, match="LookupError"):
                await run.result(WAIT)
            assert calls == [*["act"] * (3 if n else 1), "undo act", "undo", "undo"]


class Speechless(MainstayError):
    """An error whose own code fails, as one may that reads headers that are not there."""

    def __init__(self, answer: Any) -> None:
        super().__init__("speechless")
        self.answer = answer

    def __getattribute__(self, name: str) -> Any:
        if name not in {"no_effect", "retry_after_seconds", "code", "public_message"}:
            return super().__getattribute__(name)
        if isinstance(self.answer, type):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    "answer", [KeyError, SystemExit, 10**400, "soon", float("nan"), b"", -1], ids=lambda one: str(one)[:9]
)
async def test_an_error_that_cannot_speak_of_itself(answer: Any) -> None:
    """It is unknown what happened; where its own code fails, the retry policy cannot say how to go on either."""
    flows, calls = WorkflowRouter(), list[str]()
    breaks = isinstance(answer, type | int) and answer != -1

    @flows.step(one_call=True, retry=QUICK)
    async def act(n: int) -> int:
        calls.append("act")
        raise Speechless(answer)

    @act.compensation
    async def undo(outcome: Done[int] | Unknown, n: int) -> None:
        calls.append(type(outcome).__name__)

    @flows.workflow(name="w")
    async def w(n: int) -> int:
        return await act(n)

    async with workflows(flows) as app:
        run = await w.start(1)
        if breaks:
            with pytest.raises(RunParked, match="the retry policy of act:1 could not say how to go on"):
                await run.result(WAIT)
            await run.cancel()
            with pytest.raises(WorkflowFailed, match="cancelled"):
                await run.result(WAIT)
        else:
            with pytest.raises(WorkflowFailed, match=r"Speechless: speechless \(it may have happened\)"):
                await run.result(WAIT)
        assert (await app.get(WorkflowEngine).run(run.id)).attempts == 1
    assert calls == [*["act"] * (1 if breaks else 2), "Unknown"]
