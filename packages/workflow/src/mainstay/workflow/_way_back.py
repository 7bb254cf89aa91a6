"""The way back of a run: what it did, or may have done, is undone in reverse order of completion."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from mainstay.workflow._attempts import Attempts, Exhausted, nothing
from mainstay.workflow._effects import Work
from mainstay.workflow._history import COMPENSATION, History, Keys, StepRecord, StepState, is_child, step_of
from mainstay.workflow._metrics import count_step
from mainstay.workflow._signature import Signature
from mainstay.workflow._verdict import error_text
from mainstay.workflow.errors import CompensationExhausted, Parked
from mainstay.workflow.outcome import Done, Unknown
from mainstay.workflow.step import AnyStep

T = TypeVar("T")


class WayBack:
    """Undoes the steps of one run.

    Args:
        steps: every step of the App, by name: compensations are found through it.
        undo_child: cancels or compensates a child, and waits until that is done.
    """

    def __init__(
        self,
        keys: Keys,
        *,
        history: History,
        attempts: Attempts,
        steps: Mapping[str, AnyStep],
        undo_child: Callable[[StepRecord], Awaitable[None]],
    ) -> None:
        self._keys = keys
        self._history = history
        self._attempts = attempts
        self._steps = steps
        self._undo_child = undo_child

    async def undo(self, *, only_unknown: bool) -> None:
        """Undo all that was done or may have been, or only what is unknown.

        Raises:
            CompensationExhausted: one of the compensations used up its attempts.
            Parked: one cannot be executed as things are.
        """
        taken = [
            record
            for record in self._history.records.values()
            if not record.key.endswith(COMPENSATION)
            and not record.inherited
            and (record.state is StepState.UNKNOWN if only_unknown else self._counts(record))
        ]
        for record in sorted(taken, key=lambda record: record.seq, reverse=True):
            if is_child(record.key):
                await self._undo_child(record)
            elif not step_of(record.key).startswith("@"):  # another package's effect has no way back of its own
                await self._undo(record)

    def _counts(self, record: StepRecord) -> bool:
        return record.may_have_happened or (is_child(record.key) and record.seq > 0)

    async def _undo(self, record: StepRecord) -> None:
        name = step_of(record.key)
        step = self._steps.get(name)
        if step is None:
            msg = f"no step {name} is known here, so {record.key} cannot be undone: bring it back under its name"
            raise CompensationExhausted(msg)
        if step.undo is None:
            return
        key = record.key + COMPENSATION
        mine = self._history.records.get(key) or self._history.put(key, None)
        if mine.state is StepState.DONE:
            return

        def read() -> tuple[dict[str, Any], Done[Any] | Unknown]:
            return arguments_of(step.signature, record), _outcome(step, record)

        given = anew(read(), read)
        work = Work(
            name=f"{name}{COMPENSATION}",
            policy=step.undo_policy,
            call=lambda: partial(step.call_undo, *given()),
            keep=nothing,
            undoes=self._keys.of(record.key),
        )
        try:
            await self._attempts.until_done(work, mine)
        except Exhausted as end:
            count_step(work.name, StepState.FAILED)
            msg = f"{key} used up its {mine.attempts} attempts: {error_text(end.error)}"
            raise CompensationExhausted(msg) from end.cause


def _outcome(step: AnyStep, record: StepRecord) -> Done[Any] | Unknown:
    if record.state is StepState.DONE:
        return Done(load(step.signature.load_result, record))
    return Unknown(error_text(record.error) if record.error else "its end was never recorded")


def anew(first: T, read: Callable[[], T]) -> Callable[[], T]:
    """What each attempt is given: the code of the one before may have changed what that one got.

    Args:
        first: for the first attempt.
        read: makes it from the record for every later one.
    """
    left = [first]
    return lambda: left.pop() if left else read()


def load(read: Callable[[str], Any], record: StepRecord) -> Any:
    """The recorded result, as today's code reads it.

    Raises:
        Parked: it cannot.
    """
    try:
        return read(record.output or "null")
    except ValueError as error:
        msg = f"the recorded result of {record.key} does not fit any more: {error}"
        raise Parked(msg) from error


def arguments_of(signature: Signature, record: StepRecord) -> dict[str, Any]:
    """The recorded input of a step or a child, as today's code reads it.

    Raises:
        Parked: it cannot.
    """
    try:
        return signature.load_arguments(record.input or "{}")
    except ValueError as error:
        msg = f"the recorded input of {record.key} does not fit the parameters any more: {error}"
        raise Parked(msg) from error
