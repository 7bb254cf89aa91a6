"""Other ways to write the same thing: a named list of steps with a map of compensations, and steps as classes.

Each is a few lines onto `@flows.step` and `@flows.workflow`; what they make is what those make.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Protocol

from mainstay.workflow.outcome import Done, Unknown
from mainstay.workflow.router import WorkflowRouter
from mainstay.workflow.step import Step
from mainstay.workflow.workflow import Workflow

__all__ = ["StepClass", "class_step", "declare", "steps_of"]

StepFunction = Callable[[Any], Awaitable[Any]]
Compensation = Callable[[Done[Any] | Unknown, Any], Awaitable[None]]


class StepClass(Protocol):
    """A step as a class; a method `compensate(self, outcome, value)` beside `execute` undoes it."""

    async def execute(self, value: Any, /) -> Any:
        """Do the work."""
        ...


def declare(
    flows: WorkflowRouter,
    name: str,
    steps: Sequence[Step[[Any], Any]],
    *,
    version: int = 1,
) -> Workflow[Any, Any]:
    """A workflow that hands its input to the first step, each result to the next, and returns the last.

    Raises:
        ValueError: there are no steps, or the name is taken.
    """
    if not steps:
        msg = f"workflow {name!r} has no steps"
        raise ValueError(msg)

    async def chain(value: Any) -> Any:
        for step in steps:
            value = await step(value)
        return value

    chain.__annotations__ = {"value": steps[0].signature.hint(0), "return": steps[-1].signature.hint("return")}
    return flows.workflow(name=name, version=version)(chain)


def steps_of(
    flows: WorkflowRouter, functions: Sequence[StepFunction], compensations: Mapping[str, Compensation]
) -> list[Step[[Any], Any]]:
    """Steps from plain functions, and from a map what undoes them by their names; the others leave nothing to undo."""
    steps: list[Step[[Any], Any]] = []
    for function in functions:
        undo = compensations.get(getattr(function, "__name__", ""))
        steps.append(flows.step(harmless=undo is None)(function))
        if undo is not None:
            steps[-1].compensation(undo)
    return steps


def class_step(flows: WorkflowRouter, instance: StepClass) -> Step[[Any], Any]:
    """A step from an object with `execute` and, if there is something to undo, `compensate`; named by its class."""

    @wraps(instance.execute)
    async def execute(value: Any) -> Any:
        return await instance.execute(value)

    execute.__name__ = type(instance).__name__
    undo: Compensation | None = getattr(instance, "compensate", None)
    return steps_of(flows, [execute], {} if undo is None else {execute.__name__: undo})[0]
