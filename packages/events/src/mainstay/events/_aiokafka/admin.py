"""Questions to the cluster, and topics made in it, by aiokafka."""

# aiokafka ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
    for_code,
)

from mainstay.events._aiokafka.client import connection, ended
from mainstay.events._aiokafka.connecting import NamingClient
from mainstay.events._kafka.seam import Contact, NotAllowed
from mainstay.events._log import Member, Partition
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
        await ended("the Kafka admin client", admin.close(), admin)


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

    async def create(self, topic: str, *, partitions: int, replicas: int | None, config: Mapping[str, str]) -> bool:
        """See `Admin`."""
        new = NewTopic(topic, num_partitions=partitions, replication_factor=replicas or 1, topic_configs=dict(config))
        if replicas is None:
            new.replication_factor = -1  # the cluster's default, which aiokafka's constructor does not take
        answer: Any = await self._admin.create_topics([new])
        codes: list[int] = []
        for name, code, *rest in answer.topic_errors:
            codes.append(code)
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
        return not any(codes)

    async def configs(self, topics: Collection[str]) -> Mapping[str, Mapping[str, str]]:
        """See `Admin`."""
        wanted = [ConfigResource(ConfigResourceType.TOPIC, topic) for topic in topics]
        answers = cast("list[Any]", await self._admin.describe_configs(wanted))
        return {
            name: {entry[0]: entry[1] for entry in entries}
            for answer in answers
            for code, _, _, name, entries in answer.resources
            if not code
        }

    async def groups(self) -> set[str]:
        """See `Admin`."""
        return {name for name, kind in await self._admin.list_consumer_groups() if kind in {"", "consumer"}}

    async def members(self, group: str) -> tuple[str, Sequence[Member]]:
        """See `Admin`. A group of Kafka 4's own protocol is not told of: to aiokafka it is dead."""
        (answer,) = cast("list[Any]", await self._admin.describe_consumer_groups([group]))
        code, _, state, _, _, members, *_ = answer.groups[0]
        if code:
            msg = f"group {group} is not told of"
            raise for_code(code)(msg)
        return state, [
            Member(name, host.removeprefix("/"), None, _held(assignment)) for name, _, host, _, assignment in members
        ]

    async def committed(self, group: str) -> Mapping[Partition, int]:
        """See `Admin`."""
        found = await self._admin.list_consumer_group_offsets(group)
        return {(place.topic, place.partition): kept.offset for place, kept in found.items() if kept.offset >= 0}


def _held(assignment: bytes) -> frozenset[Partition]:
    if not assignment:  # while partitions are dealt out
        return frozenset()
    return frozenset(
        (place.topic, place.partition) for place in ConsumerProtocolMemberAssignment.decode(assignment).partitions()
    )
