"""Plain `def` steps are executed in a bounded pool of threads, in the context of their run."""

import asyncio
import threading
from typing import Any

import pytest

from mainstay.core import Retry, bind, current, given
from mainstay.core.testing import eventually
from mainstay.database import Database
from mainstay.workflow import Done, Failed, Unknown, WorkflowEngine, WorkflowFailed, WorkflowRouter, current_step
from mainstay.workflow.testing import workflows

WAIT = 15.0
ONCE = Retry(attempts=1)


async def test_a_plain_step_is_executed_in_a_thread_with_its_context():
    """The step's key, the run's context and the App's services are there; the loop's thread is another."""
    flows = WorkflowRouter()
    seen: dict[str, Any] = {}

    @flows.step(harmless=True)
    def render(n: int, *, db: Database = given(Database)) -> str:
        seen.update(
            thread=threading.current_thread().name, actor=current().actor, key=current_step().key, db=db.dialect
        )
        return f"page {n}"

    @flows.workflow(name="print")
    async def show(n: int) -> str:
        return await render(n)

    async with workflows(flows):
        with bind(actor="ann"):
            run = await show.start(1, id="r")
        assert await run.result(WAIT) == "page 1"
    assert seen.pop("thread").startswith("mainstay.workflow step")
    assert seen == {"actor": "ann", "key": "r:render:1", "db": "sqlite"}


async def test_plain_compensations_and_probes():
    """They are executed in a thread as well."""
    flows = WorkflowRouter()
    log: list[object] = []

    @flows.step(retry=ONCE, on_unknown="probe")
    def charge(n: int) -> int:
        raise OSError(n)

    @charge.probe
    def asked(n: int) -> Done[int] | Failed | Unknown:
        log.append(threading.current_thread() is threading.main_thread())
        return Done(n + 1)

    @charge.compensation
    def refund(outcome: Done[int] | Unknown, n: int) -> None:
        log.extend([threading.current_thread() is threading.main_thread(), outcome])

    @flows.step(harmless=True, retry=ONCE)
    def fail(n: int) -> None:
        raise LookupError(n)

    @flows.workflow(name="buy")
    async def buy(n: int) -> None:
        await fail(await charge(n))

    async with workflows(flows) as app:
        with pytest.raises(WorkflowFailed, match="step fail ended with LookupError"):
            await app.get(WorkflowEngine).execute(buy, 1)
    assert log == [False, False, Done(2)]


@pytest.mark.parametrize("error", [StopIteration("end"), SystemExit(3), ValueError("no")], ids=repr)
async def test_whatever_a_thread_raises_ends_the_attempt(error):
    """Also what no future can carry."""
    flows = WorkflowRouter()

    @flows.step(harmless=True, retry=ONCE)
    def fail(n: int) -> None:
        raise error

    @flows.workflow(name="buy")
    async def buy(n: int) -> None:
        await fail(n)

    async with workflows(flows) as app:
        with pytest.raises(WorkflowFailed, match="step fail ended with"):
            await asyncio.wait_for(app.get(WorkflowEngine).execute(buy, 1), WAIT)


async def test_at_most_max_threads_at_once_and_the_loop_goes_on():
    """The others wait for a thread."""
    flows = WorkflowRouter()
    go, lock, counts = threading.Event(), threading.Lock(), {"now": 0, "most": 0}

    @flows.step(harmless=True)
    def block(n: int) -> int:
        with lock:
            counts["now"] += 1
            counts["most"] = max(counts["most"], counts["now"])
        assert go.wait(WAIT)
        with lock:
            counts["now"] -= 1
        return n

    @flows.workflow(name="block")
    async def run_it(n: int) -> int:
        return await block(n)

    async with workflows(flows, max_threads=2):
        handles = [await run_it.start(n) for n in range(5)]
        try:
            await eventually(lambda: counts["now"] == 2)
        finally:
            go.set()
        assert [await handle.result(WAIT) for handle in handles] == [0, 1, 2, 3, 4]
    assert counts == {"now": 0, "most": 2}


async def test_a_time_limit_ends_the_attempt_and_not_the_thread():
    """The step is unknown, as of a call whose answer nobody saw, and its thread runs on."""
    flows = WorkflowRouter()
    go, ended, undone = threading.Event(), threading.Event(), list[object]()

    @flows.step(retry=ONCE, timeout_seconds=0.05)
    def block(n: int) -> None:
        assert go.wait(WAIT)
        ended.set()

    @block.compensation
    async def unblock(outcome: Done[None] | Unknown, n: int) -> None:
        undone.append(type(outcome))

    @flows.workflow(name="block")
    async def run_it(n: int) -> None:
        await block(n)

    async with workflows(flows) as app:
        try:
            with pytest.raises(WorkflowFailed, match="DeadlineExceeded"):
                await app.get(WorkflowEngine).execute(run_it, 1)
            assert not ended.is_set()
        finally:
            go.set()
        await eventually(ended.is_set)
    assert undone == [Unknown]


def test_a_transactional_step_and_its_compensation_are_async():
    """The transaction belongs to the event loop's thread."""
    flows = WorkflowRouter()

    def plain(n: int) -> None: ...

    with pytest.raises(TypeError, match="plain must be an `async def` function: a plain one is executed in a thread"):
        flows.step(transactional=True, harmless=True)(plain)
    assert flows.steps == {}

    @flows.step(transactional=True)
    async def write(n: int) -> None: ...

    def undo(outcome: Done[None] | Unknown, n: int) -> None: ...

    with pytest.raises(TypeError, match="undo must be an `async def` function"):
        write.compensation(undo)


def test_a_generator_is_no_step():
    """Neither executed at once nor awaited, it would do nothing."""

    def generate(n: int) -> Any:
        yield n

    with pytest.raises(TypeError, match="step generate must be an `async def` or a `def` function"):
        WorkflowRouter().step(harmless=True)(generate)
