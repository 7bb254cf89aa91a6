"""Releases that change a function whose runs wait: parked with a note of both sides, and finished by the old code."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import BaseModel, model_validator

from mainstay.core import App, Retry
from mainstay.core.testing import eventually
from mainstay.database import Database
from mainstay.workflow import Done, RunStatus, Unknown, WorkflowEngine, WorkflowRouter, current_step
from mainstay.workflow._history import StepState
from mainstay.workflow.tables import history, runs
from mainstay.workflow.testing import workflows

WAIT = 60.0
PLACES = ["sleep", "signal", "child", "parked", "gather"]
KEYS = {
    "sleep": "@sleep:1",
    "signal": "@signal told:1",
    "child": "@child quote:1",
    "parked": "ask:1",
    "gather": "0.2/@signal told:1",
}

Program = list[tuple[Any, ...]]


def old(place: str) -> Program:
    """What the function does in the old release; its branches and the wait are where changes are made."""
    branches = [[("price", "a"), ("price", "b")], [("price", "c")]]
    if place == "gather":
        return [("charge", 1), ("price", "x"), ("price", "y"), ("gather", [*branches, [("wait", 3600)]]), ("ship", 1)]
    return [("charge", 1), ("price", "x"), ("price", "y"), ("gather", branches), ("wait", 3600), ("ship", 1)]


def inserted(at: int, *what: Any) -> Callable[[Program], Program]:
    """The program with something more."""
    return lambda program: [*program[:at], what, *program[at:]]


def replaced(at: int, *what: tuple[Any, ...], number: int = 1) -> Callable[[Program], Program]:
    """The program with something in the place of its statements from `at` on."""
    return lambda program: [*program[:at], *what, *program[at + number :]]


def gathering(change: Callable[[list[Program]], list[Program]]) -> Callable[[Program], Program]:
    """The program with other branches."""
    return lambda program: [*program[:3], ("gather", change(program[3][1])), *program[4:]]


def waiting(*what: tuple[Any, ...]) -> Callable[[Program], Program]:
    """The program with something in the place of its wait."""

    def change(program: Program) -> Program:
        changed: Program = []
        for statement in program:
            if statement[0] == "wait":
                changed.extend(what)
            elif statement[0] == "gather":
                changed.append(("gather", [change(branch) for branch in statement[1]]))
            else:
                changed.append(statement)
        return changed

    return change


@dataclass
class Change:
    """A change of the function, and what the note says about the two sides; `WAIT` stands for the key of the wait."""

    make: Callable[[Program], Program]
    asked: str
    record: str


RAISES = "the function ended by KeyError: 'a mistake of the new release' before"
CHANGES = {
    "a step is added": Change(inserted(1, "stock", "x"), "stock:1", "price:1"),
    "a step is added to the end of a branch": Change(
        gathering(lambda branches: [branches[0], [*branches[1], ("stock", "x")], *branches[2:]]),
        "0.1/stock:1",
        "0.1/@end:0",
    ),
    "a step is removed": Change(replaced(2), "@gather:1", "price:2"),
    "the last step of a branch is removed": Change(
        gathering(lambda branches: [branches[0][:1], *branches[1:]]), "branch 0.0/ of a gather ended", "0.0/price:2"
    ),
    "steps are swapped": Change(replaced(0, ("price", "x"), ("charge", 1), number=2), "price:1", "charge:1"),
    "a step is renamed": Change(replaced(1, ("cost", "x")), "cost:1", "price:1"),
    "a step is renamed in a branch": Change(
        gathering(lambda branches: [[("cost", "a"), *branches[0][1:]], *branches[1:]]), "0.0/cost:1", "0.0/price:1"
    ),
    "an argument is changed": Change(replaced(1, ("price", "z")), "price:1", "another value of its parameter of"),
    "a step of the loop comes earlier": Change(
        replaced(1, ("price", "y"), ("price", "x"), number=2), "price:1", "another value of its parameter of"
    ),
    "a branch is added": Change(
        gathering(lambda branches: [*branches, [("price", "d")]]), "@gather:1 with", "where its record has"
    ),
    "a branch is removed": Change(gathering(lambda branches: branches[:-1]), "@gather:1 with", "where its record has"),
    "branches are swapped": Change(
        gathering(lambda branches: [branches[1], branches[0], *branches[2:]]),
        "0.0/price:1",
        "another value of its parameter of",
    ),
    "the gather is removed": Change(replaced(3), "NEXT", "@gather:1"),
    "the gather becomes a sequence": Change(replaced(3, ("price", "a"), ("price", "b")), "price:3", "@gather:1"),
    "a sequence becomes a gather": Change(
        replaced(1, ("gather", [[("price", "x")], [("price", "y")]]), number=2), "@gather:1", "price:1"
    ),
    "an exception comes first": Change(inserted(0, "raise"), RAISES, "charge:1"),
    "an exception comes before the gather": Change(inserted(3, "raise"), RAISES, "@gather:1"),
    "an exception comes before the wait": Change(
        waiting(("raise",), ("wait", 3600)), "KeyError: 'a mistake of the new release' before", "WAIT"
    ),
    "an exception comes in a branch": Change(
        gathering(lambda branches: [[*branches[0][:1], ("raise",), *branches[0][1:]], *branches[1:]]),
        "branch 0.0/ of a gather ended by KeyError",
        "0.0/price:2",
    ),
    "an exception comes at the end of a branch": Change(
        gathering(lambda branches: [branches[0], [*branches[1], ("raise",)], *branches[2:]]),
        "branch 0.1/ of a gather ended by KeyError",
        "where its record has a result",
    ),
    "an exception is caught": Change(replaced(1, ("caught",), ("stock", "x"), number=2), "stock:1", "price:1"),
    "the function returns early": Change(inserted(2, "return"), "the function ended before", "price:2"),
    "the wait is removed": Change(waiting(), "ended before|ship:1", "WAIT"),
    "the wait has other arguments": Change(waiting(("wait", 60)), "WAIT", "its record has|another value of"),
    "a step comes before the wait": Change(waiting(("stock", "x"), ("wait", 3600)), "stock:1", "WAIT"),
}


def names(change: str) -> str:
    """What the function that a change is made to is called; its run has the same id."""
    return change.replace(" ", "-")


class Return(Exception):
    """The function is to end here."""


class Release:
    """The code of one release.

    Args:
        place: where the runs wait.
        changed: whether the changes are made.
        executed: the keys of all attempts of steps, whichever release made them.
    """

    def __init__(self, place: str, executed: Counter[str], *, changed: bool, opened: bool) -> None:
        self.flows = flows = WorkflowRouter()
        self.told = told = flows.signal("told", str)
        steps: dict[str, Any] = {}

        def mark() -> None:
            executed[current_step().key] += 1

        @flows.step()
        async def charge(n: int) -> int:
            mark()
            return n

        @charge.compensation
        async def refund(outcome: Done[int] | Unknown, n: int) -> None:
            mark()

        for name in ["price", "cost", "stock"]:

            async def look(of: str) -> str:
                mark()
                return of

            look.__name__ = name
            steps[name] = flows.step(harmless=True)(look)

        @flows.step(harmless=True)
        async def ship(n: int) -> int:
            mark()
            return n

        @flows.step(on_unknown="park", retry=Retry(attempts=1), harmless=True)
        async def ask(n: int) -> int:
            if not opened:
                raise OSError(n)
            return n

        @flows.workflow(name="quote")
        async def quote(n: int) -> str:
            return await told.wait()

        async def wait(seconds: int) -> None:
            if place == "sleep":
                await flows.sleep(seconds)
            elif place in {"signal", "gather"}:
                await told.wait(timeout_seconds=seconds)
            elif place == "child":
                await quote(seconds)
            else:
                await ask(seconds)

        steps |= {"charge": charge, "ship": ship, "wait": wait}

        async def perform(program: Program) -> None:
            for what, *arguments in program:
                if what == "gather":
                    await flows.gather(*(perform(branch) for branch in arguments[0]))
                elif what == "raise":
                    msg = "a mistake of the new release"
                    raise KeyError(msg)
                elif what == "return":
                    raise Return
                elif what == "caught":
                    try:
                        await perform([("raise",)])
                    except KeyError:
                        continue
                else:
                    await steps[what](*arguments)

        self.sell = {
            name: self._workflow(name, perform, CHANGES[name].make(old(place)) if changed else old(place))
            for name in CHANGES
        }

    def _workflow(self, name: str, perform: Any, program: Program) -> Any:
        @self.flows.workflow(name=names(name))
        async def sell(n: int) -> str:
            try:
                await perform(program)
            except Return:
                return "early"
            return "sold"

        return sell


async def waits(engine: WorkflowEngine, place: str, id: str) -> bool:
    """Whether the run has come to its wait, with everything before it done."""
    if place == "parked":
        return (await engine.status(id)) is RunStatus.PARKED
    records = (await engine.history(id)).records
    if place == "gather" and not {"0.0/@end:0", "0.1/@end:0"} <= records.keys():
        return False
    return KEYS[place] in records and [record.key for record in records.values() if record.state is StepState.OPEN] == [
        KEYS[place]
    ]


async def time_passes(app: App) -> None:
    """Let more time have passed than anything sleeps for."""
    database = app.get(Database)
    await database.write(sa.update(history).values(at=history.c.at - 7_200))


async def go_on(app: App, place: str, release: Release, ids: list[str]) -> None:
    """Let what the runs wait for happen."""
    if place == "sleep":
        await time_passes(app)
    elif place in {"signal", "gather"}:
        for each in ids:
            await release.told.send(each, "go on")
    elif place == "child":
        children = [view.id for view in await app.get(WorkflowEngine).runs(limit=1_000) if view.workflow == "quote"]
        for each in children:
            await release.told.send(each, "go on")


@pytest.mark.parametrize("place", PLACES)
async def test_a_changed_function_parks_its_waiting_runs(shared: str, place: str) -> None:
    """Nothing is compensated nor executed by the new release; the old code takes every run to its end."""
    executed: Counter[str] = Counter()
    first = Release(place, executed, changed=False, opened=False)
    ids = [names(name) for name in first.sell]
    async with asyncio.timeout(WAIT), workflows(first.flows, url=shared) as app:
        engine = app.get(WorkflowEngine)
        for name, sell in first.sell.items():
            await sell.start(1, id=names(name))
        for each in ids:
            await eventually(lambda each=each: waits(engine, place, each), seconds=WAIT)
    done = executed.copy()
    second = Release(place, executed, changed=True, opened=False)
    async with workflows(second.flows, url=shared) as app:
        engine, found = app.get(WorkflowEngine), dict[str, str]()
        if place == "parked":
            for each in ids:
                await engine.resume(each)
        await app.get(Database).write(sa.update(runs).where(runs.c.status == "queued").values(wake_at=0.0))
        for name in second.sell:
            await eventually(lambda name=name: settled(engine, names(name)), seconds=WAIT)
            view, change = await engine.run(names(name)), CHANGES[name]
            found[name] = f"{view.status}: {view.note}"
            if view.status is RunStatus.PARKED and all(
                any(side.replace("WAIT", KEYS[place]) in found[name] for side in sides.split("|"))
                for sides in (
                    change.asked.replace("NEXT", "ship:1" if place == "gather" else KEYS[place]),
                    change.record,
                )
            ):
                del found[name]
        assert found == {}
    assert executed == done, "the new release executed something"
    third = Release(place, executed, changed=False, opened=True)
    async with workflows(third.flows, url=shared) as app:
        await go_on(app, place, third, ids)  # before a worker reads when a sleep began
        for each in ids:
            await app.get(WorkflowEngine).resume(each)
        for name, sell in third.sell.items():
            assert await sell.handle(names(name)).result(WAIT) == "sold"
    assert executed - done == Counter(f"{each}:ship:1" for each in ids)
    assert set(executed.values()) == {1}


async def settled(engine: WorkflowEngine, id: str) -> bool:
    """Whether the run has ended or waits for a person."""
    status = await engine.status(id)
    return status.terminal or status.waits_for_a_person


def of_children(inputs: list[str], *, changed: bool, fails: bool = False) -> tuple[WorkflowRouter, Any]:
    """A function with a child that is done and a signal to wait for; a new release asks more of the child's caller."""
    flows = WorkflowRouter()
    told = flows.signal("told", str)

    @flows.step(harmless=True)
    async def look(of: str) -> str:
        inputs.append(of)
        return of

    if changed:

        @flows.workflow(name="quote")
        async def quote(n: int, currency: str) -> str:
            return await look(f"{n} {currency}")
    else:

        @flows.workflow(name="quote")
        async def quote(n: int) -> str:
            return await look(str(n))

    @flows.workflow(name="sell")
    async def sell(n: int) -> str:
        price = await (quote(n, "EUR") if changed else quote(n))  # type: ignore[call-arg]  # either of the two
        return price + await told.wait()

    return flows, sell


async def test_a_child_with_another_parameter_parks_its_parent(shared: str) -> None:
    """What is on record of the child does not fit its new parameters: that is no error of the function."""
    inputs: list[str] = []
    flows, sell = of_children(inputs, changed=False)
    async with workflows(flows, url=shared) as app:
        await sell.start(1, id="r")
        await eventually(lambda: reached(app.get(WorkflowEngine), "@signal told:1"), seconds=WAIT)
    flows, _ = of_children(inputs, changed=True)
    async with workflows(flows, url=shared) as app:
        await app.get(Database).write(sa.update(runs).where(runs.c.status == "queued").values(wake_at=0.0))
        await eventually(lambda: settled(app.get(WorkflowEngine), "r"), seconds=WAIT)
        view = await app.get(WorkflowEngine).run("r")
        assert view.status is RunStatus.PARKED
        assert "the recorded input of @child quote:1 does not fit the parameters any more" in (view.note or "")
    flows, sell = of_children(inputs, changed=False)
    async with workflows(flows, url=shared) as app:
        await app.get(WorkflowEngine).resume("r")
        await flows.signals["told"].send("r", "!")
        assert await sell.handle("r").result(WAIT) == "1!"
    assert inputs == ["1"]


async def reached(engine: WorkflowEngine, key: str, id: str = "r") -> bool:
    """Whether the run has begun this."""
    records = (await engine.history(id)).records
    return key in records and records[key].seq > 0


async def test_a_branch_that_failed_may_be_mended_until_its_gather_is_over(shared: str) -> None:
    """Its failure counts when the gather raises it: before that a release may do without, afterwards it parks."""
    looked: list[str] = []

    def release(*, mended: bool) -> tuple[WorkflowRouter, Any]:
        flows = WorkflowRouter()
        first, then = flows.signal("first", str), flows.signal("then", str)

        @flows.step(harmless=True)
        async def look(of: str) -> str:
            looked.append(of)
            return of

        @flows.workflow(name="sell")
        async def sell(_n: int) -> str:
            async def fails() -> str:
                found = await look("a")
                return (await look("b")) if mended else found + str(1 / 0)

            try:
                got, _ = await flows.gather(fails(), first.wait())
            except ZeroDivisionError:
                got = "failed"
            return f"{got} {await then.wait()}"

        return flows, sell

    flows, sell = release(mended=False)
    async with workflows(flows, url=shared) as app:
        for run_id in ("r", "over"):
            await sell.start(1, id=run_id)
        await flows.signals["first"].send("over", "!")
        await eventually(lambda: reached(app.get(WorkflowEngine), "0.1/@signal first:1"), seconds=WAIT)
        await eventually(lambda: reached(app.get(WorkflowEngine), "@signal then:1", "over"), seconds=WAIT)
    flows, sell = release(mended=True)
    async with workflows(flows, url=shared) as app:
        await flows.signals["first"].send("r", "!")
        for run_id in ("r", "over"):
            await flows.signals["then"].send(run_id, "sold")
        assert await sell.handle("r").result(WAIT) == "b sold"
        await eventually(lambda: settled(app.get(WorkflowEngine), "over"), seconds=WAIT)
        view = await app.get(WorkflowEngine).run("over")
        assert (
            "asked for 0.0/look:2 where its record has nothing, and goes on after that gather with @signal then:1"
            in (view.note or "")
        )
    assert looked == ["a", "a", "b"]


async def test_a_way_back_waits_for_a_step_that_was_renamed(shared: str) -> None:
    """A release without the step whose compensation is due neither skips it nor goes past it."""
    log: list[str] = []

    def release(name: str, *, broken: bool) -> tuple[WorkflowRouter, Any]:
        flows = WorkflowRouter()

        async def charge(n: int) -> int:
            log.append("charge")
            return n

        charge.__name__ = name
        charges = flows.step()(charge)

        @charges.compensation
        async def refund(outcome: Done[int] | Unknown, n: int) -> None:
            if broken:
                raise OSError(n)
            log.append("refund")

        @flows.step()
        async def reserve(n: int) -> int:
            log.append("reserve")
            return n

        @reserve.compensation
        async def release(outcome: Done[int] | Unknown, n: int) -> None:
            log.append("release")

        @flows.workflow(name="sell")
        async def sell(n: int) -> int:
            await reserve(n)
            await charges(n)
            raise LookupError(n)

        return flows, sell

    flows, sell = release("charge", broken=True)
    async with workflows(flows, url=shared) as app:
        await sell.start(1, id="r")
        await eventually(lambda: reached(app.get(WorkflowEngine), "charge:1:compensation"), seconds=WAIT)
    flows, sell = release("debit", broken=False)
    async with workflows(flows, url=shared) as app:
        await app.get(Database).write(sa.update(runs).where(runs.c.status == "queued").values(wake_at=0.0))
        await eventually(lambda: settled(app.get(WorkflowEngine), "r"), seconds=WAIT)
        view = await app.get(WorkflowEngine).run("r")
        assert view.status is RunStatus.COMPENSATION_FAILED
        assert "no step charge is known here, so charge:1 cannot be undone" in (view.note or "")
    assert log == ["reserve", "charge"]
    flows, sell = release("charge", broken=False)
    async with workflows(flows, url=shared) as app:
        await app.get(WorkflowEngine).resume("r")
        await eventually(lambda: settled(app.get(WorkflowEngine), "r"), seconds=WAIT)
        assert await sell.handle("r").status() is RunStatus.FAILED
    assert log == ["reserve", "charge", "refund", "release"]


class Receipt(BaseModel):
    """What a step gave in the older release."""

    id: str


class ShopReceipt(BaseModel):
    """The same in a release whose code breaks on what the older one kept."""

    id: str

    @model_validator(mode="before")
    @classmethod
    def name_the_shop(cls, found: dict[str, Any]) -> dict[str, Any]:
        return {"id": f"{found['shop']}-{found['id']}"}


@pytest.mark.parametrize("last", ["result", "value"])
async def test_what_a_release_cannot_read_parks_and_undoes_nothing(shared: str, last: str) -> None:
    """Also where it is the last on record, since the older release stopped just then."""
    ledger: list[str] = []

    def release(receipt: Any, progress: Any) -> tuple[WorkflowRouter, Any]:
        flows = WorkflowRouter()
        said = flows.value("progress", type(progress))

        async def charge() -> Any:
            ledger.append("charge")
            return receipt(id="7")

        async def refund(outcome: Any) -> None:
            ledger.append("refund")

        charge.__annotations__["return"] = receipt
        charges = flows.step()(charge)
        charges.compensation(refund)

        @flows.workflow(name="sell")
        async def sell() -> None:
            await charges()
            if last == "value":
                await said.set(progress)
            await flows.sleep(3600)

        return flows, sell

    flows, sell = release(Receipt, 1)
    async with workflows(flows, url=shared) as app:
        await sell.start(id="one")
        engine = app.get(WorkflowEngine)

        async def waiting() -> bool:
            return await engine.status("one") is RunStatus.WAITING

        await eventually(waiting, seconds=WAIT)
    async with workflows(url=shared, serve=False) as app:
        database = app.get(Database)
        await database.write(sa.delete(history).where(history.c.step == "@sleep:1"))
        await database.write(sa.update(runs).values(wake_at=0.0))
    flows, _ = release(*((ShopReceipt, 1) if last == "result" else (Receipt, "1 of 2")))
    async with workflows(flows, url=shared) as app:
        engine = app.get(WorkflowEngine)
        await eventually(lambda: settled(engine, "one"), seconds=WAIT)
        view = await engine.run("one")
        assert view.status is RunStatus.PARKED, view.failure
        assert {"result": "name_the_shop raised KeyError", "value": "with another value"}[last] in str(view.note)
    assert ledger == ["charge"]
