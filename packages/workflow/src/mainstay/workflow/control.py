"""What people do to runs: cancel, compensate, resume, retry, fork and terminate them."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from mainstay.core import Clock, FullJitter, Retry, RetryState, current
from mainstay.database import Database, DatabaseError
from mainstay.workflow import _decisions, _metrics, _names
from mainstay.workflow._fork import fork
from mainstay.workflow._payloads import Payloads
from mainstay.workflow._results import Results
from mainstay.workflow._verdict import plain_text
from mainstay.workflow._worker import Worker
from mainstay.workflow.workflow import RunStatus

__all__ = ["RunControl"]

T = TypeVar("T")

_log = logging.getLogger("mainstay.workflow")


def _was_refused(state: RetryState, /) -> bool:
    """Whether the database did nothing, and may do it the next time."""
    error = state.outcome.exception()
    return isinstance(error, DatabaseError) and error.retryable


class RunControl:
    """The part of `WorkflowEngine` by which people decide what becomes of a run."""

    def __init__(
        self, database: Database, clock: Clock, *, payloads: Payloads, worker: Worker, results: Results
    ) -> None:
        self._database = database
        self._again = Retry(5, FullJitter(0.05, 1.0), retry=_was_refused, clock=clock)
        self._payloads = payloads
        self._results = results
        self.worker = worker

    async def cancel(self, id: str) -> None:
        """What `Handle.cancel` does; a parked run is compensated right away.

        Raises:
            RunStateError: it has ended, is stuck on its way back, or a pivot of it is done or may be.
            RunNotFound: it does not exist.
        """
        _names.run_id(id)
        await self._decide(lambda session: _decisions.cancel(session, id), lambda _: self.worker.cancel(id))

    async def compensate(self, id: str) -> None:
        """Undo a run: cancel one that has not ended, and take one that is completed back.

        Raises:
            RunStateError: a pivot of it is done or may be, or everything of it is undone already.
            RunNotFound: it does not exist.
        """

        def told(_: None) -> None:
            self.worker.cancel(id)
            self.worker.announce()

        _names.run_id(id)
        await self._decide(lambda session: _decisions.compensate(session, id), told)

    async def resume(self, id: str) -> None:
        """Let a parked run go on where it stopped, forward or back, with all attempts of the step that was stuck.

        Raises:
            RunStateError: it is not parked.
            RunNotFound: it does not exist.
        """
        _names.run_id(id)
        await self._decide(lambda session: _decisions.resume(session, id), lambda _: self.worker.announce())

    async def retry_from(self, id: str, step: str) -> None:
        """Let a parked run go on from a step: it and each step that began later is attempted again, under the same key.

        What they did before may have happened: a way back undoes it, also where the new attempt fails. Transactional
        steps that are done, events, signals, children and waits keep their records. A function that then takes another
        way is parked, since its record has more than it reads.

        Args:
            id: the run.
            step: the step's key within the run, such as `charge:1`; `mainstay workflow show` lists them.

        Raises:
            RunStateError: it is not parked on its way forward; or it has no such step; or a pivot from there on took
                effect or may have; or one of the steps is undone already.
            RunNotFound: it does not exist.
        """
        _names.run_id(id)
        await self._decide(lambda session: _decisions.retry_from(session, id, step), lambda _: self.worker.announce())

    async def fork(self, id: str, *, before: str, new_id: str) -> str:
        """Begin a new run that has the input of one that has ended, and what it did before a step.

        What is inherited is not executed again, and stays the original's: the new run never undoes it. From the step on
        everything is executed anew, under keys of the new run, whatever the original did there. Steps that were going
        on beside it are executed anew as well; signals that the original received are inherited.

        Args:
            id: the original.
            before: the key of a step or wait of it, such as `charge:1`; `mainstay workflow show` lists them.
            new_id: the new run's. The same fork again is the same run.

        Returns:
            `new_id`.

        Raises:
            RunStateError: the original goes on, or is a child; or it has no such step; or what would be inherited is
                undone, in part or whole, or is a pivot that may have taken effect.
            RunNotFound: there is no original.
            RunConflict: `new_id` is the id of another run.
            PayloadUnreadable: what would be inherited was stored by a codec that this App does not have.
            ValueError: `new_id` cannot be an id.
        """

        def told(workflow: str | None) -> None:
            if workflow is not None:
                self.worker.announce()
                _metrics.count_start(workflow)

        _names.run_id(id)
        _names.run_id(new_id)
        await self._decide(lambda session: fork(session, id, before, new_id, payloads=self._payloads), told)
        return new_id

    async def terminate(self, id: str, *, reason: str) -> None:
        """End a run at once and undo nothing: the last resort, where `cancel` and `resume` do not help.

        What the run did is left to whom it may concern. It writes nothing more and begins nothing more; a step that is
        being executed goes on to its end, which is not recorded. The children that it waits for are terminated with
        it. A parent that waits for it gets `WorkflowFailed`, and does not undo it either.

        Args:
            id: the run.
            reason: why; kept, with the actor of the context, in the run's failure.

        Raises:
            RunStateError: it has ended.
            RunNotFound: it does not exist.
            ValueError: there is no reason.
        """
        why = plain_text(reason)
        _names.run_id(id)
        await self._decide(
            lambda session: _decisions.terminate(session, id, why), lambda ended: self._terminated(ended, reason)
        )

    async def _decide(self, decision: Callable[[AsyncSession], Awaitable[T]], told: Callable[[T], None]) -> None:
        """Carry out what a person decides, in one transaction, and tell this process of it after the commit."""

        async def once() -> None:
            async with self._database.transaction() as session:
                done = await decision(session)
                self._database.after_commit(lambda: told(done))

        if self._database.in_unit_of_work():  # its owner repeats it
            await once()
        else:
            # A decision holds a run and then its children, the end of a child holds the child and then its parent:
            # where two meet the database refuses one of them.
            await self._again.call(once)

    def _terminated(self, ended: Mapping[str, str], reason: str) -> None:
        for run_id, workflow in ended.items():
            _log.warning(
                "run %s of %s was terminated by %s: %s", run_id, workflow, current().actor or "a person", reason
            )
            _metrics.count_end(workflow, RunStatus.TERMINATED)
            self.worker.lose(run_id)
            self._results.ended(run_id, None, None, None)
        self.worker.announce()
