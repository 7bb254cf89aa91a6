"""Where in a run code executes: the workflow function itself, or one branch of a gather."""

from __future__ import annotations

from contextvars import ContextVar
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
