"""Declarative sagas: steps as data, with a map of what undoes them, and steps as classes.

Each is a few lines onto `@flows.step` and `@flows.workflow`; what they make is what those make. A saga is a tree of
groups, which `saga` turns into a function once, and which the diagram and the description read.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeGuard, TypeVar, Union, cast, overload

from mainstay.workflow.outcome import Done, Unknown
from mainstay.workflow.router import WorkflowRouter
from mainstay.workflow.step import Step, own_code
from mainstay.workflow.workflow import Workflow

__all__ = ["Group", "Part", "StepClass", "Undo", "class_step", "diagram", "parallel", "saga", "sequence", "when"]

V = TypeVar("V")
R = TypeVar("R")
T1 = TypeVar("T1")
T2 = TypeVar("T2")
T3 = TypeVar("T3")
T4 = TypeVar("T4")
T5 = TypeVar("T5")
V_contra = TypeVar("V_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)

_WORDS = ("harmless", "after_pivot")

Compensation: TypeAlias = Callable[[Done[Any] | Unknown, Any], Awaitable[None]]
Undo: TypeAlias = Compensation | Literal["harmless", "after_pivot"]
"""What undoes a step, or the word that says why nothing does."""


class StepClass(Protocol[V_contra, R_co]):
    """A step as a class; a method `compensate(self, outcome, value)` beside `execute` undoes it."""

    async def execute(self, value: V_contra, /) -> R_co:
        """Do the work."""
        ...


@dataclass(frozen=True, slots=True)
class Group(Generic[V_contra, R_co]):
    """Parts of a saga, from a value to a result; made by `sequence`, `parallel` and `when`.

    Attributes:
        kind: how the parts are executed.
        parts: steps and groups; of `when` the one for true, and the one for false where there is one.
        condition: of `when`.
    """

    kind: Literal["sequence", "parallel", "when"]
    parts: tuple[Part[Any, Any], ...]
    condition: Callable[[Any], bool] | None = None

    def __str__(self) -> str:
        inner = [str(part) if _is_group(part) else _name(part) for part in self.parts]
        if self.condition is None:
            return ", ".join(inner) if self.kind == "sequence" else f"{self.kind}({'; '.join(inner)})"
        return f"when({_condition(self.condition)}: {'; otherwise: '.join(inner)})"


def _is_group(part: object) -> TypeGuard[Group[Any, Any]]:
    return isinstance(part, Group)


Part: TypeAlias = Callable[[V], Awaitable[R]] | StepClass[V, R] | Group[V, R]
"""A part of a saga: an async function of one value, a `Step`, an object with `execute`, or a group of parts."""


@overload
def sequence(one: Part[V, R], /) -> Group[V, R]: ...
@overload
def sequence(one: Part[V, T1], two: Part[T1, R], /) -> Group[V, R]: ...
@overload
def sequence(one: Part[V, T1], two: Part[T1, T2], three: Part[T2, R], /) -> Group[V, R]: ...
@overload
def sequence(one: Part[V, T1], two: Part[T1, T2], three: Part[T2, T3], four: Part[T3, R], /) -> Group[V, R]: ...
@overload
def sequence(
    one: Part[V, T1], two: Part[T1, T2], three: Part[T2, T3], four: Part[T3, T4], five: Part[T4, R], /
) -> Group[V, R]: ...
@overload
def sequence(
    one: Part[V, T1],
    two: Part[T1, T2],
    three: Part[T2, T3],
    four: Part[T3, T4],
    five: Part[T4, T5],
    six: Part[T5, R],
    /,
) -> Group[V, R]: ...
@overload
def sequence(
    one: Part[V, T1],
    two: Part[T1, T2],
    three: Part[T2, T3],
    four: Part[T3, T4],
    five: Part[T4, T5],
    six: Part[T5, Any],
    seven: Part[Any, Any],
    /,
    *more: Part[Any, Any],
) -> Group[V, Any]: ...
def sequence(*parts: Part[Any, Any]) -> Group[Any, Any]:
    """Parts one after the other: the input goes to the first, each result to the next, and the last is the result.

    Types are followed through six parts; a longer sequence is one of sequences.

    Raises:
        TypeError: a part is none, or there are none.
    """
    return Group("sequence", _parts("sequence", parts))


@overload
def parallel(one: Part[V, T1], two: Part[V, T2], /) -> Group[V, tuple[T1, T2]]: ...
@overload
def parallel(one: Part[V, T1], two: Part[V, T2], three: Part[V, T3], /) -> Group[V, tuple[T1, T2, T3]]: ...
@overload
def parallel(
    one: Part[V, T1], two: Part[V, T2], three: Part[V, T3], four: Part[V, T4], /
) -> Group[V, tuple[T1, T2, T3, T4]]: ...
@overload
def parallel(*parts: Part[V, R]) -> Group[V, tuple[R, ...]]: ...
def parallel(*parts: Part[Any, Any]) -> Group[Any, Any]:
    """Parts side by side: each gets the same value, and the result is the tuple of theirs, as `flows.gather` does it.

    Raises:
        TypeError: a part is none, or there are none.
    """
    return Group("parallel", _parts("parallel", parts))


@overload
def when(condition: Callable[[V], bool], part: Part[V, R], /) -> Group[V, V | R]: ...
@overload
def when(condition: Callable[[V], bool], part: Part[V, R], /, *, otherwise: Part[V, T1]) -> Group[V, R | T1]: ...
def when(
    condition: Callable[[Any], bool], part: Part[Any, Any], /, *, otherwise: Part[Any, Any] | None = None
) -> Group[Any, Any]:
    """A part that is executed where a condition is true of the value, and another, or none, where it is not.

    Args:
        condition: a plain function that depends on the value alone: it is asked again on replay.
        part: for true.
        otherwise: for false; without it the value passes through.

    Raises:
        TypeError: a part is none, or the condition is no plain function.
    """
    if inspect.iscoroutinefunction(condition):
        msg = f"the condition {_name(condition)} is a plain function of the value; what asks others is a step before it"
        raise TypeError(msg)
    return Group("when", _parts("when", (part,) if otherwise is None else (part, otherwise)), condition)


def class_step(
    instance: StepClass[V, R], declare: Callable[[Callable[[V], Awaitable[R]]], Step[[V], R]]
) -> Step[[V], R]:
    """A step from an object with `execute` and, if there is something to undo, `compensate`; named by its class.

    Args:
        instance: the object.
        declare: `flows.step(…)`, with the options of the step.

    Raises:
        TypeError, ValueError: what `flows.step` and `step.compensation` say.
    """
    execute = instance.execute

    @wraps(execute)
    async def call(value: V) -> R:
        return await execute(value)

    call.__name__ = call.__qualname__ = type(instance).__name__
    call.__doc__ = type(instance).__doc__
    step = declare(call)
    step.own_code = own_code(execute)  # what stands between is ours, and does nothing
    undo: Any = getattr(instance, "compensate", None)
    if undo is not None:
        step.compensation(undo)
    return step


def saga(
    flows: WorkflowRouter,
    name: str,
    part: Part[V, R],
    *,
    compensations: Mapping[str, Undo] | None = None,
    version: int = 1,
) -> Workflow[[V], R]:
    """Declare a workflow by its steps.

    Args:
        flows: where it belongs, with those of its steps that are not declared yet.
        name: what records call it, for ever.
        part: what is executed; mostly a `sequence`.
        compensations: by the name of the step, what undoes it, or the word that says why nothing does: `harmless` or
            `after_pivot`. Each step stands in it that does not say so itself.
        version: as of `@flows.workflow`.

    Raises:
        TypeError: a step is missing in `compensations`, or says so itself; a key of it names no step; a step does not
            take one value, or branches side by side take different types.
        ValueError: a name is taken or breaks the rule for identifiers.
    """
    declare = flows.workflow(name=name, version=version)
    what, undos = f"saga {name!r}", dict(compensations or {})
    _check_map(what, part, undos)
    steps = _Steps(flows, what, undos)
    plan: Group[Any, Any] = Group("sequence", (_planned(part, steps),))

    async def execute(value: V, /) -> R:
        result: R = await _execute(flows, plan, value)
        return result

    execute.__name__ = execute.__qualname__ = name
    execute.__annotations__ = {"value": _input(what, plan), "return": _result(plan)}
    workflow = declare(execute)
    workflow.plan = plan
    return workflow


async def _execute(flows: WorkflowRouter, part: Any, value: Any) -> Any:
    """The one function that every saga is."""
    if not _is_group(part):
        return await part(value)
    if part.kind == "parallel":
        return await flows.gather(*(_execute(flows, inner, value) for inner in part.parts))
    if part.condition is not None:
        chosen = part.parts[:1] if part.condition(value) else part.parts[1:]
        return await _execute(flows, chosen[0], value) if chosen else value
    for inner in part.parts:
        value = await _execute(flows, inner, value)
    return value


# What is checked where it is declared


def _parts(kind: str, parts: tuple[Any, ...]) -> tuple[Any, ...]:
    if not parts:
        msg = f"{kind}() has no steps"
        raise TypeError(msg)
    for part in parts:
        if isinstance(part, type):
            msg = f"{kind}(…) takes objects, and {part.__name__} is a class: write {part.__name__}(…)"
            raise TypeError(msg)
        if not (_is_group(part) or hasattr(part, "execute") or callable(part)):
            msg = f"{kind}(…) takes async functions, steps, objects with `execute` and groups of them, and no {part!r}"
            raise TypeError(msg)
    return parts


def _leaves(part: Any) -> Iterator[Any]:
    if _is_group(part):
        for inner in part.parts:
            yield from _leaves(inner)
    else:
        yield part


def _says_itself(part: Any) -> bool:
    """Whether a step says without the map what undoes it, or why nothing does."""
    if isinstance(part, Step):
        step = cast("Step[..., Any]", part)
        return step.undo is not None or bool(step.policy.uncompensated)
    return hasattr(part, "execute") and hasattr(part, "compensate")


def _check_map(what: str, part: Any, undos: Mapping[str, Any]) -> None:
    """Refuse a map that is not exactly what the steps need, before anything is declared.

    Raises:
        TypeError: it is not; the message names every step concerned.
    """
    needs: dict[str, bool] = {}
    for leaf in _leaves(_parts("saga", (part,))[0]):
        needs[_name(leaf)] = not _says_itself(leaf)
    if unknown := sorted(undos.keys() - needs.keys()):
        msg = f"{what}: compensations name {', '.join(unknown)}, and its steps are {', '.join(needs)}"
        raise TypeError(msg)
    if missing := [name for name, needed in needs.items() if needed and name not in undos]:
        msg = (
            f"{what}: compensations do not name {', '.join(missing)}: name what undoes a step, or say 'harmless' if it "
            "leaves nothing to undo, or 'after_pivot' if it is executed only after a pivot"
        )
        raise TypeError(msg)
    if twice := [name for name in undos if not needs[name]]:
        msg = f"{what}: {', '.join(twice)} in compensations, and the step itself says what undoes it: keep one"
        raise TypeError(msg)
    for name, undo in undos.items():
        if undo not in _WORDS and not callable(undo):
            msg = f"{what}: the compensation of {name} is a function, or 'harmless', or 'after_pivot', and not {undo!r}"
            raise TypeError(msg)


class _Steps:
    """Makes the steps of a saga; a function or an object that stands in it twice is one step."""

    def __init__(self, flows: WorkflowRouter, what: str, undos: Mapping[str, Any]) -> None:
        self._flows = flows
        self._what = what
        self._undos = undos
        self._made: dict[int, Step[..., Any]] = {}

    def of(self, part: Any) -> Step[..., Any]:
        """The step of a part that is no part."""
        if id(part) not in self._made:
            self._made[id(part)] = self._make(part)
        return self._made[id(part)]

    def _make(self, part: Any) -> Step[..., Any]:
        undo: Any = self._undos.get(_name(part))
        declare: Any = self._flows.step(harmless=undo == "harmless", after_pivot=undo == "after_pivot")
        step: Step[..., Any]
        if isinstance(part, Step):
            step = cast("Step[..., Any]", part)
            if undo in _WORDS:
                msg = f"{self._what}: {step.name} has options of its own: write {undo}=True among them"
                raise TypeError(msg)
        else:
            step = class_step(part, declare) if hasattr(part, "execute") else declare(part)
        try:
            step.signature.bind((None,), {})
        except TypeError as error:
            msg = f"{self._what} hands each step one value: {error}"
            raise TypeError(msg) from None
        if undo not in {None, *_WORDS}:
            step.compensation(undo)
        return step


def _planned(part: Any, steps: _Steps) -> Any:
    """The same tree, with a step for each function and object."""
    if not _is_group(part):
        return steps.of(part)
    planned: Group[Any, Any] = Group(part.kind, tuple(_planned(inner, steps) for inner in part.parts), part.condition)
    return planned


def _input(what: str, part: Any) -> Any:
    """The type of the value that a part takes.

    Raises:
        TypeError: its branches take different ones.
    """
    if not _is_group(part):
        return part.signature.hint(0)
    types = [_input(what, inner) for inner in part.parts]
    if part.kind != "sequence" and any(each != types[0] for each in types):
        msg = f"{what}: the branches of {part} take {', '.join(map(_type, types))}: one value goes to all of them"
        raise TypeError(msg)
    return types[0]


def _result(part: Any) -> Any:
    """The type of what a part returns."""
    if not _is_group(part):
        return part.signature.hint("return")
    types = [_result(inner) for inner in part.parts]
    if part.kind == "sequence":
        return types[-1]
    if part.kind == "parallel":
        return tuple[tuple(types)]  # type: ignore[misc]  # built from signatures
    if len(types) == 1:
        types.append(_input("", part))
    return Union[tuple(types)]  # noqa: UP007  the same


# How it is named and drawn


def _name(part: Any) -> str:
    if isinstance(part, Step):
        return cast("Step[..., Any]", part).name
    named = None if hasattr(part, "execute") else getattr(part, "__name__", None)
    return named or type(part).__name__


def _condition(condition: Callable[..., object]) -> str:
    name = _name(condition)
    return "condition" if name == "<lambda>" else name


def _type(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def diagram(workflow: Workflow[..., Any]) -> str:
    """The steps of a saga as a Mermaid flowchart; what undoes each stands beside it.

    Raises:
        TypeError: the workflow is a function, and not declared by `saga`.
    """
    if workflow.plan is None:
        msg = f"workflow {workflow.name!r} is a function: only a saga declares what can be drawn"
        raise TypeError(msg)
    return _Flowchart(f"{workflow.name}, version {workflow.version}", workflow.plan).text


class _Flowchart:
    """Lines of Mermaid, with a number for each node."""

    def __init__(self, title: str, plan: Any) -> None:
        self._count = 0
        self._lines = ["flowchart TD"]
        ends = self._draw(plan, [(self._node("([", title, "])"), "")])
        self._node("([", "end", "])", ends)
        self.text = "\n".join(self._lines) + "\n"

    def _node(self, left: str, label: str, right: str, before: list[tuple[str, str]] | None = None) -> str:
        self._count += 1
        node = f"n{self._count}"
        self._lines.append(f'    {node}{left}"{label}"{right}')
        for end, word in before or []:
            self._lines.append(f"    {end} -->{f'|{word}|' if word else ''} {node}")
        return node

    def _draw(self, part: Any, before: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Draw a part after the ends of what is before it, each with a word for its arrow; return the ends of it."""
        if not _is_group(part):
            return [(self._step(cast("Step[..., Any]", part), before), "")]
        if part.kind == "sequence":
            for inner in part.parts:
                before = self._draw(inner, before)
            return before
        if part.condition is None:
            return [end for inner in part.parts for end in self._draw(inner, before)]
        question = self._node("{", _condition(part.condition), "}", before)
        ends = self._draw(part.parts[0], [(question, "yes")])
        otherwise = [(question, "no")]
        return ends + (self._draw(part.parts[1], otherwise) if len(part.parts) > 1 else otherwise)

    def _step(self, step: Step[..., Any], before: list[tuple[str, str]]) -> str:
        why = "".join(f" ({word.replace('_', ' ')})" for word in step.policy.uncompensated)
        node = self._node("[", step.name + why, "]", before)
        if step.undo is not None:
            self._lines.append(f"    {node} -.- {self._node('[', f'undo: {_name(step.undo)}', ']')}")
        return node
