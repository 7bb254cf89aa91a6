"""Evidence about a dependency, shared by the processes of a service through Redis.

One process sees a tenth of the failures of ten. So each publishes what its own window holds, and reads what the others'
hold; where a quorum of those that have called the dependency lately finds it failing, the others open too, before they
have paid for the same lesson.

- Evidence is shared, not verdicts: a circuit that opened because of the others says nothing further, or the fleet would
  keep itself open by quoting itself. Every process recovers by its own probes.
- One bad node does not open the fleet's circuit: it takes a quorum and at least two, and a process whose own recent
  calls went well has a veto for itself.
- Nothing on the path of a call waits for Redis. A task exchanges votes every `evidence_seconds`; when Redis is away
  each process goes on alone, the log says so once, and health is degraded.
- Time is the server's. A vote counts for three exchanges. Votes carry a version, and the script that stores them
  refuses an older one, so that a delayed write cannot bring back what was taken back.
"""

from __future__ import annotations

import enum
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from mainstay.circuit_breaker.breaker import CircuitBreaker, KeyedBreaker
from mainstay.circuit_breaker.settings import BreakerConfig
from mainstay.circuit_breaker.states import State
from mainstay.core import Clock, ConfigurationError, Drain, Health, uuid7

_log = logging.getLogger("mainstay.circuit_breaker")

FLEET = "the fleet finds it failing"
"""Begins the reason of a circuit that opened because of the others."""

_EXCHANGE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local life = tonumber(ARGV[3])
local old = redis.call('HGET', KEYS[1], ARGV[1])
if not old or tonumber(cjson.decode(old)[1]) < tonumber(ARGV[2]) then
    redis.call('HSET', KEYS[1], ARGV[1], cjson.encode({tonumber(ARGV[2]), now + life, ARGV[4]}))
    redis.call('PEXPIRE', KEYS[1], life * 10)
end
local votes = {}
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
    local vote = cjson.decode(all[i + 1])
    if vote[2] < now then
        redis.call('HDEL', KEYS[1], all[i])
    else
        votes[#votes + 1] = all[i]
        votes[#votes + 1] = vote[3]
    end
end
return votes
"""


@dataclass(frozen=True, slots=True)
class Vote:
    """What one process has seen of one dependency lately.

    Attributes:
        calls, failures: in its window.
        opened: whether its own calls have opened its circuit, which is still open.
    """

    calls: int
    failures: int
    opened: bool

    def finds_it_failing(self, ratio: float) -> bool:
        """Whether it speaks against the dependency, with however few calls."""
        return self.opened or (self.failures > 0 and self.failures >= ratio * self.calls)


def vote_of(circuit: CircuitBreaker) -> Vote | None:
    """What this process has to say; None where it has nothing of its own to say."""
    snapshot = circuit.snapshot()
    if snapshot.state is State.OPEN and not snapshot.tripped:
        return Vote(0, 0, opened=True)
    if snapshot.state is not State.CLOSED or snapshot.calls == 0:
        return None
    return Vote(snapshot.calls, snapshot.failures, opened=False)


def fleet_opens(votes: Mapping[str, Vote], me: str, config: BreakerConfig, *, quorum: float) -> str | None:
    """Why this process should open its circuit, or None.

    Args:
        votes: by process.
        me: this process.
        config: its `failure_ratio` (0.5 where there is none) and `minimum_calls` are what the votes are measured by;
            one circuit that has opened by itself stands for enough calls.
        quorum: share of the processes with evidence that must find it failing. (0, 1]
    """
    ratio = config.failure_ratio or 0.5
    against = [vote for vote in votes.values() if vote.finds_it_failing(ratio)]
    if len(against) < max(_AT_LEAST, quorum * len(votes)):
        return None
    if not any(vote.opened for vote in against) and sum(vote.calls for vote in against) < config.minimum_calls:
        return None
    own = votes.get(me)
    if own is not None and own.calls >= config.minimum_calls and own.failures < ratio * own.calls / 2:
        return None  # the veto: it works from here
    return f"{FLEET}: {len(against)} of {len(votes)} processes"


_AT_LEAST = 2


class Link(enum.Enum):
    """How this process stands to the others."""

    NEW = "new"
    """It has not asked them yet."""
    SHARED = "shared"
    """Its last exchange succeeded."""
    LOST = "lost"
    """Its last exchange failed: it goes on alone."""


class SharedEvidence:
    """Exchanges votes for some breakers; `CircuitBreakerModule` makes one where the settings name a Redis.

    Args:
        url: `redis://…`
        breakers: whose evidence is shared, by name; looked at anew for each exchange. Breakers with keys keep theirs to
            themselves.
        every_seconds: how often votes are exchanged.
        quorum: share of the processes with evidence that opens for all.
        clock: waits between exchanges.

    Raises:
        ConfigurationError: the redis package is not installed.
    """

    def __init__(
        self,
        url: str,
        breakers: Mapping[str, CircuitBreaker | KeyedBreaker],
        *,
        every_seconds: float,
        quorum: float,
        clock: Clock,
    ) -> None:
        try:
            import redis.asyncio  # noqa: PLC0415  an extra: only who shares evidence needs it
        except ImportError as error:
            msg = "evidence_url needs the redis package: install mainstay-circuit-breaker[redis]"
            raise ConfigurationError(msg) from error
        self.node = str(uuid7())
        self.every_seconds = every_seconds
        self.quorum = quorum
        self.link = Link.NEW
        self._trouble = ""
        self._breakers = breakers
        self._clock = clock
        self._version = 0
        # The time limits bound the task, not a call: no call waits for it.
        self._redis: Any = cast("Any", redis.asyncio.Redis).from_url(
            url, socket_timeout=every_seconds, socket_connect_timeout=every_seconds, decode_responses=True
        )
        self._exchange: Any = self._redis.register_script(_EXCHANGE)

    async def health(self) -> Health:
        """Degraded while this process is alone."""
        if self.link is Link.SHARED:
            return Health("ok")
        return Health("degraded", f"evidence is not shared: {self._trouble or 'no exchange yet'}")

    async def run(self, drain: Drain) -> None:
        """Exchange votes until the drain begins."""
        try:
            while not drain.begun:
                await self.exchange()
                await drain.pause(self.every_seconds)
        finally:
            await self._redis.aclose()

    async def exchange(self) -> None:
        """Publish this process's votes, read the others', and open what a quorum finds failing."""
        try:
            for breaker in list(self._breakers.values()):  # `execute` may bring another meanwhile
                if isinstance(breaker, CircuitBreaker):
                    self._weigh(breaker, await self._publish(breaker))
        except Exception as error:  # noqa: BLE001  with any trouble of Redis this process goes on by itself
            if self.link is not Link.LOST:
                _log.warning("evidence is not shared, each process goes on alone: %s", type(error).__name__)
            self.link, self._trouble = Link.LOST, f"Redis answered with {type(error).__name__}"
        else:
            if self.link is not Link.SHARED:
                _log.info("evidence is shared by way of Redis as %s", self.node)
            self.link = Link.SHARED

    async def _publish(self, breaker: CircuitBreaker) -> dict[str, Vote]:
        self._version += 1
        own = vote_of(breaker)
        said = "" if own is None else json.dumps([own.calls, own.failures, own.opened])
        answer = cast(
            "list[str]",
            await self._exchange(
                keys=[f"mainstay:circuit_breaker:{breaker.name}"],
                args=[self.node, self._version, round(3000 * self.every_seconds), said],
            ),
        )
        said_by = dict(zip(answer[::2], answer[1::2], strict=True))
        return {node: Vote(*json.loads(text)) for node, text in said_by.items() if text}

    def _weigh(self, breaker: CircuitBreaker, votes: Mapping[str, Vote]) -> None:
        reason = fleet_opens(votes, self.node, breaker.config, quorum=self.quorum)
        if reason is not None and breaker.state is State.CLOSED:
            breaker.trip(reason)
