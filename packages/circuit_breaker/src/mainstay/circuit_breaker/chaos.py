"""Faults on purpose: to see what the policies around a call make of them."""

from __future__ import annotations

import logging
import random
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Final, cast

from mainstay.circuit_breaker._checks import require
from mainstay.circuit_breaker.policy import Layer, Policy
from mainstay.core import SYSTEM_CLOCK, Clock

__all__ = ["Chaos", "Fault"]

_log = logging.getLogger("mainstay.circuit_breaker")
_PASS: Final = object()

MAX_SECONDS = 3600.0
"""No simulation lasts longer; for more, begin another."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to a share of the calls.

    Attributes:
        rate: share of the calls it happens to. (0, 1]
        seconds: how long the call is held up first. >= 0
        error: makes the exception that is raised, for example `TimeoutError`; None raises nothing.
        result: what is returned without making the call; only where there is no `error`.

    Raises:
        ValueError: a number out of its range, an `error` that makes nothing, or a fault that would do nothing.
    """

    rate: float
    seconds: float = 0.0
    error: Callable[[], Exception] | None = None
    result: object = _PASS

    def __post_init__(self) -> None:
        require("Fault", "rate", self.rate, "more than 0, at most 1", holds=0 < self.rate <= 1)
        require("Fault", "seconds", self.seconds, "0 or more, and finite", holds=0 <= self.seconds < inf)
        makes = "a class or function that makes an exception, such as TimeoutError"
        require("Fault", "error", self.error, makes, holds=self.error is None or callable(cast("object", self.error)))
        if self.seconds == 0 and self.error is None and self.result is _PASS:
            msg = f"Fault({self.rate!r}) does nothing: give it seconds, an error or a result"
            raise ValueError(msg)
        if self.error is not None and self.result is not _PASS:
            msg = "Fault: an error and a result cannot both come out of one call"
            raise ValueError(msg)


class Chaos(Policy):
    """Faults in place of the dependency, innermost in a pipeline; does nothing until it is switched on.

    `with chaos.on(seconds=60, reason="game day"):` switches it on. It ends with the block or with the time, whichever
    is first, and cannot be switched on without a time. While it is on, the log says so, `CircuitBreakerService.health`
    is degraded, and `faults_now()` names it.

    Args:
        name: in logs.
        faults: tried in order; at most one happens to a call.
        seed: makes the choice of calls repeatable.
        clock: measures; tests pass a `VirtualClock`.

    Raises:
        ValueError: no faults.
        TypeError: something else in their place.
    """

    def __init__(self, name: str, *faults: Fault, seed: int | None = None, clock: Clock = SYSTEM_CLOCK) -> None:
        if not faults:
            msg = f"Chaos({name!r}) has no faults: write Chaos({name!r}, Fault(0.1, error=TimeoutError))"
            raise ValueError(msg)
        for fault in faults:
            if not isinstance(cast("object", fault), Fault):
                msg = f"Chaos({name!r}) takes faults, such as Fault(0.1, error=TimeoutError), not {fault!r}"
                raise TypeError(msg)
        self.name = name
        self.faults = faults
        self.clock = clock
        self.armed = False  # what the generated code looks at; may be True for a while after the time is over
        self.injected = 0
        self._until = 0.0
        self._random = random.Random(seed)  # noqa: S311  chooses calls, guards nothing
        self._lock = threading.Lock()
        _all.add(self)

    def __repr__(self) -> str:
        return f"<Chaos {self.name!r} {'on' if self.is_on else 'off'}>"

    @property
    def is_on(self) -> bool:
        """Whether it injects faults now."""
        return self.armed and self.clock.monotonic() < self._until

    @contextmanager
    def on(self, *, seconds: float, reason: str) -> Generator[None]:
        """Inject faults inside the block, for at most `seconds` (at most an hour).

        Raises:
            ValueError: `seconds` is not above 0 or is above an hour, or there is no reason.
            RuntimeError: it is on already.
        """
        require(
            "Chaos.on", "seconds", seconds, f"more than 0, at most {MAX_SECONDS:g}", holds=0 < seconds <= MAX_SECONDS
        )
        require("Chaos.on", "reason", reason, "a sentence for the readers of the log", holds=bool(reason.strip()))
        if not self.is_on:
            self._off("its time is over")  # unless a call has noticed
        with self._lock:
            if self.armed:
                msg = f"chaos {self.name!r} is on already"
                raise RuntimeError(msg)
            until = self._until = self.clock.monotonic() + seconds
            self.armed = True
        _log.warning("chaos %s is ON for at most %g s: %s", self.name, seconds, reason)
        try:
            yield
        finally:
            if self._until == until:  # else another block has switched it on since its time was over
                self._off("its block ended")

    def _off(self, why: str) -> None:
        with self._lock:
            was_on, self.armed = self.armed, False
        if was_on:
            _log.warning("chaos %s is off after %d faults: %s", self.name, self.injected, why)

    def _choose(self) -> Fault | None:
        if self.clock.monotonic() >= self._until:
            self._off("its time is over")
            return None
        with self._lock:
            fault = next((fault for fault in self.faults if self._random.random() < fault.rate), None)
            self.injected += fault is not None
        return fault

    async def _disturb(self) -> Fault | None:
        """What is to happen to this call; a fault with a result stands for the call itself."""
        fault = self._choose()
        if fault is not None and fault.seconds:
            await self.clock.sleep(fault.seconds)
        return _applied(fault)

    def _disturb_sync(self) -> Fault | None:
        """`disturb`, blocking the thread."""
        fault = self._choose()
        if fault is not None and fault.seconds:
            self.clock.block(fault.seconds)
        return _applied(fault)

    def _layers(self) -> tuple[Layer, ...]:
        names: dict[str, object] = {"chaos": self, "disturb": self._disturb, "disturb_sync": self._disturb_sync}
        return (Layer("chaos", (), self, names),)


def _applied(fault: Fault | None) -> Fault | None:
    if fault is None:
        return None
    if fault.error is not None:
        raise fault.error()
    return None if fault.result is _PASS else fault


_all: weakref.WeakSet[Chaos] = weakref.WeakSet()


def faults_now() -> list[str]:
    """The names of everything that injects faults at this moment."""
    return sorted(chaos.name for chaos in list(_all) if chaos.is_on)
