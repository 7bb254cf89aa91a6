"""The health of a running part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

__all__ = ["HasHealth", "HasHealthParts", "Health"]


@dataclass(frozen=True, slots=True)
class Health:
    """The state of one part.

    Attributes:
        status: `ok`, `degraded` (it works, with less than it should have) or `down`.
        detail: a sentence for the person on call, without secrets.
    """

    status: Literal["ok", "degraded", "down"]
    detail: str = ""


@runtime_checkable
class HasHealth(Protocol):
    """A service that a module yields may have this method; `App.health()` finds it."""

    async def health(self) -> Health:
        """Answer quickly, from what is known; the caller sets the time limit."""
        ...


@runtime_checkable
class HasHealthParts(Protocol):
    """A service that speaks for several parts, each of which is asked, and is late, for itself."""

    def health_parts(self) -> Mapping[str, HasHealth]:
        """The parts by their names in `App.health()`, such as `dependency.payments`."""
        ...
