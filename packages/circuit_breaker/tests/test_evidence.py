"""Evidence shared through a real Redis, by several processes' worth of breakers and by real processes."""

import asyncio
import json
import logging
import sys
import textwrap

import pytest
import redis
from pydantic import SecretStr

from mainstay.circuit_breaker import (
    BreakerConfig,
    CircuitBreaker,
    CircuitBreakerModule,
    CircuitBreakerService,
    CircuitBreakerSettings,
    CircuitOpen,
    OperationConfig,
    State,
)
from mainstay.circuit_breaker._evidence import FLEET, SharedEvidence, Vote, fleet_opens
from mainstay.circuit_breaker.testing import Dependency
from mainstay.core import SYSTEM_CLOCK, App

CONFIG = BreakerConfig(minimum_calls=6, break_jitter=0)


class Boom(Exception):
    pass


@pytest.mark.parametrize(
    ("votes", "opens"),
    [
        ({}, False),
        ({"a": (0, 0, True)}, False),  # one node never opens the others
        ({"a": (0, 0, True), "b": (0, 0, True)}, True),
        ({"a": (0, 0, True), "b": (0, 0, True), "c": (9, 0, False), "d": (9, 0, False), "e": (9, 0, False)}, False),
        ({"a": (3, 3, False), "b": (3, 3, False)}, True),  # neither alone has enough calls
        ({"a": (2, 2, False), "b": (3, 3, False)}, False),  # nor have both
        ({"a": (0, 0, True), "b": (0, 0, True), "me": (2, 0, False)}, True),
        ({"a": (0, 0, True), "b": (0, 0, True), "me": (6, 0, False)}, False),  # the veto
        ({"a": (0, 0, True), "b": (0, 0, True), "me": (6, 2, False)}, True),  # not well enough for a veto
    ],
)
def test_a_quorum_opens_and_a_healthy_process_has_a_veto(votes: dict[str, tuple[int, int, bool]], opens: bool) -> None:
    """The decision is a function of the votes."""
    reason = fleet_opens({node: Vote(*vote) for node, vote in votes.items()}, "me", CONFIG, quorum=0.5)
    assert (reason is not None) == opens


class Fleet:
    """Some processes' breakers and exchanges, in one."""

    def __init__(self, url: str, size: int) -> None:
        self.breakers = [CircuitBreaker("payments", CONFIG) for _ in range(size)]
        self.members = [
            SharedEvidence(url, {"payments": breaker}, every_seconds=1, quorum=0.5, clock=SYSTEM_CLOCK)
            for breaker in self.breakers
        ]

    async def exchange(self) -> None:
        for _ in range(2):  # all have spoken, all have heard
            for member in self.members:
                await member.exchange()

    @property
    def states(self) -> list[State]:
        return [breaker.state for breaker in self.breakers]

    async def aclose(self) -> None:
        for member in self.members:
            await member._redis.aclose()


async def fail(breaker: CircuitBreaker, times: int) -> None:
    for _ in range(times):
        with pytest.raises(Boom):
            await breaker.call(Dependency(Boom))


async def test_shared_state_opens_the_fleet_from_evidence_too_small_for_one(redis_url: str) -> None:
    """Three processes with two failures each open, and so does the fourth, which has made no call at all."""
    fleet = Fleet(redis_url, 4)
    for breaker in fleet.breakers[:3]:
        await fail(breaker, 2)
    assert fleet.states == [State.CLOSED] * 4
    await fleet.exchange()
    assert fleet.states == [State.OPEN] * 4
    assert all(breaker.reason.startswith(FLEET) for breaker in fleet.breakers)
    # Who opened because of the others says nothing further: the fleet does not quote itself.
    for breaker in fleet.breakers:
        breaker.reset()
    await fleet.exchange()
    assert fleet.states == [State.CLOSED] * 4
    await fleet.aclose()


async def test_shared_state_one_bad_node_opens_nobody_else(redis_url: str) -> None:
    """A process that cannot reach the dependency opens its own circuit and no other."""
    fleet = Fleet(redis_url, 3)
    await fail(fleet.breakers[0], 6)
    for breaker in fleet.breakers[1:]:
        for _ in range(10):
            await breaker.call(Dependency())
    await fleet.exchange()
    assert fleet.states == [State.OPEN, State.CLOSED, State.CLOSED]
    await fleet.aclose()


async def test_shared_state_versions_fence_and_votes_expire(redis_url: str) -> None:
    """A delayed, older vote cannot replace a newer one, and a vote that is not renewed is gone after its life."""
    fleet = Fleet(redis_url, 1)
    (member,) = fleet.members
    await fail(fleet.breakers[0], 3)
    assert (await member._publish(fleet.breakers[0]))[member.node].calls == 3
    member._version -= 2  # a write that was held up on its way
    fleet.breakers[0].reset()
    assert (await member._publish(fleet.breakers[0]))[member.node].calls == 3
    server = redis.Redis.from_url(redis_url, decode_responses=True)
    key = "mainstay:circuit_breaker:payments"
    server.hset(key, "dead", json.dumps([1, 1, json.dumps([9, 9, True])]))  # ended in 1970
    member._version += 5
    await fail(fleet.breakers[0], 1)
    votes = await member._publish(fleet.breakers[0])
    assert votes == {member.node: Vote(1, 1, opened=False)}
    assert not server.hexists(key, "dead")
    assert 0 < server.pttl(key) <= 30_000
    server.close()
    await fleet.aclose()


async def test_shared_state_without_redis_each_goes_on_alone(own_redis, caplog: pytest.LogCaptureFixture) -> None:
    """When Redis dies, calls go on, health is degraded, the log says it once; when it is back, so is the sharing."""
    breaker = CircuitBreaker("payments", CONFIG)
    settings = CircuitBreakerSettings(evidence_url=SecretStr(own_redis.url), evidence_seconds=0.05)
    app = App(CircuitBreakerModule.for_root(settings), CircuitBreakerModule.for_feature(breaker))

    async def until(status: str) -> None:
        async with asyncio.timeout(20):
            while (await app.health())["circuit_breaker.SharedEvidence"].status != status:  # noqa: ASYNC110  nothing signals it
                await asyncio.sleep(0.01)

    with caplog.at_level(logging.INFO, logger="mainstay.circuit_breaker"):
        async with app:
            await until("ok")
            own_redis.kill()
            await until("degraded")
            for _ in range(3):
                await breaker.call(Dependency())
            await fail(breaker, 3)
            with pytest.raises(CircuitOpen):
                await breaker.call(Dependency())
            await asyncio.sleep(0.3)
            own_redis.start()
            await until("ok")
    lost = [record for record in caplog.records if "each process goes on alone" in record.message]
    assert len(lost) == 1
    assert own_redis.url not in caplog.text


async def test_evidence_without_the_redis_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is named as it is installed."""
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(Exception, match=r"install mainstay-circuit-breaker\[redis\]"):
        SharedEvidence("redis://x", {}, every_seconds=1, quorum=1, clock=SYSTEM_CLOCK)


PROCESS = """
    import asyncio, sys
    from mainstay.circuit_breaker import *
    from mainstay.core import App

    payments = CircuitBreaker("payments", BreakerConfig(minimum_calls=6))

    async def call():
        raise OSError

    async def main():
        app = App(CircuitBreakerModule.for_root(), CircuitBreakerModule.for_feature(payments))
        async with app:
            for _ in range(int(sys.argv[1])):
                await asyncio.gather(payments.call(call), return_exceptions=True)
            async with asyncio.timeout(60):
                while payments.state is State.CLOSED:
                    await asyncio.sleep(0.01)
        print(payments.reason)

    asyncio.run(main())
"""


async def test_shared_state_between_real_processes(redis_url: str) -> None:
    """Two processes fail three times each; they and a third that made no call open, because of the fleet."""
    environment = {
        "MAINSTAY_CIRCUIT_BREAKER_EVIDENCE_URL": redis_url,
        "MAINSTAY_CIRCUIT_BREAKER_EVIDENCE_SECONDS": "1",
    }
    processes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", textwrap.dedent(PROCESS), failures), env=environment, stdout=-1, stderr=-1
        )
        for failures in ("3", "3", "0")
    ]
    outputs = [await process.communicate() for process in processes]
    assert [out.decode().split(":")[0] for out, _ in outputs] == [FLEET] * 3, outputs


async def test_shared_state_includes_breakers_made_by_execute(redis_url: str) -> None:
    """An operation that an App meets only while it runs opens because of the fleet like any other."""
    fleet = Fleet(redis_url, 2)
    for breaker in fleet.breakers:
        await fail(breaker, 6)
    await fleet.exchange()
    settings = CircuitBreakerSettings(evidence_url=SecretStr(redis_url), evidence_seconds=0.05)
    async with App(CircuitBreakerModule.for_root(settings)) as app:
        service = app.get(CircuitBreakerService)
        assert await service.execute(Dependency("fine"), OperationConfig(name="payments")) == "fine"
        payments = service.breaker("payments")
        async with asyncio.timeout(20):
            while service.get_state("payments") is State.CLOSED:
                await fleet.exchange()
                await asyncio.sleep(0.01)
        assert isinstance(payments, CircuitBreaker)
        assert payments.reason.startswith(FLEET)
    await fleet.aclose()
