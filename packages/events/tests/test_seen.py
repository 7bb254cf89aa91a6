"""What the metrics of a group say while it works, fails, parks and lags."""

import asyncio
from typing import Any

from prometheus_client import REGISTRY
from pydantic import SecretStr

from mainstay.core import App, FullJitter, Retry
from mainstay.core.testing import eventually
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.events import Event, EventRouter, EventsModule, EventsSettings, _parking


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
