"""What may be declared as a step or a workflow."""

import functools
from typing import Any

import pytest

from mainstay.workflow import RunConflict, WorkflowEngine, WorkflowRouter
from mainstay.workflow.testing import workflows

WAIT = 20.0


class Shop:
    """Something with methods."""

    async def buy(self, n: int) -> int:
        return n


async def buy(n: int, m: int) -> int:
    return n + m


function: Any = buy
NO_FUNCTIONS: list[Any] = [functools.partial(buy, 1), Shop().buy, classmethod(function), staticmethod(function)]


@pytest.mark.parametrize("what", NO_FUNCTIONS, ids=[type(what).__name__ for what in NO_FUNCTIONS])
def test_what_is_no_plain_function_is_refused_where_it_is_declared(what):
    """It has no name of its own, or parameters that its signature does not say."""
    flows = WorkflowRouter()
    with pytest.raises(TypeError, match=f"a step is a plain `async def` function, and not a {type(what).__name__}"):
        flows.step(harmless=True)(what)
    with pytest.raises(TypeError, match=f"a workflow is a plain `async def` function, and not a {type(what).__name__}"):
        flows.workflow(name="buy")(what)
    assert flows.steps == {}
    assert flows.workflows == {}


async def test_a_step_may_have_parameters_of_each_kind():
    """Positional-only, keyword-only, and with a default."""
    flows = WorkflowRouter()

    @flows.step(harmless=True)
    async def add(a: int, /, b: int = 2, *, c: int, d: int = 4) -> int:
        return a * 1000 + b * 100 + c * 10 + d

    @flows.workflow(name="sum")
    async def total(n: int) -> int:
        return await add(n, c=3)

    async with workflows(flows):
        assert await (await total.start(1)).result(15.0) == 1234


def test_a_parameter_that_is_called_as_the_run_s_id_is_refused():
    """`start(…, id=…)` names the run; a parameter that no keyword reaches may be called so."""
    flows = WorkflowRouter()

    async def look(id: int) -> int:
        return id

    async def look_by_place(id: int, /) -> int:
        return id

    with pytest.raises(TypeError, match="workflow look has a parameter id, which `start` takes as the run's: rename"):
        flows.workflow(name="look")(look)
    assert flows.workflows == {}
    flows.workflow(name="look")(look_by_place)


async def test_a_workflow_starts_with_keywords_and_defaults(url):
    """Each way of writing an input is the same input, beside an id and without one."""
    flows = WorkflowRouter()

    @flows.workflow(name="add")
    async def add(a: int, b: int = 2, *, c: int = 3) -> int:
        return a * 100 + b * 10 + c

    async with workflows(flows, url=url) as app:
        engine = app.get(WorkflowEngine)
        for run in [
            await add.start(1, id="r"),
            await add.start(1, 2, id="r"),
            await add.input(1, c=3).named("r").start(),
            await add.input(b=2, a=1).named("r").start(),
            await add.start(1, b=2),
            await add.start(a=1),
        ]:
            assert await run.result(WAIT) == 123
        assert await engine.execute(add, 1, c=4) == 124
        assert await engine.execute(add.input(1, 5)) == 153
        assert len(await engine.runs()) == 5
        with pytest.raises(RunConflict, match="run 'r' exists, with another input"):
            await add.input(1, c=4).named("r").start()
        with pytest.raises(TypeError, match="workflow add: got an unexpected keyword argument 'd'"):
            await add.input(1, d=4).start()  # type: ignore[call-arg]  # what the test is about


async def test_a_child_and_a_next_generation_take_keywords(url):
    """Inside workflow functions as outside."""
    flows = WorkflowRouter()

    @flows.workflow(name="add")
    async def add(a: int, *, b: int = 2) -> int:
        return a * 10 + b

    @flows.workflow(name="count")
    async def count(n: int, *, step: int = 1) -> int:
        if n < 4:
            await count.continue_with(n + step, step=step)
        return await add(n, b=step) + await add(a=1)

    async with workflows(flows, url=url):
        assert await (await count.start(0, step=2)).result(WAIT) == 42 + 12


def test_what_an_input_shows_is_no_data():
    """Inputs may be people's data; their repr may stand in a log."""
    flows = WorkflowRouter()

    @flows.workflow(name="greet")
    async def greet(name: str) -> None: ...

    assert repr(greet.input("Ann").named("r")) == "RunInput(workflow=<workflow greet version 1>, id='r')"
