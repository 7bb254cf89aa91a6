"""Mistakes in workflows, steps and their settings are errors of `App(…)`: nothing is started here."""

from collections.abc import Callable

import pytest

from mainstay.core import App, ConfigurationError, given
from mainstay.database import DatabaseModule
from mainstay.workflow import WorkflowModule, WorkflowRouter


class Ledger:
    """A service that no module yields."""


def app(*routers: WorkflowRouter) -> App:
    return App(DatabaseModule.for_root(), WorkflowModule.for_root(), WorkflowModule.for_feature(*routers))


def without_compensation() -> WorkflowRouter:
    flows = WorkflowRouter()

    @flows.step()
    async def charge(amount: int) -> int:
        return amount

    return flows


def without_probe() -> WorkflowRouter:
    flows = WorkflowRouter()

    @flows.step(harmless=True, on_unknown="probe")
    async def charge(amount: int) -> int:
        return amount

    return flows


def with_a_name_that_is_nowhere() -> WorkflowRouter:
    flows = WorkflowRouter()

    @flows.step(harmless=True)
    async def charge(amount: "Amount") -> int:  # type: ignore[name-defined]  # noqa: F821  that is the test
        return amount  # type: ignore[no-any-return]  # a type that is nowhere is Any

    return flows


def named(name: str = "order") -> WorkflowRouter:
    flows = WorkflowRouter()

    @flows.workflow(name=name, version=1)
    async def order(number: int) -> int:
        return number

    return flows


def stepping() -> WorkflowRouter:
    flows = WorkflowRouter()

    @flows.step(harmless=True)
    async def reserve(number: int) -> int:
        return number

    return flows


def asking() -> WorkflowRouter:
    flows = WorkflowRouter()

    @flows.step(harmless=True)
    async def reserve(number: int, *, ledger: Ledger = given(Ledger)) -> int:
        return number

    return flows


def using_a_step_of(other: WorkflowRouter) -> WorkflowRouter:
    flows = WorkflowRouter()

    @other.step(harmless=True)
    async def ship(number: int) -> int:
        return number

    @flows.workflow(name="ships", version=1)
    async def ships(number: int) -> int:
        return await ship(number)

    return flows


MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: App(WorkflowModule.for_root()), "WorkflowModule requires DatabaseModule"),
    (lambda: app(without_compensation()), "step charge has no compensation: add @charge.compensation"),
    (lambda: app(without_probe()), 'step charge says on_unknown="probe": add @charge.probe'),
    (lambda: app(with_a_name_that_is_nowhere()), "Amount"),
    (lambda: app(named(), named()), "two routers have version 1 of workflow 'order'"),
    (lambda: app(stepping(), stepping()), "two routers have a step reserve"),
    (lambda: app(asking()), "reserve: no module of this App yields the Ledger"),
    (lambda: app(using_a_step_of(WorkflowRouter())), r"ships uses the WorkflowRouter made at .*for_feature"),
]


@pytest.mark.parametrize(("build", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_a_mistake_is_named_when_the_app_is_constructed(build: Callable[[], object], message: str) -> None:
    """With the step or workflow, and the line to write."""
    with pytest.raises(ConfigurationError, match=message):
        build()
