"""What a step may be told, and what becomes of its attempts; on every database."""

import asyncio
from collections import defaultdict

import pytest
import sqlalchemy as sa

from mainstay.core import (
    FullJitter,
    Retry,
    bind,
    current,
    once,
    remaining_seconds,
    timeout,
)
from mainstay.database import Database
from mainstay.workflow import (
    Done,
    Failed,
    NotInRun,
    RunParked,
    RunStatus,
    Unknown,
    WorkflowEngine,
    WorkflowFailed,
    WorkflowRouter,
    current_compensation,
    current_step,
)
from mainstay.workflow.tables import history
from mainstay.workflow.testing import workflows

QUICK = FullJitter(0.001, 0.002)
WAIT = 15.0


async def test_a_step_has_a_time_limit(url):
    """A hanging step is cut off, is unknown, and is attempted again with the same key."""
    flows = WorkflowRouter()
    keys: list[tuple[str, int]] = []
    undone: list[object] = []

    @flows.step(retry=Retry(attempts=2, wait=QUICK), timeout_seconds=0.05)
    async def charge(n: int) -> int:
        keys.append((current_step().key, current_step().attempt))
        await asyncio.sleep(60)
        return n

    @charge.compensation
    async def refund(outcome: Done[int] | Unknown, n: int) -> None:
        undone.append((outcome, current_step().undoes, current_step().key))

    @flows.workflow(name="buy")
    async def buy(n: int) -> int:
        return await charge(n)

    async with workflows(flows, url=url):
        with pytest.raises(WorkflowFailed, match="DeadlineExceeded"):
            await (await buy.start(1, id="r")).result(WAIT)
    assert keys == [("r:charge:1", 1), ("r:charge:1", 2)]
    assert undone == [(Unknown("DeadlineExceeded: no result within 0.05 s"), "r:charge:1", "r:charge:1:compensation")]


async def test_a_retry_may_look_at_results(url):
    """`Retry(retry=…)` over results asks again until the result is good enough."""
    flows = WorkflowRouter()
    answers = [0, 0, 7]

    @flows.step(harmless=True, retry=Retry(5, QUICK, retry=lambda state: state.outcome.result() == 0))
    async def ask(n: int) -> int:
        return answers.pop(0)

    @flows.workflow(name="buy")
    async def buy(n: int) -> int:
        return await ask(n)

    async with workflows(flows, url=url):
        assert await (await buy.start(1)).result(WAIT) == 7
    assert answers == []


@pytest.mark.parametrize("circular", [False, True])
async def test_an_error_of_the_function_after_a_pivot_parks_it(url, circular):
    """A bug behind the pivot does not undo anything either; the repaired function goes on."""
    flows = WorkflowRouter()
    broken = [True]

    @flows.step(on_unknown="park", pivot=True)
    async def commit(n: int) -> int:
        return n

    @flows.workflow(name="pivot")
    async def pivoting(n: int) -> int:
        await commit(n)
        if broken:
            bug = LookupError("a bug")
            raise bug from (bug if circular else None)
        return n

    async with workflows(flows, url=url) as app:
        run = await pivoting.start(1, id="one")
        with pytest.raises(RunParked, match=r"failed after its pivot.*a bug"):
            await run.result(WAIT)
        broken.clear()
        await app.get(WorkflowEngine).resume("one")
        assert await run.result(WAIT) == 1


async def test_a_step_that_failed_in_a_group_behind_a_pivot_is_attempted_again(url):
    """A resume finds it among the errors of the group."""
    flows = WorkflowRouter()
    broken = [True]

    @flows.step(on_unknown="park", pivot=True)
    async def commit() -> None: ...

    @flows.step(after_pivot=True, retry=Retry(attempts=1))
    async def tell() -> str:
        if broken:
            raise OSError
        return "told"

    @flows.workflow(name="pivot")
    async def pivoting() -> str:
        await commit()
        async with asyncio.TaskGroup() as group:
            telling = group.create_task(tell())
        return telling.result()

    async with workflows(flows, url=url) as app:
        run = await pivoting.start(id="one")
        with pytest.raises(RunParked, match="failed after its pivot"):
            await run.result(WAIT)
        broken.clear()
        await app.get(WorkflowEngine).resume("one")
        assert await run.result(WAIT) == "told"


async def test_an_attempt_gets_what_is_on_record(url):
    """What the code of another attempt, or of a probe, did to its arguments and to the outcome is not seen."""
    flows = WorkflowRouter()
    seen: dict[str, list[list[int]]] = defaultdict(list)

    def use_up(what: str, amounts: list[int]) -> None:
        seen[what].append(list(amounts))
        amounts.clear()
        if len(seen[what]) == 1:
            raise OSError

    @flows.step(retry=Retry(attempts=2, wait=QUICK), on_unknown="probe")
    async def charge(amounts: list[int]) -> list[int]:
        use_up("step", amounts)
        return [3]

    @charge.probe
    async def was_charged(amounts: list[int]) -> Done[list[int]] | Failed | Unknown:
        use_up("probe", amounts)
        return Failed()

    @charge.compensation
    async def refund(outcome: Done[list[int]] | Unknown, amounts: list[int]) -> None:
        assert isinstance(outcome, Done)
        amounts += outcome.result
        outcome.result.clear()
        use_up("compensation", amounts)

    @flows.step(retry=Retry(attempts=2, wait=QUICK), transactional=True, harmless=True)
    async def book(amounts: list[int]) -> None:
        use_up("transactional", amounts)

    @flows.workflow(name="sell")
    async def sell(amounts: list[int]) -> None:
        await charge(amounts)
        await book(amounts)
        raise LookupError

    async with workflows(flows, url=url):
        run = await sell.start([1, 2], id="one")
        with pytest.raises(WorkflowFailed, match="LookupError"):
            await run.result(WAIT)
    given = [[1, 2], [1, 2]]
    assert seen == {"step": given, "probe": given, "transactional": given, "compensation": [[1, 2, 3], [1, 2, 3]]}


async def test_on_unknown_park_waits_for_a_person(url):
    """Nobody attempts the step again on his own; resume does, with the same key; cancel compensates."""
    flows = WorkflowRouter()
    keys: list[str] = []
    undone: list[object] = []
    fine: list[bool] = []

    @flows.step(on_unknown="park", retry=Retry(attempts=5, wait=QUICK))
    async def charge(n: int) -> int:
        keys.append(current_step().key)
        if not fine:
            msg = "lost"
            raise OSError(msg)
        return n

    @charge.compensation
    async def refund(outcome: Done[int] | Unknown, n: int) -> None:
        undone.append(outcome)

    @flows.workflow(name="buy")
    async def buy(n: int) -> int:
        return await charge(n)

    async with workflows(flows, url=url) as app:
        one, two = await buy.start(1, id="one"), await buy.start(1, id="two")
        for run in (one, two):
            with pytest.raises(RunParked, match=r"it is unknown whether charge:1 took effect \(OSError: lost\)"):
                await run.result(WAIT)
        assert sorted(keys) == ["one:charge:1", "two:charge:1"]
        fine.append(True)
        await app.get(WorkflowEngine).resume("one")
        assert await one.result(WAIT) == 1
        await two.cancel()
        with pytest.raises(WorkflowFailed, match="two cancelled"):
            await two.result(WAIT)
        assert await two.status() is RunStatus.CANCELLED
    assert sorted(keys) == ["one:charge:1", "one:charge:1", "two:charge:1"]
    assert len(undone) == 1
    assert isinstance(undone[0], Unknown)


@pytest.mark.parametrize("answer", ["done", "failed", "unknown"])
async def test_on_unknown_probe_asks_first(url, answer):
    """Done is taken as the result, failed allows another attempt, and an unknown answer parks the run."""
    flows = WorkflowRouter()
    log: list[str] = []

    @flows.step(harmless=True, on_unknown="probe", retry=Retry(attempts=3, wait=QUICK))
    async def charge(n: int) -> int:
        log.append("charge")
        if log.count("charge") == 1:
            msg = "lost"
            raise OSError(msg)
        return n

    @charge.probe
    async def ask(n: int) -> Done[int] | Failed | Unknown:
        log.append("ask")
        if log.count("ask") == 1:
            msg = "lost, too"
            raise OSError(msg)
        outcomes: dict[str, Done[int] | Failed | Unknown] = {
            "done": Done(77),
            "failed": Failed(),
            "unknown": Unknown("no idea"),
        }
        return outcomes[answer]

    @flows.workflow(name="buy")
    async def buy(n: int) -> int:
        return await charge(n)

    async with workflows(flows, url=url):
        run = await buy.start(1)
        if answer == "unknown":
            with pytest.raises(RunParked, match="its probe does not know either: no idea"):
                await run.result(WAIT)
            assert log == ["charge", *["ask"] * 5]
        else:
            assert await run.result(WAIT) == (77 if answer == "done" else 1)
            assert log == ["charge", "ask", "ask", *(["charge"] if answer == "failed" else [])]


async def test_branches_run_side_by_side_with_numbers_of_their_own(url):
    """Steps of two branches overlap, and each branch's keys say where it is."""
    flows = WorkflowRouter()
    keys: set[str] = set()
    together = asyncio.Barrier(3)

    @flows.step(harmless=True)
    async def part(n: int) -> int:
        keys.add(current_step().key)
        if n < 10:
            await together.wait()
        return n + 10

    async def two(n: int) -> int:
        return await part(await part(n))

    @flows.workflow(name="split")
    async def split(n: int) -> tuple[int, int, int]:
        result = await flows.gather(two(1), part(2), part(3))
        await flows.gather(part(10), part(11))
        return result

    async with workflows(flows, url=url):
        assert await (await split.start(1, id="r")).result(WAIT) == (21, 12, 13)
    assert keys == {
        "r:0.0/part:1",
        "r:0.0/part:2",
        "r:0.1/part:1",
        "r:0.2/part:1",
        "r:1.0/part:1",
        "r:1.1/part:1",
    }


async def test_a_cancellation_ends_a_wait_between_attempts(url):
    """A run that waits for its next attempt in an hour is cancelled now."""
    flows = WorkflowRouter()
    tried = asyncio.Event()
    undone: list[object] = []

    @flows.step(retry=Retry(attempts=5, wait=lambda _state: 3600.0))
    async def charge(n: int) -> int:
        tried.set()
        msg = "lost"
        raise OSError(msg)

    @charge.compensation
    async def refund(outcome: Done[int] | Unknown, n: int) -> None:
        undone.append(outcome)

    @flows.workflow(name="buy")
    async def buy(n: int) -> int:
        return await charge(n)

    async with workflows(flows, url=url):
        run = await buy.start(1)
        await tried.wait()
        await run.cancel()
        with pytest.raises(WorkflowFailed, match="cancelled"):
            await run.result(WAIT)
    assert undone == [Unknown("OSError: lost")]


async def test_the_starters_context_goes_along(url):
    """Correlation, actor and tenant are the starter's, the cause is the run, and there is no deadline."""
    flows = WorkflowRouter()
    seen: list[object] = []

    @flows.step(harmless=True)
    async def look(n: int) -> int:
        context = current()
        seen.append((context.correlation_id, context.actor, context.tenant, context.causation_id, remaining_seconds()))
        return n

    @flows.workflow(name="look")
    async def looking(n: int) -> int:
        return await look(n)

    async with workflows(flows, url=url):
        with bind(correlation_id="c-1", actor="ann", tenant="acme", causation_id="request"):
            async with timeout(5):
                run = await looking.start(1, id="r")
        await run.result(WAIT)
    assert seen == [("c-1", "ann", "acme", "r", None)]


async def test_effects_of_other_packages_are_recorded(url):
    """`core.once` inside a run happens once with a key of the run; inside a step's code it simply runs."""
    flows = WorkflowRouter()
    seen: list[object] = []
    other = sa.Table("other", sa.MetaData(), sa.Column("id", sa.String(100), primary_key=True))
    insert = sa.insert(other).values(id=sa.bindparam("id"))

    async def plain(key):
        seen.append(key)

    @flows.step(harmless=True)
    async def inner(n: int) -> int:
        await once("publish", plain, transactional=False)
        return n

    @flows.workflow(name="publish")
    async def publishing(n: int) -> int:
        async def written(key):
            await app.get(Database).write(insert, {"id": key})

        await once("publish:a/b", plain, transactional=False)
        await once("publish:a/b", written, transactional=True)
        await once("publish:a/b", written, transactional=True)
        return await inner(n)

    async with workflows(flows, url=url) as app:
        async with app.get(Database).engine.begin() as connection:
            await connection.run_sync(other.metadata.create_all)
        assert await (await publishing.start(1, id="r")).result(WAIT) == 1
        rows = await app.get(Database).read(sa.select(other.c.id).order_by(other.c.id))
        assert [row.id for row in rows] == ["r:@publish:a_b:2", "r:@publish:a_b:3"]
        entries = await app.get(Database).read(sa.select(history.c.step, history.c.kind).order_by(history.c.seq))
        assert [tuple(entry) for entry in entries] == [
            ("@publish:a_b:1", "intent"),
            ("@publish:a_b:1", "done"),
            ("@publish:a_b:2", "done"),
            ("@publish:a_b:3", "done"),
            ("inner:1", "intent"),
            ("inner:1", "done"),
        ]
    assert seen == ["r:@publish:a_b:1", None]


async def test_trap_4_a_transactional_step_shares_its_commit(url):
    """What the step writes and its record are there together, or neither; failed attempts leave nothing."""
    flows = WorkflowRouter()
    stock = sa.Table("stock", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), sa.Column("n", sa.Integer))
    failures = [LookupError("first"), LookupError("second")]

    @flows.step(transactional=True, retry=Retry(attempts=3, wait=QUICK))
    async def take(n: int) -> int:
        async with app.get(Database).transaction() as session:
            await session.execute(sa.update(stock).values(n=stock.c.n - n))
        if failures:
            raise failures.pop()
        return n

    @take.compensation
    async def put_back(outcome: Done[int] | Unknown, n: int) -> None:
        assert outcome == Done(n)
        async with app.get(Database).transaction() as session:
            await session.execute(sa.update(stock).values(n=stock.c.n + n))

    @flows.workflow(name="take")
    async def taking(n: int) -> int:
        await take(n)
        if n == 3:
            msg = "sold out"
            raise LookupError(msg)
        return n

    async with workflows(flows, url=url) as app:
        db = app.get(Database)
        async with db.engine.begin() as connection:
            await connection.run_sync(stock.metadata.create_all)
            await connection.execute(sa.insert(stock).values(id=1, n=10))
        assert await (await taking.start(2, id="r")).result(WAIT) == 2
        assert (await db.read(sa.select(stock.c.n)))[0].n == 8
        with pytest.raises(WorkflowFailed, match="sold out"):
            await (await taking.start(3)).result(WAIT)
        assert (await db.read(sa.select(stock.c.n)))[0].n == 8
        kinds = await db.read(sa.select(history.c.kind).where(history.c.run_id == "r").order_by(history.c.seq))
        assert [row.kind for row in kinds] == ["attempt", "attempt", "done"]


async def test_what_cannot_be_kept_parks_the_run(url):
    """A result or an input that is not of its type is a bug, not a reason to undo anything."""
    flows = WorkflowRouter()

    @flows.step(harmless=True)
    async def wrong_result(n: int) -> int:
        return "text"  # type: ignore[return-value]  # what the test is about

    @flows.step(harmless=True)
    async def fine(n: int) -> int:
        return n

    @flows.workflow(name="bug")
    async def bug(n: int) -> int:
        if n == 1:
            return await wrong_result(n)
        if n == 2:
            return await fine("text")  # type: ignore[arg-type]  # what the test is about
        return "text"  # type: ignore[return-value]  # what the test is about

    async with workflows(flows, url=url):
        for n, what in enumerate(
            ["step wrong_result: its result", "step fine: its arguments", "workflow bug: its result"], 1
        ):
            with pytest.raises(RunParked, match=what):
                await (await bug.start(n)).result(WAIT)


async def test_more_runs_than_a_worker_takes_wait_in_the_queue(url):
    """With room for three runs at once, thirty go through all the same, never more than three together."""
    flows = WorkflowRouter()
    now, most = 0, 0

    @flows.step(harmless=True)
    async def busy(n: int) -> int:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.002)
        now -= 1
        return n

    @flows.workflow(name="busy")
    async def being_busy(n: int) -> int:
        return await busy(n)

    async with workflows(flows, url=url, max_runs=3):
        started = [await being_busy.start(n) for n in range(30)]
        assert [await run.result(WAIT) for run in started] == list(range(30))
    assert most <= 3


async def test_prototype_9_unrecorded_steps_are_bounded(url):
    """No step begins while two results are unrecorded, whatever the number of runs; five are executed at once."""
    flows, full = WorkflowRouter(), asyncio.Event()
    now, most = 0, 0
    before: list[int] = []

    @flows.step(harmless=True)
    async def busy(n: int) -> int:
        nonlocal now, most
        before.append(unrecorded.taken)
        now += 1
        most = max(most, now)
        if now == 5:
            full.set()
        await full.wait()
        await asyncio.sleep(0.001)  # others, if there is place for them, come in
        now -= 1
        return n

    @flows.workflow(name="busy")
    async def being_busy(n: int) -> int:
        await flows.gather(busy(n), busy(n))
        return await busy(n)

    async with workflows(flows, url=url, max_unrecorded=2, max_executing=5) as app:
        identity = app.get(WorkflowEngine).worker.takes()
        assert identity is not None
        unrecorded = identity.surroundings.unrecorded
        started = await asyncio.gather(*(being_busy.start(n) for n in range(20)))
        assert [await run.result(WAIT) for run in started] == list(range(20))
    assert most == 5
    assert max(before, default=2) < 2


async def test_prototype_6_a_step_with_a_limit_stays_in_the_task_of_its_run(url):
    """What it writes joins its own unit of work, what it gathers ends with it: no task of the limit comes between."""
    flows = WorkflowRouter()
    stock = sa.Table("stock", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), sa.Column("n", sa.Integer))
    tasks: list[object] = []
    began: list[int] = []
    ended: list[str] = []

    async def half(n: int) -> int:
        began.append(n)
        try:
            if current_step().attempt == 1:
                await asyncio.Event().wait()
        finally:
            ended.append(f"{n} of attempt {current_step().attempt}")
        return n

    @flows.step(
        transactional=True, timeout_seconds=0.5, retry=Retry(attempts=2, wait=lambda _state: 0.0), harmless=True
    )
    async def take(n: int) -> int:
        tasks.append(asyncio.current_task())
        await app.get(Database).write(sa.update(stock).values(n=stock.c.n - n))
        return sum(await asyncio.gather(half(1), half(2)))

    @flows.workflow(name="take")
    async def taking(n: int) -> int:
        tasks.append(asyncio.current_task())
        return await take(n)

    async with workflows(flows, url=url) as app:
        db = app.get(Database)
        async with db.engine.begin() as connection:
            await connection.run_sync(stock.metadata.create_all)
            await connection.execute(sa.insert(stock).values(id=1, n=10))
        run = await taking.start(2)
        async with asyncio.timeout(WAIT):
            assert await run.result() == 3
        assert (await db.read(sa.select(stock.c.n)))[0].n == 8
    assert len(tasks) == 3
    assert len(set(tasks)) == 1
    assert ended == ["1 of attempt 1", "2 of attempt 1", "1 of attempt 2", "2 of attempt 2"]


async def test_a_compensation_knows_what_it_undoes(url):
    """As a text, in each attempt at it; a step has nothing to undo, and asking is an error."""
    flows = WorkflowRouter()
    known: list[str] = []

    @flows.step()
    async def charge(n: int) -> int:
        with pytest.raises(NotInRun, match="outside the code of a compensation"):
            current_compensation()
        return n

    @charge.compensation
    async def refund(outcome: Done[int] | Unknown, n: int) -> None:
        info = current_compensation()
        known.append(f"{info.name} {info.attempt} {info.undoes}")
        assert info == current_step()
        if info.attempt == 1:
            raise OSError(n)

    @flows.workflow(name="sell")
    async def sell(n: int) -> None:
        await charge(n)
        raise LookupError(n)

    async with workflows(flows, url=url):
        with pytest.raises(WorkflowFailed):
            await (await sell.start(1, id="r")).result(WAIT)
    assert known == ["charge:compensation 1 r:charge:1", "charge:compensation 2 r:charge:1"]
    with pytest.raises(NotInRun):
        current_compensation()
