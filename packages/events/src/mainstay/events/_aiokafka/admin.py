"""Questions to the cluster, and topics made in it, by aiokafka."""

# aiokafka ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
    for_code,
)

from mainstay.events._aiokafka.client import connection, ended
from mainstay.events._aiokafka.connecting import NamingClient
from mainstay.events._kafka.seam import Contact, NotAllowed
from mainstay.events._sparing import said


@asynccontextmanager
async def asking(contact: Contact) -> AsyncGenerator[AiokafkaAdmin]:
    """An admin client of the block's own."""
    admin = AIOKafkaAdminClient(**connection(contact))
    NamingClient.instead_of(admin._client, contact)
    try:
        await admin.start()
        yield AiokafkaAdmin(admin)
    finally:
        await ended("the Kafka admin client", admin.close(), admin._client)


class AiokafkaAdmin:
    """See `Admin`."""

    def __init__(self, admin: AIOKafkaAdminClient) -> None:
        self._admin = admin

    async def names(self) -> set[str]:
        """See `Admin`."""
        return set(await self._admin.list_topics())

    async def widths(self, topics: Collection[str]) -> Mapping[str, int]:
        """See `Admin`."""
        # Only what is there is asked for: by being asked, a broker creates a topic, with its own partitions.
        there = (await self.names()).intersection(topics)
        answers = cast("list[dict[str, Any]]", await self._admin.describe_topics(sorted(there)) if there else [])
        return {answer["topic"]: len(answer["partitions"]) for answer in answers}

    async def create(self, topic: str, *, partitions: int, replicas: int | None, config: Mapping[str, str]) -> None:
        """See `Admin`."""
        new = NewTopic(topic, num_partitions=partitions, replication_factor=replicas or 1, topic_configs=dict(config))
        if replicas is None:
            new.replication_factor = -1  # the cluster's default, which aiokafka's constructor does not take
        answer: Any = await self._admin.create_topics([new])
        for name, code, *rest in answer.topic_errors:
            error = for_code(code)
            if code and error is not TopicAlreadyExistsError:
                failure = error(f"topic {name} could not be created{': ' + rest[0] if rest and rest[0] else ''}")
                if isinstance(failure, (TopicAuthorizationFailedError, ClusterAuthorizationFailedError)):
                    msg = (
                        f"this service may not create the topic {topic}, nor see it where it exists: grant CREATE, or "
                        f"create the topic and grant DESCRIBE ({said(failure)})"
                    )
                    raise NotAllowed(msg) from failure
                raise failure
