"""What a run keeps comes back equal or is refused; the same input is the same run, however it was written."""

from datetime import date
from decimal import Decimal
from typing import Any

import pytest
from pydantic import BaseModel, Field

from mainstay.core import App, ConfigurationError
from mainstay.database import Database, DatabaseModule
from mainstay.workflow import RunConflict, RunParked, WorkflowModule, WorkflowRouter
from mainstay.workflow.tables import runs, signals
from mainstay.workflow.testing import workflows

WAIT = 15.0


class Shape(BaseModel):
    """A model with a subclass."""

    name: str


class Circle(Shape):
    """A model with a field of its own."""

    radius: int


class Hidden(BaseModel):
    """A model that does not write a field."""

    total: int = Field(default=0, exclude=True)


class Aliased(BaseModel):
    """Written by one name, read by another."""

    amount: int | None = Field(default=None, validation_alias="in", serialization_alias="out")


def step_that_takes(kind: Any) -> WorkflowRouter:
    flows = WorkflowRouter()

    async def look(value: Any) -> None: ...

    look.__annotations__["value"] = kind
    flows.step(harmless=True)(look)
    return flows


def step_that_returns(kind: Any) -> WorkflowRouter:
    flows = WorkflowRouter()

    async def look() -> Any: ...

    look.__annotations__["return"] = kind
    flows.step(harmless=True)(look)
    return flows


def workflow_that_takes(kind: Any) -> WorkflowRouter:
    flows = WorkflowRouter()

    async def look(value: Any) -> None: ...

    look.__annotations__["value"] = kind
    flows.workflow(name="look")(look)
    return flows


def signal_of(kind: Any) -> WorkflowRouter:
    flows = WorkflowRouter()
    flows.signal("look", kind)
    return flows


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (step_that_takes, r"step look: its arguments cannot be kept: value"),
        (step_that_returns, r"step look: its result cannot be kept: it|step look: its result cannot be kept: total"),
        (workflow_that_takes, r"workflow look: its arguments cannot be kept: value"),
        (signal_of, r"signal look: its value cannot be kept: "),
    ],
)
@pytest.mark.parametrize("kind", [Hidden, dict[tuple[int, int], str], str | Decimal])
def test_a_type_that_never_comes_back_is_an_error_of_the_app(make, said, kind):
    """Where it is declared, by function and field, and before anything runs."""
    with pytest.raises(ConfigurationError, match=said):
        App(DatabaseModule.for_root(), WorkflowModule.for_root(), WorkflowModule.for_feature(make(kind)))


def test_a_default_that_is_not_of_its_type_is_an_error_of_the_app():
    """It would be refused at each start."""
    flows = WorkflowRouter()

    @flows.workflow(name="look")
    async def look(n: int = None) -> None: ...  # type: ignore[assignment]  # noqa: RUF013  that is the test

    with pytest.raises(ConfigurationError, match="workflow look: the default of its parameter n cannot be kept"):
        App(DatabaseModule.for_root(), WorkflowModule.for_root(), WorkflowModule.for_feature(flows))


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (Shape, Circle(name="c", radius=1), "a Circle comes back as a Shape"),
        (Any, date(2026, 1, 1), "a date comes back as a str"),
        (int, True, "a bool comes back as an int"),
    ],
)
async def test_a_value_that_would_change_is_refused_before_it_has_an_effect(kind, value, said):
    """An input starts nothing, an argument reaches no step, a signal is not sent; a result parks its run."""
    entered: list[object] = []
    flows = WorkflowRouter()

    async def take(value: Any) -> None:
        entered.append(value)

    async def give(n: int) -> Any:
        return value

    take.__annotations__["value"] = kind
    give.__annotations__["return"] = kind
    taking, giving = flows.step(harmless=True)(take), flows.step(harmless=True)(give)

    @flows.workflow(name="takes")
    async def takes() -> None:
        await taking(value)

    @flows.workflow(name="gives")
    async def gives() -> None:
        await giving(1)

    async def starts(value: Any) -> None: ...

    starts.__annotations__["value"] = kind
    started = flows.workflow(name="starts")(starts)
    told = flows.signal("told", kind)
    async with workflows(flows) as app:
        with pytest.raises(
            TypeError, match=rf"workflow starts: its arguments cannot be kept as annotated: value: {said}"
        ):
            await started.start(value, id="no")
        with pytest.raises(TypeError, match=f"signal told: its value cannot be kept as annotated: {said}"):
            await told.send("no", value)
        assert await app.get(Database).read(runs.select()) == []
        assert await app.get(Database).read(signals.select()) == []
        with pytest.raises(RunParked, match=rf"step take: its arguments cannot be kept as annotated: value: {said}"):
            await (await takes.start()).result(WAIT)
        assert entered == []
        with pytest.raises(RunParked, match=f"step give: its result cannot be kept as annotated: {said}"):
            await (await gives.start()).result(WAIT)


async def test_values_with_aliases_and_bytes_come_back_equal(url):
    """Fields go by their own names, and bytes need not be text."""
    flows = WorkflowRouter()
    got: list[object] = []
    told = flows.signal("told", Aliased)

    @flows.step(harmless=True)
    async def give(value: Aliased, raw: bytes) -> tuple[Aliased, bytes, float]:
        return value, raw, float("inf")

    @flows.workflow(name="pass")
    async def through(value: Aliased, raw: bytes) -> bytes:
        got.extend([await give(value, raw), await told.wait(WAIT)])
        return raw

    one = Aliased(**{"in": 7})
    async with workflows(flows, url=url):
        run = await through.start(one, b"\xff\x00", id="r")
        await told.send("r", one)
        assert await run.result(WAIT) == b"\xff\x00"
    assert got == [(one, b"\xff\x00", float("inf")), one]


def release(*, new: bool) -> WorkflowRouter:
    """The same workflow before and after a release that adds fields and a parameter, each with a default."""
    flows = WorkflowRouter()
    if new:

        class Line(BaseModel):
            sku: str
            gift: bool = False

        class Order(BaseModel):
            id: str
            lines: list[Line]
            note: str | None = None

        @flows.workflow(name="order")
        async def order(order: Order, express: bool = False) -> None: ...
    else:

        class Line(BaseModel):  # type: ignore[no-redef]  # of the next release
            sku: str

        class Order(BaseModel):  # type: ignore[no-redef]  # of the next release
            id: str
            lines: list[Line]

        @flows.workflow(name="order")
        async def order(order: Order) -> None: ...

    order.function.__annotations__["order"] = Order
    flows.made = lambda sku: Order(id="o", lines=[Line(sku=sku)])  # type: ignore[attr-defined]  # made above
    return flows


async def test_the_same_input_after_a_release_is_the_same_run(url):
    """An event that is delivered again across a deploy starts nothing; one with another input is refused."""
    before, after = release(new=False), release(new=True)
    async with workflows(before, url=url, serve=False):
        (order,) = before.workflows.values()
        await order.start(before.made("a"), id="o")  # type: ignore[attr-defined]  # made above
    if ":memory:" in url:
        return
    async with workflows(after, url=url, serve=False) as app:
        (order,) = after.workflows.values()
        again = await order.start(after.made("a"), id="o")  # type: ignore[attr-defined]  # made above
        assert again.id == "o"
        await order.start(after.made("a"), False, id="o")  # type: ignore[attr-defined]  # made above
        assert len(await app.get(Database).read(runs.select())) == 1
        with pytest.raises(RunConflict, match="run 'o' exists, with another input"):
            await order.start(after.made("b"), id="o")  # type: ignore[attr-defined]  # made above
        with pytest.raises(RunConflict, match="run 'o' exists, with another input"):
            await order.start(after.made("a"), True, id="o")  # type: ignore[attr-defined]  # made above


async def test_the_same_input_is_the_same_run_in_whatever_order_it_is_written(url):
    """Sets, mappings, and a default that is left out or given; also inside a transaction."""
    flows = WorkflowRouter()

    @flows.workflow(name="look")
    async def look(tags: set[int], of: dict[str, float], express: bool = False) -> None: ...

    one, other = {0, 8}, {8, 0}
    assert list(one) != list(other)
    async with workflows(flows, url=url, serve=False) as app:
        await look.start(one, {"a": 1.0, "b": 2.0}, id="r")
        await look.start(other, {"b": 2, "a": 1}, False, id="r")
        async with app.get(Database).transaction():
            await look.start(other, {"b": 2, "a": 1}, False, id="r")
        with pytest.raises(RunConflict, match="with another input"):
            await look.start(other, {"b": 2, "a": 1}, True, id="r")
        with pytest.raises(RunConflict, match="with another input"):
            await look.start({0}, {"b": 2, "a": 1}, id="r")
        assert len(await app.get(Database).read(runs.select())) == 1


async def test_an_input_that_cannot_be_read_today_is_another_and_says_so(tmp_path):
    """A release that changed a type for good meets an id from before."""
    before, after = WorkflowRouter(), WorkflowRouter()

    @before.workflow(name="look")
    async def old(n: str) -> None: ...

    @after.workflow(name="look")
    async def new(n: int) -> None: ...

    url = f"sqlite+aiosqlite:///{tmp_path}/t.db"
    async with workflows(before, url=url, serve=False):
        await old.start("a word", id="r")
    async with workflows(after, url=url, serve=False):
        with pytest.raises(RunConflict, match="with an input that <workflow look version 1> cannot read today"):
            await new.start(1, id="r")


async def test_a_run_keeps_the_defaults_that_it_was_started_with(tmp_path):
    """A release that changes a default changes no run that has begun."""
    before, after = WorkflowRouter(), WorkflowRouter()

    @before.workflow(name="look")
    async def old(n: int = 1) -> int:
        return n

    @after.workflow(name="look")
    async def new(n: int = 2) -> int:
        return n

    url = f"sqlite+aiosqlite:///{tmp_path}/t.db"
    async with workflows(before, url=url, serve=False):
        await old.start(id="r")
    async with workflows(after, url=url):
        assert await new.handle("r").result(WAIT) == 1
