"""The contract of transports, kept by each of ours."""

from typing import Any

import pytest

from mainstay.core import App
from mainstay.core.testing import eventually
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.events import EventRouter, EventsModule, EventsSettings
from mainstay.events.testing import Placed, TransportContract


def _database(url: str) -> DatabaseModule:
    return DatabaseModule.for_root(DatabaseSettings(url=url))


pytestmark = [
    pytest.mark.usefixtures("aiokafka_garbage"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # see the fixture
]


class TestMemory(TransportContract):
    @pytest.fixture(autouse=True)
    def _names(self, prefix: str) -> None:
        self.prefix = prefix

    def service(self, *routers: EventRouter, **settings: Any) -> App:
        root = EventsModule.for_root(EventsSettings(transport="memory", **settings))
        return App(root, EventsModule.for_feature(*routers))

    async def test_a_restart_goes_on_where_the_group_left_off(self) -> None:
        """The memory transport alone makes no promise here: a restart finds nothing, as it says."""
        seen: list[int] = []
        events = EventRouter()

        @events.on(Placed, group="restart")
        async def handle(event: Placed) -> None:
            seen.append(event.number)

        async with self.service(events, **self.settings()):
            await events.publish(Placed(order="a", number=1))
        async with self.serving(events):
            await events.publish(Placed(order="a", number=2))
            await eventually(lambda: bool(seen))
        assert seen == [2]

    async def test_a_group_that_begins_at_the_latest_event_misses_nothing_after_it(self) -> None:
        """Its log begins with the App, and so does every group: what is published first is handled."""
        seen: list[int] = []
        events = EventRouter()

        @events.on(Placed, group="latest", start="latest")
        async def handle(event: Placed) -> None:
            seen.append(event.number)

        async with self.serving(events):
            await events.publish(Placed(order="a", number=1))
            await eventually(lambda: seen == [1])


class TestSql(TransportContract):
    @pytest.fixture(autouse=True)
    def _names(self, prefix: str, database_url: str) -> None:
        self.prefix = prefix
        self.url = database_url

    def service(self, *routers: EventRouter, **settings: Any) -> App:
        root = EventsModule.for_root(EventsSettings(transport="sql", **settings))
        return App(_database(self.url), root, EventsModule.for_feature(*routers))


class TestKafkaBehindTheOutbox(TransportContract):
    client = "aiokafka"

    @pytest.fixture(autouse=True)
    def _names(self, prefix: str, database_url: str, kafka: str) -> None:
        self.prefix = prefix
        self.url = database_url
        self.servers = kafka

    def service(self, *routers: EventRouter, **settings: Any) -> App:
        root = EventsModule.for_root(
            EventsSettings(transport="kafka", kafka_client=self.client, kafka_servers=self.servers, **settings)
        )
        return App(_database(self.url), root, EventsModule.for_feature(*routers))


class TestKafkaDirectly(TransportContract):
    client = "aiokafka"

    @pytest.fixture(autouse=True)
    def _names(self, prefix: str, kafka: str) -> None:
        self.prefix = prefix
        self.servers = kafka

    def service(self, *routers: EventRouter, **settings: Any) -> App:
        root = EventsModule.for_root(
            EventsSettings(
                transport="kafka", kafka_client=self.client, outbox=False, kafka_servers=self.servers, **settings
            )
        )
        return App(root, EventsModule.for_feature(*routers))


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)  # the client of Kafka does not know which it is
class TestLibrdkafkaBehindTheOutbox(TestKafkaBehindTheOutbox):
    client = "confluent"


class TestLibrdkafkaDirectly(TestKafkaDirectly):
    client = "confluent"
