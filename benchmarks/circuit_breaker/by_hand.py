"""What a careful person would write into one function, without a library: the bounds that the package is held to.

`bare` is the least that deserves the name: a count of consecutive failures and an epoch. `counting` and `timing` have
the features of ours: epoch, probe, a sliding window with a ratio, and counts for metrics.
"""

import asyncio
import functools
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

Call = Callable[..., Awaitable[Any]]


class Open(Exception):
    pass


class Boom(Exception):
    pass


def bare(fn: Call) -> Call:
    state = epoch = failures = 0

    @functools.wraps(fn)
    async def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal state, epoch, failures
        if state:
            raise Open
        mine = epoch
        try:
            result = await fn(*args, **kwargs)
        except asyncio.CancelledError:
            raise
        except Exception:
            if mine == epoch:
                failures += 1
                if failures >= 5:
                    state, epoch = 1, epoch + 1
            raise
        if mine == epoch:
            failures = 0
        return result

    return call


def bare_sync(fn: Callable[..., Any]) -> Callable[..., Any]:
    state = epoch = failures = 0

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal state, epoch, failures
        if state:
            raise Open
        mine = epoch
        try:
            result = fn(*args, **kwargs)
        except Exception:
            if mine == epoch:
                failures += 1
                if failures >= 5:
                    state, epoch = 1, epoch + 1
            raise
        if mine == epoch:
            failures = 0
        return result

    return call


class _Circuit:
    """The state of `counting` and `timing`: in slots, as fast as it gets for something that others can look at."""

    __slots__ = ("at", "bits", "edge", "epoch", "failures", "late", "marks", "probing", "state", "successes", "until")

    def __init__(self, size: int) -> None:
        self.state = self.epoch = self.failures = self.at = self.late = self.successes = 0
        self.until = 0.0
        self.probing = False
        self.bits = bytearray(size)
        self.edge = time.monotonic() + 6
        self.marks: deque[tuple[int, int]] = deque([(0, 0)], maxlen=10)

    def admit(self) -> int:
        if time.monotonic() < self.until or self.probing:
            raise Open
        self.probing = True
        return -1

    def turn(self) -> None:
        self.marks.append((self.successes, self.failures))
        self.edge += 6

    def failed(self, mine: int) -> None:
        if mine != self.epoch:
            self.late += 1
            return
        self.failures += 1
        if self.failures >= 50:
            self.state, self.epoch, self.until = 1, self.epoch + 1, time.monotonic() + 5


def counting(fn: Call, size: int = 100) -> Call:
    circuit = _Circuit(size)
    bits = circuit.bits

    @functools.wraps(fn)
    async def call(*args: Any, **kwargs: Any) -> Any:
        mine = circuit.admit() if circuit.state else circuit.epoch
        try:
            result = await fn(*args, **kwargs)
        except asyncio.CancelledError:
            raise
        except Exception:
            circuit.failed(mine)
            raise
        if mine == circuit.epoch:
            at = circuit.at
            if bits[at]:
                bits[at] = 0
                circuit.failures -= 1
            circuit.at = at + 1 if at + 1 < size else 0
            circuit.successes += 1
        else:
            circuit.late += 1
        return result

    return call


def timing(fn: Call) -> Call:
    circuit = _Circuit(0)
    monotonic = time.monotonic

    @functools.wraps(fn)
    async def call(*args: Any, **kwargs: Any) -> Any:
        mine = circuit.admit() if circuit.state else circuit.epoch
        try:
            result = await fn(*args, **kwargs)
        except asyncio.CancelledError:
            raise
        except Exception:
            circuit.failed(mine)
            raise
        if mine == circuit.epoch:
            if monotonic() >= circuit.edge:
                circuit.turn()
            circuit.successes += 1
        else:
            circuit.late += 1
        return result

    return call


def timing_sync(fn: Callable[..., Any]) -> Callable[..., Any]:
    circuit = _Circuit(0)
    monotonic = time.monotonic

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        mine = circuit.admit() if circuit.state else circuit.epoch
        try:
            result = fn(*args, **kwargs)
        except Exception:
            circuit.failed(mine)
            raise
        if mine == circuit.epoch:
            if monotonic() >= circuit.edge:
                circuit.turn()
            circuit.successes += 1
        else:
            circuit.late += 1
        return result

    return call


def four(fn: Call) -> Call:
    """Bulkhead, breaker, retry and `asyncio.timeout` in one function."""
    under_way = state = epoch = failures = 0

    @functools.wraps(fn)
    async def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal under_way, state, epoch, failures
        attempt = 0
        while True:
            attempt += 1
            try:
                if state:
                    raise Open
                if under_way >= 100:
                    raise Open
                under_way += 1
                mine = epoch
                try:
                    async with asyncio.timeout(30):
                        result = await fn(*args, **kwargs)
                except Boom:
                    if mine == epoch:
                        failures += 1
                        if failures >= 5:
                            state, epoch = 1, epoch + 1
                    raise
                finally:
                    under_way -= 1
                if mine == epoch:
                    failures = 0
                return result
            except Boom:
                if attempt >= 3:
                    raise
                await asyncio.sleep(0.1)

    return call
