"""A concurrency limit that finds itself."""

from __future__ import annotations

from math import inf, sqrt
from typing import Literal

from mainstay.circuit_breaker._checks import is_number, is_whole, require
from mainstay.circuit_breaker._verdicts import Verdict, judge
from mainstay.circuit_breaker.bulkhead import Bulkhead
from mainstay.circuit_breaker.policy import Layer
from mainstay.core import SYSTEM_CLOCK, Clock

__all__ = ["AdaptiveBulkhead"]


class AdaptiveBulkhead(Bulkhead):
    """A bulkhead whose limit follows what the dependency can take.

    `aimd`: every `limit` answers in time add one; a failure, or an answer slower than `slow_seconds`, takes a tenth, at
    most once for each generation of calls. Plain and robust; needs a `slow_seconds` to see a queue grow before calls
    fail.

    `gradient`: compares the answers of the last moments with those of the long run. While both are alike the limit
    creeps up by its square root; when answers get slower, which is what a queue over there looks like, it shrinks in
    proportion.

    Either grows only while at least half of the limit is used: an idle client has learned nothing.

    Args:
        limit: to begin with. At least `minimum`, at most `maximum`.
        minimum, maximum: bounds. >= 1
        algorithm: `aimd` or `gradient`.
        slow_seconds: an answer that takes longer counts as overload. > 0, or None
        queue, max_wait_seconds, name, clock: as for `Bulkhead`.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        limit: int = 20,
        *,
        minimum: int = 1,
        maximum: int = 1000,
        algorithm: Literal["aimd", "gradient"] = "gradient",
        slow_seconds: float | None = None,
        queue: int = 0,
        max_wait_seconds: float = 1.0,
        name: str = "adaptive bulkhead",
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        super().__init__(limit, queue=queue, max_wait_seconds=max_wait_seconds, name=name, clock=clock)
        who = "AdaptiveBulkhead"
        in_range = is_whole(minimum) and 1 <= minimum <= limit
        require(who, "minimum", minimum, f"an integer, 1 to limit ({limit})", holds=in_range)
        in_range = is_whole(maximum) and maximum >= limit
        require(who, "maximum", maximum, f"an integer, at least limit ({limit})", holds=in_range)
        slow = slow_seconds
        in_range = slow is None or (is_number(slow) and 0 < slow < inf)
        require(who, "slow_seconds", slow, "a number, more than 0, or None", holds=in_range)
        require(who, "algorithm", algorithm, "'aimd' or 'gradient'", holds=algorithm in {"aimd", "gradient"})
        self.minimum = minimum
        self.maximum = maximum
        self.algorithm = algorithm
        self.slow_seconds = slow_seconds
        self._exact = float(limit)
        self._until_cut = 0  # answers to come from calls that were sent before the last cut
        self._short = 0.0
        self._long = 0.0

    def _learn(self, seconds: float, error: BaseException | None) -> None:
        """Move the limit by one outcome: an answer after `seconds`, or what was raised."""
        verdict = Verdict.ANSWER if error is None else judge(error)
        if verdict is Verdict.NEUTRAL:
            return
        with self._lock:
            busy = 2 * self.under_way >= self.limit
            overloaded = verdict is Verdict.FAILURE or (self.slow_seconds is not None and seconds > self.slow_seconds)
            if self._until_cut > 0:
                self._until_cut -= 1
            if overloaded:
                if self._until_cut == 0:
                    self._until_cut = self.under_way
                    self._exact *= 0.9
            elif self.algorithm == "gradient":
                self._exact = self._graded(seconds, busy=busy)
            elif busy:
                self._exact += 1 / self._exact
            self._exact = min(max(self._exact, self.minimum), self.maximum)
            limit = int(self._exact)
            if limit != self.limit:
                self.free += limit - self.limit
                self.limit = limit
                self._serve()

    def _graded(self, seconds: float, *, busy: bool) -> float:
        if self._long == 0:
            self._short = self._long = seconds
        self._short += (seconds - self._short) / 10
        self._long += (seconds - self._long) / 500
        # After an outage the long run would take long to come down again.
        if self._long > 2 * self._short:
            self._long *= 0.95
        gradient = max(0.5, min(1.0, 1.5 * self._long / self._short)) if self._short > 0 else 1.0
        if gradient == 1.0 and not busy:
            return self._exact
        wanted = self._exact * gradient + sqrt(self._exact)
        return self._exact + (wanted - self._exact) * 0.2 / max(1.0, self._exact / 10)

    def _layers(self) -> tuple[Layer, ...]:
        (layer,) = super()._layers()
        names = layer.names | {"learn": self._learn, "now": self.clock.monotonic}
        return (Layer("bulkhead", (True,), self, names),)
