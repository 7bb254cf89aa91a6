"""How an open circuit comes back: a few probes, and then a growing share of the calls."""

from __future__ import annotations

_ROUNDING = 1e-9  # of a call: shares are sums of floats


class Probe:
    """The ticket of a call through a half-open circuit."""

    __slots__ = ("epoch", "until")

    edge = float("inf")  # the generated code asks every ticket whether its bucket is over

    def __init__(self, epoch: int, until: float) -> None:
        self.epoch = epoch
        self.until = until


class Probation:
    """The half-open state: which probes are under way, and how many in a row succeeded.

    Attributes:
        probes: under way. Replaced, never changed, so that it can be read without the lock.
        successes: in a row.
    """

    __slots__ = ("probes", "successes")

    def __init__(self) -> None:
        self.probes: tuple[Probe, ...] = ()
        self.successes = 0

    def begin(self, epoch: int, until: float) -> Probe:
        """Send one more probe, whose lease ends at `until`."""
        probe = Probe(epoch, until)
        self.probes = (*self.probes, probe)
        return probe

    def end(self, probe: Probe) -> None:
        """Make room for another; nothing happens if this one is not under way."""
        self.probes = tuple(each for each in self.probes if each is not probe)


class Ramp:
    """The ramping state: the share of calls that is let through.

    Attributes:
        share: from 0 to 1.
        since: when it was last raised.
    """

    __slots__ = ("_credit", "share", "since")

    def __init__(self, start: float, now: float) -> None:
        self.share = start
        self.since = now
        self._credit = 1 - start  # the first call goes through

    def grow(self, now: float, seconds: float) -> None:
        """Raise the share by the time that passed; by `seconds` from 0 to 1, at once where they are 0."""
        self.share = min(1.0, self.share + ((now - self.since) / seconds if seconds else 1.0))
        self.since = now

    def admits(self) -> bool:
        """Whether the next call is among the share."""
        self._credit += self.share
        if self._credit < 1 - _ROUNDING:
            return False
        self._credit -= 1
        return True
