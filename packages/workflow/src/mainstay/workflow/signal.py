"""Signals: what somebody outside tells a run that waits for it, or will."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from mainstay.core import Binding, Kept, derived_id, once
from mainstay.workflow import _names
from mainstay.workflow._branch import current_branch
from mainstay.workflow._seconds import checked_seconds
from mainstay.workflow.errors import NotInRun

if TYPE_CHECKING:
    from mainstay.workflow.engine import WorkflowEngine

__all__ = ["Signal"]

T = TypeVar("T")


class Signal(Generic[T]):
    """A named kind of message with a type; made by `flows.signal(name, type)`.

    Attributes:
        name: part of every record, for ever.
    """

    def __init__(self, name: str, kind: type[T], binding: Binding[WorkflowEngine]) -> None:
        self.name = name
        self._kept: Kept[T] = Kept(kind, f"signal {name}: its value")
        self._binding = binding

    def check(self) -> None:
        """Refuse a type whose values would not come back equal.

        Raises:
            TypeError: the message names the field, and the remedy.
        """
        self._kept.check()

    def __repr__(self) -> str:
        return f"<signal {self.name}>"

    async def send(self, run_id: str, value: T, *, id: str | None = None) -> None:
        """Tell the run, whether it waits already, will later, or has not been started yet.

        Durable when this returns, or, inside `db.transaction()`, with its commit. Each one is received once. Inside a
        workflow function it is a recorded step: a replay sends nothing again.

        Args:
            run_id: the run's id.
            value: of the signal's type.
            id: names the message within the run: sent again with the same id and an equal value, it is the same
                message, also once it is received and the run has ended.

        Raises:
            TypeError: the value would not come back equal as the signal's type, or an id is no text.
            SignalConflict: the id belongs to a message of another signal or with another value. In a `db.batch()`,
                which writes at its end, only one that was there before is seen.
            RunStateError: the run has ended.
            ValueError: an id breaks the rule for identifiers, 1 to 128 of the characters in `mainstay.core.ID_RULE`.
            NotBoundError: the router is not part of a running App.
        """
        run_id = _names.run_id(run_id)
        chosen = None if id is None else _names.signal_id(id)
        text = self._kept.write(value)
        engine = self._binding.get()

        async def send(key: str | None) -> None:
            of_step = None if key is None else str(derived_id(key))
            await engine.send(run_id, self.name, text, of_step if chosen is None else chosen, same=self._same_as(text))

        arguments = (run_id, value, chosen)
        await once(f"send:{self.name}", send, transactional=False, arguments=lambda: arguments)

    def _same_as(self, text: str) -> Callable[[str], bool]:
        """Whether what a message was sent with is this value, as today's type reads both."""

        def same(there: str) -> bool:
            try:
                return there == text or self._kept.same(self._kept.read(there), self._kept.read(text))
            except ValueError:  # another release sent it
                return False

        return same

    async def wait(self, timeout_seconds: float | None = None) -> T:
        """In a workflow function: wait for the next message that is not received yet, durably and without memory.

        Raises:
            NotInRun: this is no workflow function.
            StepFailed: nothing came within `timeout_seconds`; its `error_type` is `DeadlineExceeded`.
            TypeError: `timeout_seconds` is no number.
            ValueError: it is negative or not finite.
        """
        if timeout_seconds is not None:
            checked_seconds("wait: timeout_seconds", timeout_seconds)
        branch = current_branch.get()
        if branch is None:
            msg = f"signal {self.name} was waited for outside a run: only workflow functions wait for signals"
            raise NotInRun(msg)
        result: T = await branch.primitives.receive(branch, self.name, self._kept.read, timeout_seconds)
        return result
