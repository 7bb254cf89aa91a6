"""Topics: made where the settings say so, and compared with what the settings say."""

# aiokafka ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    KafkaError,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
    for_code,
)

from mainstay.core import spawn
from mainstay.events._kafka.client import REQUEST_SECONDS, connection, ended
from mainstay.events.settings import EventsSettings

_AT_ONCE = 4  # admin clients: those who look at many topics do not each open one


class Topics:
    """The topics of the cluster.

    Args:
        settings: where the cluster is, and how topics are created.
    """

    def __init__(self, settings: EventsSettings) -> None:
        self._settings = settings
        self._known: set[str] = set()
        self._looking: dict[str, asyncio.Task[None]] = {}
        self._places = asyncio.Semaphore(_AT_ONCE)

    async def ensure(self, topic: str, *, compacted: bool = False) -> None:
        """Return when a topic is there; one that is not is created, if the settings say so.

        It happens before anything else asks for the topic: a broker that creates topics by itself gives them one
        partition. All who ask for one topic at once have one answer.

        Raises:
            KafkaError: it is not there, or cannot be looked for.
            TimeoutError: the cluster does not answer.
        """
        if topic in self._known:
            return
        looking = self._looking.get(topic)
        if looking is None:
            looking = spawn(self._look_for(topic, compacted), name="events.topics")
            self._looking[topic] = looking
            looking.add_done_callback(lambda done: self._looked(topic, done))
        await asyncio.shield(looking)

    def _looked(self, topic: str, done: asyncio.Task[None]) -> None:
        del self._looking[topic]
        if not done.cancelled():
            done.exception()  # the caller may have gone meanwhile

    def forget(self, topic: str) -> None:
        """Look for it again when it is asked for the next time: it may have been deleted."""
        self._known.discard(topic)

    async def close(self) -> None:
        """Stop looking."""
        for looking in (tasks := tuple(self._looking.values())):
            looking.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _look_for(self, topic: str, compacted: bool) -> None:  # noqa: FBT001  what is asked for
        async with self._places, asyncio.timeout(REQUEST_SECONDS), self._admin() as admin:
            if self._settings.kafka_create_topics:
                try:
                    await self._create(admin, topic, compacted)
                except (TopicAuthorizationFailedError, ClusterAuthorizationFailedError):
                    if topic not in await admin.list_topics():  # others may have made it
                        raise
            elif topic not in await admin.list_topics():
                msg = (
                    f"topic {topic} does not exist: create it, or set "
                    f"{self._settings.variable('kafka_create_topics')}=true"
                )
                raise UnknownTopicOrPartitionError(msg)
        self._known.add(topic)

    async def _create(self, admin: AIOKafkaAdminClient, topic: str, compacted: bool) -> None:  # noqa: FBT001  as above
        new = NewTopic(
            name=topic,
            num_partitions=1 if compacted else self._settings.partitions,
            replication_factor=self._settings.kafka_replicas or 1,
            topic_configs={"cleanup.policy": "compact"} if compacted else {},
        )
        if self._settings.kafka_replicas is None:
            new.replication_factor = -1  # the cluster's default, which aiokafka's constructor does not take
        answer: Any = await admin.create_topics([new])
        for name, code, *rest in answer.topic_errors:
            error = for_code(code)
            if code and error is not TopicAlreadyExistsError:
                msg = f"topic {name} could not be created{': ' + rest[0] if rest and rest[0] else ''}"
                raise error(msg)

    async def wrong(self, topics: Sequence[str]) -> list[str]:
        """A sentence for each topic that is missing and will not be created, or has fewer partitions than it should."""
        settings = self._settings
        try:
            async with self._admin() as admin:
                # Only what is there is asked for: by being asked, a broker creates a topic, with its own partitions.
                there = set(await admin.list_topics()).intersection(topics)
                answers = cast("list[dict[str, Any]]", await admin.describe_topics(sorted(there)) if there else [])
        except KafkaError as error:
            return [f"Kafka at {settings.kafka_servers} does not answer ({type(error).__name__}: {error})"]
        found: list[str] = []
        widths = {answer["topic"]: len(answer["partitions"]) for answer in answers}
        for name in topics:
            width = widths.get(name, 0)
            if not width:
                if not settings.kafka_create_topics:
                    found.append(f"topic {name} does not exist: create it, or set kafka_create_topics")
            elif settings.kafka_create_topics and width < settings.partitions:
                found.append(
                    f"topic {name} has {width} partitions where the settings say {settings.partitions}: widen it, or "
                    f"set {settings.variable('partitions')}={width}"
                )
        return found

    @asynccontextmanager
    async def _admin(self) -> AsyncGenerator[AIOKafkaAdminClient, None]:
        admin = AIOKafkaAdminClient(**connection(self._settings))
        try:
            await admin.start()
            yield admin
        finally:
            await ended("the Kafka admin client", admin.close(), admin._client)
