"""What may be declared as a step or a workflow."""

import functools
from typing import Any

import pytest

from mainstay.workflow import WorkflowRouter
from mainstay.workflow.testing import workflows


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
