"""Declarative sagas: what is declared is what is executed, undone, described and drawn."""

import functools
from typing import Any

import pytest

from mainstay.core import App, Retry, given
from mainstay.database import Database
from mainstay.workflow import (
    Done,
    RunStatus,
    Unknown,
    WorkflowEngine,
    WorkflowFailed,
    WorkflowModule,
    WorkflowRouter,
    class_step,
    diagram,
    parallel,
    saga,
    sequence,
    when,
)
from mainstay.workflow.testing import explore, workflows

WAIT = 15.0
NONE = Retry(attempts=1)


class Shop:
    """Steps that log what they do, one of which fails where it is told to."""

    def __init__(self) -> None:
        self.flows = WorkflowRouter()
        self.log: list[object] = []

        async def hold(n: int) -> int:
            self.log.append("hold")
            return n + 1

        async def charge(n: int) -> str:
            self.log.append("charge")
            return f"paid {n}"

        async def pack(n: int) -> str:
            self.log.append("pack")
            return f"packed {n}"

        async def inspect(n: int) -> int:
            self.log.append("inspect")
            return n + 100

        async def tell(papers: tuple[str, str]) -> str:
            if "1000" in papers[0]:
                raise LookupError(papers)
            return ", ".join(papers)

        async def release(outcome: Done[int] | Unknown, n: int) -> None:
            self.log.append(("release", outcome))

        async def refund(outcome: Done[str] | Unknown, n: int) -> None:
            self.log.append(("refund", outcome))

        async def unpack(outcome: Done[str] | Unknown, n: int) -> None:
            self.log.append(("unpack", outcome))

        def large(n: int) -> bool:
            return n > 10

        self.hold, self.charge, self.pack, self.inspect, self.tell = hold, charge, pack, inspect, tell
        self.release, self.refund, self.unpack, self.large = release, refund, unpack, large

    def sell(self) -> Any:
        """Everything that a saga may have."""
        return saga(
            self.flows,
            "sell",
            sequence(
                self.hold,
                when(self.large, self.inspect),
                parallel(self.charge, self.pack),
                self.flows.step(harmless=True, retry=NONE)(self.tell),
            ),
            compensations={
                "hold": self.release,
                "charge": self.refund,
                "pack": self.unpack,
                "inspect": "harmless",
            },
            version=2,
        )


@pytest.fixture
def shop() -> Shop:
    """A shop with nothing declared."""
    return Shop()


async def test_values_flow_through_sequence_condition_and_parallel(shop):
    """The input goes to the first step, each result to the next; a condition that is false lets the value pass."""
    sell = shop.sell()
    async with workflows(shop.flows) as app:
        engine = app.get(WorkflowEngine)
        assert await engine.execute(sell, 1) == "paid 2, packed 2"
        assert "inspect" not in shop.log
        assert await engine.execute(sell, 10) == "paid 111, packed 111"
        assert "inspect" in shop.log


async def test_what_the_map_names_is_undone_in_reverse(shop):
    """The compensations of every step that was executed, and of no other."""
    sell = shop.sell()
    async with workflows(shop.flows) as app:
        with pytest.raises(WorkflowFailed, match="LookupError"):
            await app.get(WorkflowEngine).execute(sell, 1000 - 101)
    undone = [entry for entry in shop.log if isinstance(entry, tuple)]
    assert len(undone) == 3
    assert {("refund", Done("paid 1000")), ("unpack", Done("packed 1000"))} == set(undone[:2])
    assert undone[2] == ("release", Done(900))


async def test_a_worker_may_die_at_every_moment_of_a_saga(shop):
    """The one that takes over finds every record, also those of branches side by side."""
    sell = shop.sell()

    async def start(app: App) -> Any:
        shop.log.clear()
        return await sell.start(999 - 100, id="crashed")

    async def check(run: Any, app: App) -> None:
        assert await run.status() is RunStatus.FAILED
        undone = [entry[0] for entry in shop.log if isinstance(entry, tuple)]
        assert {"refund", "unpack", "release"} == set(undone)

    assert await explore(shop.flows, start=start, check=check) > 20


async def test_a_saga_goes_on_after_a_crash_on_postgresql(shop, postgres):
    """What is recorded is not executed again."""
    sell = shop.sell()
    async with workflows(shop.flows, url=postgres, serve=False):
        await sell.start(10, id="one")
    async with workflows(shop.flows, url=postgres):
        assert await sell.handle("one").result(WAIT) == "paid 111, packed 111"
    assert sorted(map(str, shop.log)) == ["charge", "hold", "inspect", "pack"]


async def test_otherwise_and_nested_groups():
    """Branches of a condition and of a parallel may be groups; the same step may stand in several places."""
    flows = WorkflowRouter()

    async def add(n: int) -> int:
        return n + 1

    async def double(n: int) -> int:
        return n * 2

    count = saga(
        flows,
        "count",
        parallel(
            when(lambda n: n > 2, sequence(add, add), otherwise=double),
            sequence(double, parallel(add, double)),
        ),
        compensations={"add": "harmless", "double": "harmless"},
    )
    assert sorted(flows.steps) == ["add", "double"]
    async with workflows(flows) as app:
        engine = app.get(WorkflowEngine)
        assert await engine.execute(count, 3) == (5, (7, 12))
        assert await engine.execute(count, 2) == (4, (5, 8))


async def test_a_failed_branch_lets_the_others_end_and_all_are_undone(shop):
    """As in `flows.gather`."""

    async def fail(n: int) -> str:
        raise LookupError(n)

    flows = shop.flows
    failing = flows.step(harmless=True, retry=NONE)(fail)
    both = saga(flows, "both", parallel(failing, shop.charge), compensations={"charge": shop.refund})
    async with workflows(flows) as app:
        with pytest.raises(WorkflowFailed, match="step fail ended with LookupError"):
            await app.get(WorkflowEngine).execute(both, 1)
    assert shop.log == ["charge", ("refund", Done("paid 1"))]


# Steps as classes


class Hold:
    """Holds."""

    def __init__(self, log: list[object]) -> None:
        self.log = log

    async def execute(self, value: int) -> int:
        self.log.append(value)
        return value + 1

    async def compensate(self, outcome: Done[int] | Unknown, value: int) -> None:
        self.log.append((outcome, value))


class Fail:
    """Fails."""

    async def execute(self, value: int) -> int:
        raise LookupError(value)


async def test_steps_as_classes():
    """`execute` is the step, `compensate` undoes it, and options come with `flows.step`."""
    flows = WorkflowRouter()
    log: list[object] = []
    fail = class_step(Fail(), flows.step(harmless=True, retry=NONE))
    buy = saga(flows, "buy", sequence(Hold(log), fail))
    assert list(flows.steps) == ["Fail", "Hold"]
    assert flows.steps["Hold"].__doc__ == "Holds."
    async with workflows(flows) as app:
        with pytest.raises(WorkflowFailed, match="step Fail ended with LookupError"):
            await app.get(WorkflowEngine).execute(buy, 1)
    assert log == [1, (Done(2), 1)]


def test_a_class_without_compensate_says_harmless():
    """A misspelt `compensate` would otherwise undo nothing, silently."""
    flows = WorkflowRouter()
    with pytest.raises(TypeError, match="saga 'buy': compensations do not name Fail: name what undoes a step"):
        saga(flows, "buy", Fail())
    saga(flows, "buy", Fail(), compensations={"Fail": "harmless"})


async def test_services_are_given_to_the_steps_of_a_saga():
    """A keyword-only `given` parameter is no value that flows."""
    flows = WorkflowRouter()

    async def count(n: int, *, db: Database = given(Database)) -> str:
        return f"{n} on {db.dialect}"

    counted = saga(flows, "count", count, compensations={"count": "harmless"})
    async with workflows(flows) as app:
        assert await app.get(WorkflowEngine).execute(counted, 1) == "1 on sqlite"


# What is refused where it is declared


def test_the_map_is_exactly_what_the_steps_need(shop):
    """A misspelt key, a missing one, a step that says so itself, and a word that is none."""
    flows = shop.flows
    steps = sequence(shop.hold, shop.charge)
    with pytest.raises(TypeError, match="saga 'sell': compensations name hodl, and its steps are hold, charge"):
        saga(flows, "sell", steps, compensations={"hodl": shop.release, "charge": shop.refund})
    with pytest.raises(TypeError, match="saga 'sell': compensations do not name hold, charge: "):
        saga(flows, "sell", steps)
    wrong: Any = {"hold": "harmles", "charge": shop.refund}
    with pytest.raises(TypeError, match="compensation of hold is a function, or 'harmless', or 'after_pivot', and not"):
        saga(flows, "sell", steps, compensations=wrong)
    with pytest.raises(TypeError, match="saga 'sell': Hold in compensations, and the step itself says what undoes it"):
        saga(flows, "sell", Hold([]), compensations={"Hold": "harmless"})
    assert flows.steps == {}
    assert flows.workflows == {}


def test_a_step_with_options_takes_its_compensation_from_the_map_and_its_words_from_its_options(shop):
    """One place says each."""
    charge = shop.flows.step(retry=NONE)(shop.charge)
    with pytest.raises(TypeError, match="charge has options of its own: write harmless=True among them"):
        saga(shop.flows, "sell", charge, compensations={"charge": "harmless"})
    saga(shop.flows, "sell", charge, compensations={"charge": shop.refund})
    assert charge.undo is shop.refund
    saga(shop.flows, "sell-again", charge)  # it says so itself now


def test_a_compensation_that_does_not_fit_is_refused(shop):
    """Its parameters are the outcome and the value, by the step's own name."""

    async def other(outcome: Done[int] | Unknown, order: int) -> None: ...

    with pytest.raises(TypeError, match=r"that of step hold takes \(outcome, n\)"):
        saga(shop.flows, "sell", shop.hold, compensations={"hold": other})


async def _none() -> int:
    return 1


async def _two(a: int, b: int) -> int:
    return a + b


async def _ask(n: int) -> bool:
    return n > 1


WRONG: dict[str, tuple[Any, Any]] = {
    "no parameter": (_none, "hands each step one value"),
    "two parameters": (_two, "hands each step one value"),
    "a partial": (functools.partial(_two, 1), "a step is a plain `async def` function, and not a partial"),
    "a list": ([_two], "objects with `execute` and groups of them, and no [<function"),
    "a class": (Hold, "Hold is a class: write Hold(…)"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_step_of_one_value_is_refused_where_it_is_declared(what):
    """The message says what a step is."""
    part, message = WRONG[what]
    compensations: Any = {getattr(part, "__name__", type(part).__name__): "harmless"}
    with pytest.raises(TypeError) as caught:
        saga(WorkflowRouter(), "x", part, compensations=compensations)
    assert message in str(caught.value)


def test_an_empty_group_and_a_condition_to_be_awaited_are_refused():
    """Neither could be executed."""
    group: Any
    for group in (sequence, parallel):
        with pytest.raises(TypeError, match=rf"{group.__name__}\(\) has no steps"):
            group()
    condition: Any = _ask
    with pytest.raises(TypeError, match="the condition _ask is a plain function of the value"):
        when(condition, _ask)


def test_branches_take_one_type(shop):
    """The same value goes to all of them, so a run's input has one type."""

    async def weigh(n: float) -> float:
        return n

    with pytest.raises(TypeError, match=r"the branches of parallel\(hold; weigh\) take int, float"):
        saga(shop.flows, "x", parallel(shop.hold, weigh), compensations={"hold": "harmless", "weigh": "harmless"})


def test_a_name_is_taken_once(shop):
    """As with workflow functions and steps."""
    shop.sell()
    with pytest.raises(ValueError, match="already has a step"):
        shop.sell()
    other = Fail()
    saga(shop.flows, "fail", other, compensations={"Fail": "harmless"})
    with pytest.raises(ValueError, match="already has version 1 of workflow 'fail'"):
        saga(shop.flows, "fail", shop.flows.steps["Fail"])


# What people see


async def test_describe_names_the_steps_of_a_saga(shop):
    """Beside its name and version; a workflow function has its code."""
    shop.sell()

    @shop.flows.workflow(name="plain")
    async def plain(n: int) -> int:
        return n

    async with workflows(shop.flows) as app:
        (said,) = (module for module in app.modules if isinstance(module, WorkflowModule))
        assert said.describe()["workflows"] == [
            "plain version 1",
            "sell version 2: hold, when(large: inspect), parallel(charge; pack), tell",
        ]
    with pytest.raises(TypeError, match="workflow 'plain' is a function"):
        diagram(plain)


def test_a_saga_is_drawn_as_a_flowchart(shop):
    """Branches fork and join, a condition has two ways on, and what undoes a step stands beside it."""
    assert diagram(shop.sell()) == (
        "flowchart TD\n"
        '    n1(["sell, version 2"])\n'
        '    n2["hold"]\n'
        "    n1 --> n2\n"
        '    n3["undo: release"]\n'
        "    n2 -.- n3\n"
        '    n4{"large"}\n'
        "    n2 --> n4\n"
        '    n5["inspect (harmless)"]\n'
        "    n4 -->|yes| n5\n"
        '    n6["charge"]\n'
        "    n5 --> n6\n"
        "    n4 -->|no| n6\n"
        '    n7["undo: refund"]\n'
        "    n6 -.- n7\n"
        '    n8["pack"]\n'
        "    n5 --> n8\n"
        "    n4 -->|no| n8\n"
        '    n9["undo: unpack"]\n'
        "    n8 -.- n9\n"
        '    n10["tell (harmless)"]\n'
        "    n6 --> n10\n"
        "    n8 --> n10\n"
        '    n11(["end"])\n'
        "    n10 --> n11\n"
    )
    otherwise = saga(
        WorkflowRouter(),
        "way",
        when(lambda n: n > 1, shop.inspect, otherwise=shop.hold),
        compensations={"inspect": "harmless", "hold": "after_pivot"},
    )
    drawn = diagram(otherwise)
    assert 'n2{"condition"}' in drawn
    assert "n2 -->|no| n4" in drawn
    assert '"hold (after pivot)"' in drawn
