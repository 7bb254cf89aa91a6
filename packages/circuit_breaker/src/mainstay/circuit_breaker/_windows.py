"""The two sliding windows: the last n calls, and the last n seconds.

What both share, and what the generated code relies on, is one plain counter, `successes`. A success only adds one to
it: the fast path takes no lock, walks no buckets and costs the same for every length of window. Everything else
(failures, slow calls, the turn of a bucket, reading) happens under the circuit's lock and works from the difference
between two readings of that counter. A counter in use is only ever added to: setting it, even to what it was a
moment ago, would lose what the fast path adds meanwhile.
"""

from __future__ import annotations

from array import array
from math import ceil, inf

from mainstay.circuit_breaker.settings import BreakerConfig

BUCKETS = 10
"""Turns of a time window per length: it covers between 0.9 and 1.0 of its seconds."""

EXACT = 1000
"""Calls up to which a count window knows each one. A longer one is kept in twentieths and holds up to one more."""
_PARTS = 20
_DIGIT = 21  # bits of a part's count: all the parts together hold less than 2**21 - 1 calls

_ROUNDING = 1e-9  # of a bucket or of a call: so near is there

_32_BITS = 0xFFFF_FFFF  # marks keep that much of a counter: half the memory, and differences come out right

Totals = tuple[int, int, int]
"""Calls, failures and slow calls in the window."""


class CountWindow:
    """The last `size` calls.

    Failures are the ones in a bit string of the last `size` calls, newest lowest. It is brought up to date only when a
    failure comes or the window is read: shifted left by as many places as there were calls meanwhile, all successes.

    So a failure would cost the more the longer the window is. Beyond `EXACT` calls the string has 21 digits instead,
    each the count of failures in a twentieth of the window's calls, and is shifted when a twentieth is full.
    """

    __slots__ = (
        "_at",
        "_failed",
        "_full",
        "_since",
        "_slow",
        "_streak_at",
        "_width",
        "edge",
        "epoch",
        "failures",
        "size",
        "streak",
        "successes",
    )

    def __init__(self, size: int, epoch: int) -> None:
        self.size = size
        self._width = _width(size)
        self.epoch = epoch
        # It never turns; the generated code for time windows may ask while a reload is under way.
        self.edge = inf
        self.successes = 0
        self.failures = 0
        self._failed = 0
        self._slow = 0
        self._at = 0  # calls when it was last brought up to date
        self._full = 0  # calls at which the newest place or part is full
        self.streak = 0
        self._streak_at = 0
        self._since = 0  # calls up to this position have left the window for good

    def _align(self) -> None:
        at = self._at = self.successes + self.failures
        over = at - self._full
        if over <= 0:
            return
        if self._width == 1:
            shift, length = over, self.size
            self._full = at
        else:
            turns = -(-over // self._width)
            shift, length = _DIGIT * turns, _DIGIT * (_PARTS + 1)
            self._full += turns * self._width
        mask = (1 << length) - 1
        self._failed = (self._failed << shift) & mask if shift < length else 0
        self._slow = (self._slow << shift) & mask if shift < length else 0

    def fail(self, now: float) -> None:  # noqa: ARG002  the time window needs it
        """Count a failure."""
        _count_failure(self)
        self._align()
        self._failed += 1  # its bit, or one more in the newest part

    def mark_slow(self, now: float) -> None:  # noqa: ARG002  the time window needs it
        """Count the call that was counted last as a slow one."""
        self._align()
        if self._width == 1:
            self._slow |= 1
        else:
            self._slow += 1

    def turn(self, now: float) -> None:
        """There is nothing to turn."""

    def totals(self, now: float) -> Totals:  # noqa: ARG002  the time window needs it
        """What is in the window."""
        self._align()
        calls = self._at - self._since
        if self._width == 1:
            return min(calls, self.size), self._failed.bit_count(), self._slow.bit_count()
        held = (_PARTS + 1) * self._width - (self._full - self._at)
        # Casting out nines: the digits of a number add up to its remainder by the base less one.
        return min(calls, held), self._failed % (2**_DIGIT - 1), self._slow % (2**_DIGIT - 1)

    def resize(self, size: int) -> bool:
        """Keep the newest `size` calls; False where the parts of another length cannot be made of those there are."""
        if not self._width == _width(size) == 1:
            return size == self.size
        self._align()
        # Calls that had left a shorter window do not come back when it gets longer.
        self._since = max(self._since, self._at - self.size)
        mask = (1 << size) - 1
        self._failed &= mask
        self._slow &= mask
        self.size = size
        return True

    def seed(self, totals: Totals, streak: int) -> None:
        """Begin with what another window held, failures as the newest calls; of too many calls, their share."""
        calls, failures, slow = totals
        if calls > self.size:
            calls, failures, slow = self.size, round(failures * self.size / calls), round(slow * self.size / calls)
        self.failures, self.streak = failures, streak
        self.successes = self._streak_at = calls - failures
        self._at = self._full = calls
        self._failed, self._slow = ((1 << failures) - 1, (1 << slow) - 1) if self._width == 1 else (failures, slow)


def _width(size: int) -> int:
    """Calls that a count window of `size` does not tell apart."""
    return 1 if size <= EXACT else -(-size // _PARTS)


class TimeWindow:
    """The last `seconds`, in buckets.

    A bucket is a mark: what the counters said when it began. The window's content is the counters now less the oldest
    mark.
    """

    __slots__ = (
        "_index",
        "_marks",
        "_slow",
        "_streak_at",
        "edge",
        "epoch",
        "failures",
        "seconds",
        "streak",
        "successes",
    )

    def __init__(self, seconds: float, epoch: int, now: float) -> None:
        self.seconds = seconds
        self.epoch = epoch
        self.edge = now + seconds / BUCKETS
        self.successes = 0
        self.failures = 0
        self.streak = 0
        self._streak_at = 0
        self._slow = 0
        self._index = 0
        self._marks = array("I", bytes(4 * 3 * BUCKETS))

    def turn(self, now: float) -> None:
        """Begin the bucket that `now` falls into."""
        if now < self.edge:
            return
        width = self.seconds / BUCKETS
        turns = int((now - self.edge) / width) + 1
        mark = array("I", (self.successes & _32_BITS, self.failures & _32_BITS, self._slow & _32_BITS))
        for _ in range(min(turns, BUCKETS)):
            self._index = (self._index + 1) % BUCKETS
            self._marks[3 * self._index : 3 * self._index + 3] = mark
        self.edge += turns * width
        if self.edge <= now:  # rounding
            self.edge = now + width

    def fail(self, now: float) -> None:
        """Count a failure."""
        self.turn(now)
        _count_failure(self)

    def mark_slow(self, now: float) -> None:
        """Count a slow call."""
        self.turn(now)
        self._slow += 1

    def totals(self, now: float) -> Totals:
        """What is in the window."""
        self.turn(now)
        oldest = 3 * ((self._index + 1) % BUCKETS)
        successes, failures, slow = self._marks[oldest : oldest + 3]
        failed = (self.failures - failures) & _32_BITS
        return ((self.successes - successes) & _32_BITS) + failed, failed, (self._slow - slow) & _32_BITS

    def resize(self, seconds: float, now: float) -> None:
        """Keep what is younger than `seconds`; each bucket moves whole, to where its youngest call belongs."""
        if seconds == self.seconds:
            return
        self.turn(now)
        width, new_width = self.seconds / BUCKETS, seconds / BUCKETS
        began = self.edge - width
        # For each new bucket, oldest first: what the counters said when it began.
        marks = array("I", bytes(4 * 3 * BUCKETS))
        for position in range(BUCKETS):
            start = now - (BUCKETS - 1 - position) * new_width if position < BUCKETS - 1 else now
            # The newest old bucket that began no later than `start` holds the reading; before the oldest, the oldest's.
            steps = 0 if start >= began else min(BUCKETS - 1, ceil((began - start) / width - _ROUNDING))
            source = 3 * ((self._index - steps) % BUCKETS)
            marks[3 * position : 3 * position + 3] = self._marks[source : source + 3]
        # `position` 0 is the oldest and stands right after the newest in the ring.
        self._index = BUCKETS - 1
        self._marks = marks
        self.seconds = seconds
        self.edge = now + new_width

    def seed(self, totals: Totals, streak: int) -> None:
        """Begin with what another window held, as if it had just happened."""
        calls, self.failures, self._slow = totals
        self.streak = streak
        self.successes = self._streak_at = calls - self.failures


Window = CountWindow | TimeWindow


def streak_of(window: Window) -> int:
    """Failures since the last success."""
    return window.streak if window.successes == window._streak_at else 0


def _count_failure(window: Window) -> None:
    # Successes leave no trace but their number: if it moved since the last failure, the streak begins anew.
    window.streak = streak_of(window) + 1
    window._streak_at = window.successes
    window.failures += 1


def reason_to_open(window: Window, config: BreakerConfig, now: float) -> str | None:
    """The criterion of `config` that the window meets, as a sentence with its numbers; None where it meets none."""
    calls, failures, slow = window.totals(now)
    if config.failure_count is not None and failures >= config.failure_count:
        return f"{failures} failures in the window"
    streak = streak_of(window)  # a success ends it without a trace, and a slow success is judged, too
    if config.consecutive_failures is not None and streak >= config.consecutive_failures:
        return f"{streak} failures in a row"
    if calls < config.minimum_calls:
        return None
    # A ratio as it is written, not as it is stored: 0.3 of 10 calls is 3, though 3 / 10 < 0.3 might round otherwise.
    if config.failure_ratio is not None and failures >= config.failure_ratio * calls - _ROUNDING and failures:
        return f"{failures} of {calls} calls failed"
    if config.slow_seconds is not None and slow >= config.slow_ratio * calls - _ROUNDING and slow:
        return f"{slow} of {calls} calls took longer than {config.slow_seconds:g} s"
    return None
