"""How a claim of a run ends in the tables: ended, failed, continued, parked, given back."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from mainstay.workflow._metrics import count_continued
from mainstay.workflow._recording import Recording
from mainstay.workflow._surroundings import Surroundings
from mainstay.workflow._verdict import plain_text
from mainstay.workflow.errors import Continued, Lost, Parked
from mainstay.workflow.tables import (
    CLOSE_ASKS,
    CONTINUE,
    END,
    FAIL,
    FORGET_HISTORY,
    FORGET_RECEIVED,
    FORGET_SETTLED_ASKS,
    PARK,
    RELEASE,
    ROUSE,
)
from mainstay.workflow.workflow import RunStatus

_log = logging.getLogger("mainstay.workflow")

Failure = dict[str, Any] | None


class LastWords:
    """Writes them, each in one commit with what is still to be recorded.

    Args:
        epoch: of the claim; the words of an older one are refused.
        parent: the run that waits for this one.
    """

    def __init__(
        self, run_id: str, epoch: int, parent: str | None, *, recording: Recording, around: Surroundings
    ) -> None:
        self._run_id = run_id
        self._claim = {"run": run_id, "at_epoch": epoch}
        self._parent = parent
        self._recording = recording
        self._around = around

    async def fail(self, failure: Failure) -> None:
        """From here on the run only goes back, in whichever process."""
        asks = CLOSE_ASKS, {"run": self._run_id}
        await self._recording.end((FAIL, {**self._claim, "failure": json.dumps(failure)}), asks)

    async def end(self, status: RunStatus, output: str | None, failure: Failure, *, unless_cancelled: bool) -> None:
        """The run has ended; its parent has news. Raises what `Recording.end` does."""
        kept = None if failure is None else json.dumps(failure)
        values = {**self._claim, "status": status, "output": self._recording.sealed(output), "failure": kept}
        news = [] if self._parent is None else [(ROUSE, {"run": self._parent})]
        await self._recording.end((END, values), *news, unless_cancelled=unless_cancelled)
        if self._parent is not None:
            self._around.wake(self._parent)

    async def go_on(self, following: Continued, *, unless_cancelled: bool) -> None:
        """Begin the next generation of the run: with the new input, and without anything that this one did.

        Raises what `Recording.end` does.
        """
        run = {"run": self._run_id}
        following_input = self._recording.sealed(following.input)
        again = {**self._claim, "next_version": following.version, "next_input": following_input}
        kept = {**run, "kept_seconds": self._around.keep_signals_seconds}
        forgotten = ((FORGET_HISTORY, run), (FORGET_RECEIVED, kept), (FORGET_SETTLED_ASKS, run))
        await self._recording.end(*forgotten, (CONTINUE, again), unless_cancelled=unless_cancelled)
        count_continued(following.workflow)

    async def park(self, status: RunStatus, note: str, *, cancellable: bool) -> None:
        """The run waits for a person, unless it is to be cancelled and there is a way back."""
        values = {**self._claim, "status": status, "note": plain_text(note), "cancellable": cancellable}
        await self._give_back(PARK, values)

    async def release(self, delay: float, *, seen: int, knows: bool) -> None:
        """The run goes back into the queue, due after `delay` seconds or with the next news that it has not seen.

        Args:
            delay: in seconds.
            seen: how much of its news this execution has seen.
            knows: whether it knows of a cancellation.
        """
        await self._give_back(RELEASE, {**self._claim, "delay": delay, "seen": seen, "knows": knows})

    async def _give_back(self, statement: Any, values: Mapping[str, Any]) -> None:
        try:
            try:
                await self._recording.end((statement, values))
            except Parked as refused:  # for good, and by every worker: the run leaves without what it has to record
                self._recording.drop()
                note = f"{refused}. An outcome may be missing from its record; find out why, then resume it"
                parked = {"status": RunStatus.PARKED, "note": plain_text(note), "cancellable": False}
                await self._recording.end((PARK, {**self._claim, **parked}))
        except (Lost, Parked) as signal:
            _log.warning("run %s could not be given back (%s): another worker will take it over", self._run_id, signal)
