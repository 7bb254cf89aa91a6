"""Questions to the cluster, and topics made in it, by librdkafka."""

# Confluent-kafka's types end at what its futures have.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal, Self, TypeVar

from confluent_kafka import (
    ConsumerGroupTopicPartitions,
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, OffsetSpec  # type: ignore[attr-defined]  # its stubs leave these out

from mainstay.events._confluent.client import KafkaFault, Reasons, connection, fault_of, made
from mainstay.events._confluent.threads import answer, aside
from mainstay.events._kafka.seam import REQUEST_SECONDS, Contact, NotAllowed
from mainstay.events._log import Member, Partition
from mainstay.events._sparing import said

_NOT_ALLOWED = {KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED}
_MISSING = {KafkaError.UNKNOWN_TOPIC_OR_PART}

T = TypeVar("T")


class ConfluentAdmin:
    """One connection for all questions of a process, made with the first.

    Args:
        contact: how the cluster is met.
    """

    def __init__(self, contact: Contact) -> None:
        self._contact = contact
        self._reasons = Reasons(contact)
        self._client: AdminClient | None = None
        self._connecting = asyncio.Lock()

    async def __aenter__(self) -> Self:
        """There is nothing to do: it connects when it is asked for something."""
        return self

    async def __aexit__(self, *_details: object) -> None:
        """It stays for the next one."""

    async def _connected(self) -> AdminClient:
        async with self._connecting:
            if self._client is None:
                options = {**connection(self._contact), "error_cb": self._reasons}
                self._client = await made(AdminClient, options)
            return self._client

    async def _ask(self, asked: Future[T], about: str = "") -> T:
        try:
            return await answer(asked)
        except KafkaException as error:
            raise fault_of(error, about) from error

    async def names(self) -> set[str]:
        """See `Admin`."""
        client = await self._connected()
        try:
            found = await aside(lambda: client.list_topics(timeout=REQUEST_SECONDS), "events.topics")
        except KafkaException as error:
            raise fault_of(error) from error
        return {name for name, topic in found.topics.items() if topic.error is None}

    async def widths(self, topics: Collection[str]) -> Mapping[str, int]:
        """See `Admin`. Asked in this way a broker creates no topic."""
        if not topics:
            return {}
        asked = (await self._connected()).describe_topics(
            TopicCollection(list(topics)), request_timeout=REQUEST_SECONDS
        )
        found: dict[str, int] = {}
        for topic, future in asked.items():
            try:
                found[topic] = len((await answer(future)).partitions)
            except KafkaException as error:
                if error.args[0].code() not in _MISSING:
                    raise fault_of(error, f"topic {topic}") from error
        return found

    async def create(self, topic: str, *, partitions: int, replicas: int | None, config: Mapping[str, str]) -> bool:
        """See `Admin`."""
        new = NewTopic(topic, partitions, -1 if replicas is None else replicas, config=dict(config))
        (asked,) = (await self._connected()).create_topics([new], request_timeout=REQUEST_SECONDS).values()
        try:
            await answer(asked)
        except KafkaException as error:
            failure = fault_of(error, f"topic {topic} could not be created")
            if failure.code in _NOT_ALLOWED:
                raise NotAllowed(said(failure)) from error
            if failure.code != KafkaError.TOPIC_ALREADY_EXISTS:
                raise failure from error
            return False
        return True

    async def configs(self, topics: Collection[str]) -> Mapping[str, Mapping[str, str]]:
        """See `Admin`."""
        wanted = [ConfigResource(ConfigResource.Type.TOPIC, topic) for topic in topics]
        if not wanted:
            return {}
        asked = (await self._connected()).describe_configs(wanted, request_timeout=REQUEST_SECONDS)
        found: dict[str, Mapping[str, str]] = {}
        for resource, future in asked.items():
            try:
                entries: Any = await answer(future)
            except KafkaException as error:
                if error.args[0].code() not in _NOT_ALLOWED:
                    raise fault_of(error, f"topic {resource.name}") from error
            else:
                found[resource.name] = {name: entry.value for name, entry in entries.items()}
        return found

    async def groups(self) -> set[str]:
        """See `Admin`."""
        asked = (await self._connected()).list_consumer_groups(request_timeout=REQUEST_SECONDS)
        found: Any = await self._ask(asked)
        return {each.group_id for each in found.valid}

    async def members(self, group: str) -> tuple[str, Sequence[Member]]:
        """See `Admin`."""
        (asked,) = (await self._connected()).describe_consumer_groups([group], request_timeout=REQUEST_SECONDS).values()
        found: Any = await self._ask(asked, f"group {group}")
        return found.state.name, [
            Member(
                each.member_id,
                each.host.removeprefix("/"),
                None,
                frozenset((place.topic, place.partition) for place in each.assignment.topic_partitions),
            )
            for each in found.members
        ]

    async def committed(self, group: str) -> Mapping[Partition, int]:
        """See `Admin`."""
        wanted = [ConsumerGroupTopicPartitions(group)]
        (asked,) = (
            (await self._connected()).list_consumer_group_offsets(wanted, request_timeout=REQUEST_SECONDS).values()
        )
        found: Any = await self._ask(asked, f"group {group}")
        return {(place.topic, place.partition): place.offset for place in found.topic_partitions if place.offset >= 0}

    async def offsets(
        self, partitions: Collection[Partition], at: Literal["first", "end"] | float
    ) -> Mapping[Partition, int]:
        """An offset of each partition: the first, the end, or that of a time, which is -1 where nothing came later."""
        spec: Any = OffsetSpec
        sought = (
            spec.earliest() if at == "first" else spec.latest() if at == "end" else spec.for_timestamp(int(at * 1000))
        )
        asked = (await self._connected()).list_offsets(
            {TopicPartition(*each): sought for each in partitions},
            isolation_level=IsolationLevel.READ_COMMITTED,
            request_timeout=REQUEST_SECONDS,
        )
        found: dict[Partition, int] = {}
        for place, future in asked.items():
            told: Any = await self._ask(future, f"{place.topic}/{place.partition}")
            found[place.topic, place.partition] = told.offset
        return found

    async def ask(self, seconds: float) -> list[int]:
        """The numbers of the brokers that are there; asked for to see whether the cluster answers."""
        client = await self._connected()
        try:
            cluster: Any = await self._ask(client.describe_cluster(request_timeout=seconds))
        except KafkaFault as error:
            client.poll(0)  # it knows more than that there was no answer
            raise self._reasons.why or error from error
        self._reasons.why = None
        return [node.id for node in cluster.nodes]

    async def consumer_session_seconds(self) -> float | None:
        """How long a member of a group of Kafka 4's own protocol may be silent; None where it is not offered.

        Raises:
            KafkaFault: this service may not ask that.
        """
        number, *_ = await self.ask(REQUEST_SECONDS)
        broker = ConfigResource(ConfigResource.Type.BROKER, str(number))
        (asked,) = (await self._connected()).describe_configs([broker], request_timeout=REQUEST_SECONDS).values()
        found: Any = await self._ask(asked)
        offered, session = (
            found.get(name) for name in ("group.coordinator.rebalance.protocols", "group.consumer.session.timeout.ms")
        )
        if offered is None or session is None or "consumer" not in offered.value.split(","):
            return None
        return int(session.value) / 1000

    async def close(self) -> None:
        """Disconnect."""
        client, self._client = self._client, None
        if client is not None:
            holding = [client]
            del client
            # Its end joins threads, and is that of the last reference.
            await asyncio.shield(aside(holding.clear, "events.admin.end"))
