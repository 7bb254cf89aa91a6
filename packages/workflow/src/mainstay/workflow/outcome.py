"""How a step ended: done, failed or unknown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Done", "Failed", "Unknown"]

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Done(Generic[T_co]):
    """The step took effect; `result` is what it returned."""

    result: T_co


@dataclass(frozen=True, slots=True)
class Failed:
    """Certainly nothing happened on the other side. A probe answers with this; a failed step is never compensated."""

    detail: str = ""


@dataclass(frozen=True, slots=True)
class Unknown:
    """Something may have happened, or may still: the attempt ended by an error, a timeout or a crash.

    A compensation that receives this tolerates that there is nothing to undo, and sees to it that the original, should
    it arrive late, finds its key used up.
    """

    detail: str = ""
