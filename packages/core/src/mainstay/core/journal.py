"""The seam between durable execution and the packages that have effects.

A workflow function may run several times; what it publishes or writes to the audit trail must happen once. Code
with such an effect hands it to `once`: inside a workflow it becomes a recorded step, elsewhere it simply runs. The
package that implements `Journal` and those that call `once` know nothing of each other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Effect", "Journal", "bind_journal", "once"]

Effect = Callable[[str | None], Awaitable[None]]
"""Called with the step's key, from which every id it makes must derive (`derived_id`), or None outside a workflow."""


class Journal(Protocol):
    """What a durable run offers to effects inside it."""

    async def once(
        self, name: str, effect: Effect, *, transactional: bool, arguments: Callable[[], object] | None = None
    ) -> str:
        """Run `effect` unless the run already records it as done, record it, and return the step's key.

        Args:
            name: what the effect is, stable between replays, such as `publish:order.paid`.
            effect: the work. It may be repeated with the same key if the process dies before the record is durable.
            transactional: the effect writes through the database's unit of work and nowhere else. It then runs inside
                one, and shares its commit with the record, so that neither can be there without the other.
            arguments: makes what the effect is called with, as `digest` takes it. A replay that calls it with others is
                another program than the one whose record it reads. Without them the name says it all.
        """
        ...


_journal: ContextVar[Journal | None] = ContextVar("mainstay_journal", default=None)


async def once(
    name: str, effect: Effect, *, transactional: bool, arguments: Callable[[], object] | None = None
) -> str | None:
    """Run `effect` through the journal of the surrounding run, or straight away where there is none: `Journal.once`.

    Returns:
        The step's key, which was handed to the effect when it ran; None outside a workflow.
    """
    journal = _journal.get()
    if journal is None:
        await effect(None)
        return None
    return await journal.once(name, effect, transactional=transactional, arguments=arguments)


class bind_journal:  # noqa: N801  used like a function: `with bind_journal(journal):`
    """Use `journal` inside a `with` block; None keeps a step's own code from being journaled a second time."""

    __slots__ = ("_journal", "_token")

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal

    def __enter__(self) -> None:
        self._token: Token[Journal | None] = _journal.set(self._journal)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _journal.reset(self._token)
