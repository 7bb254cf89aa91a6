"""Where in a run code executes: the workflow function itself, or one branch of a gather."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mainstay.workflow._primitives import Primitives


class Branch:
    """One line of execution of a run. It numbers what happens in it, so that a replay finds its own records.

    Attributes:
        prefix: of the keys in this branch: empty for the function itself, `1.0/` for the first branch of gather 1.
        outer: the branch that called the gather; None for the function itself.
        position: how many primitives were called in it.
        gathers: how many of them were gathers.
        occurrences: how often each label was called.
        busy: a primitive of it is running, so that no other may begin.
    """

    __slots__ = ("busy", "gathers", "occurrences", "outer", "position", "prefix", "primitives")

    def __init__(self, primitives: Primitives, prefix: str, outer: Branch | None = None) -> None:
        self.primitives = primitives
        self.prefix = prefix
        self.outer = outer
        self.position = 0
        self.gathers = 0
        self.occurrences: dict[str, int] = {}
        self.busy = False


current_branch: ContextVar[Branch | None] = ContextVar("mainstay_workflow_branch", default=None)


@dataclass(slots=True)
class SharedCommit:
    """The transaction of a transactional step, which its record shares: it is rolled back where that is refused.

    Attributes:
        run_id: the run's.
        unless_cancelled: the record is refused also where the run is to be cancelled.
        going_on: it is not at its end, which a task that the step began may outlive.
    """

    run_id: str
    unless_cancelled: bool
    going_on: bool = True


_shared_commit: ContextVar[SharedCommit | None] = ContextVar("mainstay_workflow_shared_commit", default=None)


def shared_commit() -> SharedCommit | None:
    """That of the step whose code is running, if it is transactional."""
    shared = _shared_commit.get()
    return shared if shared is not None and shared.going_on else None


@contextmanager
def sharing_commit(run_id: str, *, unless_cancelled: bool) -> Generator[None, None, None]:
    """A transactional step of a run is executed within the block."""
    shared = SharedCommit(run_id, unless_cancelled)
    token = _shared_commit.set(shared)
    try:
        yield
    finally:
        shared.going_on = False
        _shared_commit.reset(token)
