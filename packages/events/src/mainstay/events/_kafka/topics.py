"""Topics: made where the settings say so, and compared with what the settings say."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

from mainstay.core import spawn
from mainstay.events._kafka.seam import REQUEST_SECONDS, Admin, Client, NotAllowed
from mainstay.events._sparing import said
from mainstay.events.settings import EventsSettings

_AT_ONCE = 4  # admin clients: those who look at many topics do not each open one


class MissingTopicError(Exception):
    """A topic does not exist, and is not to be created by this service."""


class Topics:
    """The topics of the cluster.

    Args:
        settings: where the cluster is, and how topics are created.
        client: asks it.
        foreign: topics that others write, and make.

    Attributes:
        away: what `ensure` raises.
        late: those that did not exist when this process looked for them first, and came after its groups.
    """

    def __init__(self, settings: EventsSettings, client: Client, foreign: Collection[str] = ()) -> None:
        self.away: tuple[type[Exception], ...] = (MissingTopicError, NotAllowed, *client.away)
        self.late: set[str] = set()
        self._settings = settings
        self._client = client
        self._foreign = frozenset(foreign)
        self._known: set[str] = set()
        self._looking: dict[str, asyncio.Task[None]] = {}
        self._places = asyncio.Semaphore(_AT_ONCE)

    async def ensure(self, topic: str, *, compacted: bool = False) -> None:
        """Return when a topic is there; one that is not is created, if the settings say so.

        It happens before anything else asks for the topic: a broker that creates topics by itself gives them one
        partition. All who ask for one topic at once have one answer.

        Raises:
            MissingTopicError: it does not exist.
            NotAllowed: it does not exist, and this service may not create it.
            Exception: one of `away`, it cannot be looked for.
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
        async with self._places, asyncio.timeout(REQUEST_SECONDS), self._client.admin() as admin:
            if self._creates(topic):
                try:
                    await self._create(admin, topic, compacted)
                except NotAllowed:
                    if topic not in await admin.names():  # others may have made it
                        raise
            elif topic not in await admin.names():
                self.late.add(topic)
                msg = f"topic {topic} does not exist: {self._remedy(topic)}"
                raise MissingTopicError(msg)
        self._known.add(topic)

    def _creates(self, topic: str) -> bool:
        return self._settings.kafka_create_topics and topic not in self._foreign

    def _remedy(self, topic: str) -> str:
        if topic in self._foreign:
            return "others write it, so it is theirs to create"
        return f"create it, or set {self._settings.variable('kafka_create_topics')}=true"

    async def _create(self, admin: Admin, topic: str, compacted: bool) -> None:  # noqa: FBT001  as above
        made = await admin.create(
            topic,
            partitions=1 if compacted else self._settings.partitions,
            replicas=self._settings.kafka_replicas,
            config={"cleanup.policy": "compact"} if compacted else {},
        )
        if made:
            self.late.add(topic)

    async def wrong(self, topics: Sequence[str]) -> list[str]:
        """A sentence for each topic that is missing and will not be created, or has fewer partitions than it should."""
        settings = self._settings
        try:
            async with self._client.admin() as admin:
                widths = await admin.widths(topics)
        except self._client.away as error:
            return [f"Kafka at {settings.kafka_servers} cannot be asked: {said(error)}"]
        found: list[str] = []
        for name in topics:
            width = widths.get(name, 0)
            if not width:
                if not self._creates(name):
                    found.append(f"topic {name} does not exist: {self._remedy(name)}")
            elif self._creates(name) and width < settings.partitions:
                found.append(
                    f"topic {name} has {width} partitions where the settings say {settings.partitions}: widen it, or "
                    f"set {settings.variable('partitions')}={width}"
                )
        return found
