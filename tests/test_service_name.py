"""What a service is called: its events, and on Kafka its groups and dead letters, have its name by themselves."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import pytest
from pydantic import SecretStr

from mainstay.cli import main
from mainstay.core import App, ConfigurationError, Retry
from mainstay.core.testing import eventually
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.events import DeadLetters, Event, EventLog, EventRouter, EventsModule, EventsSettings, Metadata
from mainstay.observability import ObservabilityModule, ObservabilitySettings

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of aiokafka's clients


class Paid(Event, type="named.paid", key="order"):
    order: str


class Service:
    """A service with one handler, which cannot handle `bad`."""

    def __init__(self, name: str | None, settings: EventsSettings, *modules: DatabaseModule) -> None:
        self.events = EventRouter()
        self.seen: list[tuple[str, str]] = []

        @self.events.on(Paid, group="receipts", retry=Retry(attempts=1))
        async def print_receipt(event: Paid, meta: Metadata) -> None:
            self.seen.append((event.order, meta.source))
            if event.order == "bad":
                msg = "no such order"
                raise ValueError(msg)

        named = [] if name is None else [ObservabilityModule.for_root(ObservabilitySettings(service_name=name))]
        self.app = App(*named, *modules, EventsModule.for_root(settings), EventsModule.for_feature(self.events))


@pytest.mark.parametrize(("name", "settings", "source"), [
    ("orders", EventsSettings(), "orders"),
    ("orders", EventsSettings(source="till"), "till"),
    (None, EventsSettings(), "mainstay"),
])  # fmt: skip
async def test_events_say_who_published_them(
    name: str | None, settings: EventsSettings, source: str, tmp_path: Path
) -> None:
    """The service's name, unless the settings say another."""
    url = SecretStr(f"sqlite+aiosqlite:///{tmp_path}/named.db")
    service = Service(name, settings, DatabaseModule.for_root(DatabaseSettings(url=url)))
    async with service.app.running(serve=True):
        await service.events.publish(Paid(order="a"))
        await eventually(lambda: service.seen == [("a", source)], what="the event")


def test_a_name_that_no_event_can_carry_is_refused_and_so_is_none_on_kafka() -> None:
    """Where the App is put together, with the setting to write."""
    with pytest.raises(ConfigurationError, match=r"called 'my shop', .* set MAINSTAY_EVENTS_SOURCE to a name"):
        Service("my shop", EventsSettings(transport="memory"))
    kafka = EventsSettings(transport="kafka", kafka_servers="127.0.0.1:9", outbox=False)
    with pytest.raises(
        ConfigurationError, match=r"on Kafka a service has a name, .* set MAINSTAY_EVENTS_SOURCE=orders"
    ):
        Service(None, kafka)


@pytest.mark.parametrize("client", ["aiokafka", "confluent"])
async def test_services_of_one_cluster_share_neither_groups_nor_dead_letters(
    kafka: str, client: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each receives every event under the same name of a group; commands find both, and say whose is whose."""
    unique = uuid.uuid4().hex[:8]
    settings = EventsSettings(
        transport="kafka", kafka_servers=kafka, kafka_client=client, outbox=False, topics={"named.paid": unique}
    )
    orders, bills = (Service(f"{name}-{unique}", settings) for name in ("orders", "bills"))
    async with orders.app.running(serve=True), bills.app.running(serve=True):
        for order in ("a", "b", "bad", "c"):
            await orders.events.publish(Paid(order=order))
        for service in (orders, bills):
            await eventually(lambda seen=service.seen: len(set(seen)) == 4, what="all events", seconds=60)
            assert {source for _, source in service.seen} == {f"orders-{unique}"}
        for service in (orders, bills):
            letters = service.app.get(DeadLetters)

            async def of_this_service(letters: DeadLetters = letters) -> bool:
                return [each.key for each in await letters.list("receipts")] == [b"bad"]

            await eventually(of_this_service, what="the dead letter", seconds=60)
            (group,) = await service.app.get(EventLog).groups()
            assert (group.name, group.state) == ("receipts", "running")
        theirs = f"bills-{unique}.receipts"
        assert [each.name for each in await orders.app.get(EventLog).groups([theirs])] == [theirs]

    async def run(*arguments: str) -> int:
        return await asyncio.to_thread(main, ["events", *arguments])

    monkeypatch.setenv("MAINSTAY_EVENTS_TRANSPORT", "kafka")
    monkeypatch.setenv("MAINSTAY_EVENTS_OUTBOX", "false")
    monkeypatch.setenv("MAINSTAY_EVENTS_KAFKA_SERVERS", kafka)
    assert await run("dead-letters", "list") == 2
    assert "called by the service's name: pass --app, or set MAINSTAY_EVENTS_SOURCE" in capsys.readouterr().err
    monkeypatch.setenv("MAINSTAY_EVENTS_SOURCE", f"bills-{unique}")
    assert await run("groups") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("receipts ") for line in lines)
    assert any(line.startswith(f"orders-{unique}.receipts ") for line in lines)
