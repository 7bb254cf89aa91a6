"""What the metrics of a group say while it works, fails, parks and lags."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import REGISTRY
from pydantic import SecretStr

from mainstay.core import App, FullJitter, Retry
from mainstay.core.testing import VirtualClock, eventually
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.events import Event, EventRouter, EventsModule, EventsSettings, _parking
from mainstay.events._memory import MemorySource, MemoryTransport
from mainstay.events.testing import in_memory


class Noted(Event, type="seen.noted", version="1.0", key="key"):
    key: str
    text: str


def service(url: str, router: EventRouter) -> App:
    settings = EventsSettings(transport="sql", partitions=2)
    return App(
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url))),
        EventsModule.for_root(settings),
        EventsModule.for_feature(router),
    )


def metric(name: str, **labels: str) -> float:
    """What a scrape would find now; 0.0 where there is no such series yet."""
    return REGISTRY.get_sample_value(f"mainstay_events_{name}", labels) or 0.0


async def test_the_metrics_of_a_group_follow_what_it_has_in_hand(
    sqlite_url: str, prefix: str, monkeypatch: Any
) -> None:
    """Partitions and bytes while a handler runs, durations of both outcomes, how long a key is parked; then nothing."""
    monkeypatch.setattr(_parking, "_COUNT_SECONDS", 0.05)
    router = EventRouter()
    gate = asyncio.Event()

    @router.on(Noted, group=prefix, retry=Retry(attempts=2, wait=FullJitter(0.001, 0.001)), on_failure="park")
    async def note(event: Noted) -> None:
        await gate.wait()
        if event.key == "bad":
            msg = "not this one"
            raise ValueError(msg)

    published = metric("published_seconds_count")
    async with service(sqlite_url, router).running(serve=True):
        await router.publish_batch([Noted(key="good", text="x" * 5_000), Noted(key="bad", text="y")])
        await eventually(lambda: metric("in_flight_bytes", group=prefix) > 5_000)
        await eventually(lambda: metric("oldest_in_flight_seconds", group=prefix) > 0)
        assert metric("partitions", group=prefix) == 2
        assert metric("published_seconds_count") == published + 1
        assert metric("handled_seconds_count", type="seen.noted", group=prefix) == 0
        gate.set()
        await eventually(lambda: metric("parked_age_seconds", group=prefix) > 0)
        assert metric("parked_keys", group=prefix) == 1
        assert metric("parked_total", group=prefix) == 1
        assert metric("failed_total", type="seen.noted", group=prefix) == 2
        assert metric("failed_seconds_count", type="seen.noted", group=prefix) == 2
        assert metric("failed_seconds_sum", type="seen.noted", group=prefix) > 0
        await eventually(lambda: metric("handled_seconds_count", type="seen.noted", group=prefix) == 1)
        await eventually(lambda: metric("in_flight_bytes", group=prefix) == 0)
        assert metric("lag", group=prefix) == 0


async def test_a_transport_that_comes_and_goes_is_a_line_a_minute(
    prefix: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its attempts come further and further apart, and soon again once it has been there."""
    clock, attempts, away, real = VirtualClock(), list[float](), True, MemoryTransport.source
    router = EventRouter()
    seen: list[str] = []

    @router.on(Noted, group=prefix)
    async def note(event: Noted) -> None:
        seen.append(event.text)

    @asynccontextmanager
    async def source(*arguments: Any) -> AsyncGenerator[MemorySource]:
        attempts.append(clock.monotonic())
        if away:
            msg = "no way"
            raise ConnectionError(msg)
        async with real(*arguments) as found:
            yield found

    async def lost(*_: Any) -> None:
        msg = "no way any more"
        raise ConnectionError(msg)

    async def passes(until: Callable[[], object]) -> None:
        for _ in range(600):
            if until():
                return
            await clock.advance(0.1)
        pytest.fail("a minute has passed")

    monkeypatch.setattr(MemoryTransport, "source", source)
    async with in_memory(router, clock=clock) as rehearsal:
        await passes(lambda: clock.monotonic() > 50)
        assert 10 < len(attempts) < 20
        said = [record for record in caplog.records if "lost its transport" in record.getMessage()]
        assert len(said) == 1
        away = False
        await rehearsal.publish(Noted(key="a", text="x"))
        await passes(lambda: seen)
        await clock.advance(20)
        with monkeypatch.context() as patch:
            patch.setattr(MemorySource, "fetch", lost)
            lost_at, before = clock.monotonic(), len(attempts)
            await rehearsal.publish(Noted(key="a", text="y"))
            await passes(lambda: len(attempts) > before)
        assert attempts[-1] - lost_at < 2
        await passes(lambda: seen == ["x", "y"])
