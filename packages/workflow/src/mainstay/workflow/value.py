"""Values: what a run tells others while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Generic, TypeVar

from mainstay.core import Binding, Kept
from mainstay.workflow import _names
from mainstay.workflow._branch import current_branch
from mainstay.workflow._values import current_voice
from mainstay.workflow.errors import NotInRun

if TYPE_CHECKING:
    from mainstay.workflow.engine import WorkflowEngine

__all__ = ["Published", "Value", "ValueView"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Published(Generic[T]):
    """A value of a run, as it was set last.

    Attributes:
        value: of the declared type.
        at: when it was set, by the database's clock.
        set_by: the step that set it, as the run's record names it (`import_rows:1`), or the place in the function.
    """

    value: T
    at: datetime
    set_by: str


@dataclass(frozen=True, slots=True)
class ValueView:
    """A value of a run, for people.

    Attributes:
        name: of the value.
        body: it as JSON.
        at, set_by: as of `Published`.
    """

    name: str
    body: str
    at: datetime
    set_by: str


class Value(Generic[T]):
    """A named value with a type that runs publish; made by `flows.value(name, type)`.

    Attributes:
        name: part of every record, for ever.
    """

    def __init__(self, name: str, kind: type[T], binding: Binding[WorkflowEngine]) -> None:
        self.name = name
        self._kept: Kept[T] = Kept(kind, f"value {name}")
        self._binding = binding

    def check(self) -> None:
        """Refuse a type whose values would not come back equal.

        Raises:
            TypeError: the message names the field, and the remedy.
        """
        self._kept.check()

    def __repr__(self) -> str:
        return f"<value {self.name}>"

    async def set(self, value: T) -> None:
        """Publish a value of the run around this call, in place of the one before.

        In a workflow function it is a place in the record: durable when this returns, and set once, also on replay. In
        the code of a step it is what `report` does.

        Raises:
            NotInRun: there is no run around it.
            TypeError: in a step: the value would not come back equal as the declared type. In a workflow function that
                parks the run.
        """
        branch = current_branch.get()
        if branch is None:
            self.report(value)
        else:
            await branch.primitives.publish(branch, self.name, self._kept, value)

    def report(self, value: T) -> None:
        """In the code of a step, an `async def` or a plain one: publish how far it is, without waiting.

        The newest value is written soon, the ones before it may never be; a database that is away delays it and fails
        nothing. What a thread reports after the end of its attempt is dropped.

        Raises:
            NotInRun: this is not the code of a step.
            TypeError: the value would not come back equal as the declared type.
        """
        voice = current_voice.get()
        if voice is None or current_branch.get() is not None:
            msg = (
                f"value {self.name} was reported outside the code of a step: a workflow function says "
                "`await ….set(…)`, and only runs and their steps have values"
            )
            raise NotInRun(msg)
        voice.say(self.name, self._kept.write(value))

    async def of(self, run_id: str) -> Published[T] | None:
        """The value that a run has set last, also after its end; None where it has set none.

        Raises:
            RunNotFound: there is no such run.
            ValueError: the id breaks the rule for identifiers, or what another release has set does not fit the type.
            NotBoundError: the router is not part of a running App.
        """
        found = await self._binding.get().values(_names.run_id(run_id), self.name)
        if not found:
            return None
        (view,) = found
        return Published(self._kept.read(view.body), view.at, view.set_by)
