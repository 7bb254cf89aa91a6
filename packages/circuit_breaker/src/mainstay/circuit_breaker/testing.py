"""For tests of code that calls others: a dependency that does as it is told, and circuits held in a state.

Time is moved by `mainstay.core.testing.VirtualClock`: pass it to the breaker, or to the App.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from mainstay.circuit_breaker.breaker import CircuitBreaker
from mainstay.circuit_breaker.circuit import Circuit
from mainstay.circuit_breaker.states import State

__all__ = ["HANG", "Call", "Dependency", "forced"]

HANG: Final = object()
"""An outcome that never comes; the call ends when it is cancelled."""


@dataclass(frozen=True, slots=True)
class Call:
    """One recorded call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])


class Dependency:
    """Stands in for what is called: takes its outcomes from a script, and records every call.

    Args:
        outcomes: one for each call, in order. An exception (or a class of one) is raised, `HANG` waits until cancelled,
            anything else is returned.
        then: the outcome of every call after those.

    `await dependency(…)` is the call of async code, `dependency.sync(…)` that of plain code.
    """

    def __init__(self, *outcomes: object, then: object = None) -> None:
        self.calls: list[Call] = []
        self.under_way = 0
        self.most_under_way = 0
        self.then = then
        self._outcomes = list(outcomes)
        self._gate = asyncio.Event()
        self._gate.set()

    def hold(self) -> None:
        """Let calls wait inside the dependency until `let_go`."""
        self._gate.clear()

    def let_go(self) -> None:
        """Let the held calls end."""
        self._gate.set()

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Be called."""
        outcome = self._begin(args, kwargs)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            if outcome is HANG:
                await asyncio.get_running_loop().create_future()
            await self._gate.wait()
            return _end(outcome)
        finally:
            self.under_way -= 1

    def sync(self, *args: Any, **kwargs: Any) -> Any:
        """Be called by plain code; cannot hang."""
        return _end(self._begin(args, kwargs))

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        self.calls.append(Call(args, kwargs))
        return self._outcomes.pop(0) if self._outcomes else self.then


def _end(outcome: Any) -> Any:
    if isinstance(outcome, BaseException) or (inspect.isclass(outcome) and issubclass(outcome, BaseException)):
        raise outcome
    return outcome


@contextmanager
def forced(of: CircuitBreaker | Circuit, state: State, *, reason: str = "forced by a test") -> Generator[Circuit]:
    """Put the circuit of a breaker, or of one key, into `state`; it is closed and empty before and after the block.

    It goes on from there as it would by itself: an open one is half open once its break is over.
    """
    circuit = of.circuit if isinstance(of, CircuitBreaker) else of
    circuit.reset(reason)
    with circuit.lock:
        change = circuit._open_locked(reason) if state is State.OPEN else None
        if state is State.RAMPING:
            change = circuit._recover_locked(reason)
        elif change is None and state is not State.CLOSED:
            change = circuit._enter_locked(state, reason)
    circuit.rules.announce(change)
    try:
        yield circuit
    finally:
        circuit.reset(reason)
