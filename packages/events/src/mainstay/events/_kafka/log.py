"""What the cluster keeps, read without a group; see `mainstay.events._log`."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import NamedTuple, TypeVar

from mainstay.events._kafka.seam import REQUEST_SECONDS, Admin, Browser, Client, Contact
from mainstay.events._log import Behind, Extent, Member, Page, Partition, Places, Reading, Stored, Topic
from mainstay.events._sparing import said
from mainstay.events.errors import TransportError

T = TypeVar("T")

_AT_ONCE = 16
"""Groups that are asked for at once."""
_BACK = 200
"""Records of a partition that are read at once on the way back."""


class KafkaLog:
    """See `Log`.

    Args:
        client: asks the cluster, and reads.
        contact: how the cluster is met.
        own: what the names of this service's groups begin with in the cluster, and here do not.
    """

    def __init__(self, client: Client, contact: Contact, own: str) -> None:
        self._client = client
        self._own = own
        self._contact = contact
        self._browser: Browser | None = None
        self._turn = asyncio.Lock()

    async def close(self) -> None:
        """Disconnect."""
        browser, self._browser = self._browser, None
        if browser is not None:
            await browser.close()

    async def _browsing(self, work: Callable[[Browser], Awaitable[T]]) -> T:
        async with self._turn:
            with self._translated():
                if self._browser is None:
                    self._browser = await self._client.browser()
                return await work(self._browser)

    @asynccontextmanager
    async def _asking(self) -> AsyncGenerator[Admin, None]:
        with self._translated():
            async with asyncio.timeout(2 * REQUEST_SECONDS), self._client.admin() as admin:
                yield admin

    @contextmanager
    def _translated(self) -> Generator[None, None, None]:
        try:
            yield
        except self._client.away as error:
            why = self._contact.trouble or said(error)
            msg = f"Kafka at {self._contact.settings.kafka_servers} cannot be asked: {why}"
            raise TransportError(msg) from error

    async def _spans(self, partitions: Collection[Partition]) -> Mapping[Partition, tuple[int, int]]:
        if not partitions:
            return {}
        return await self._browsing(lambda browser: browser.spans(partitions))

    async def _partitions(self, topics: Collection[str] | None) -> list[Partition]:
        async with self._asking() as admin:
            # Only what is there is asked for: by being asked, a broker creates a topic.
            there = await admin.names()
            wanted = {name for name in there if not name.startswith("__")} if topics is None else there & set(topics)
            widths = await admin.widths(sorted(wanted))
        return [(topic, number) for topic, width in sorted(widths.items()) for number in range(width)]

    async def topics(self, names: Collection[str] | None) -> Mapping[str, Topic]:
        """See `Log`."""
        spans = await self._spans(await self._partitions(names))
        found: dict[str, dict[int, Extent]] = {}
        for (topic, number), (first, end) in sorted(spans.items()):
            some = end > first
            extent = Extent(first if some else None, end - 1 if some else None, end - first)
            found.setdefault(topic, {})[number] = extent
        topics: dict[str, Topic] = {}
        async with self._asking() as admin:
            configs = await admin.configs(found.keys())
        for topic, extents in found.items():
            config = configs.get(topic, {})
            policies = config.get("cleanup.policy", "delete").split(",")
            topics[topic] = Topic(extents, _keeps(config), compacted="compact" in policies)
        return topics

    async def end(self, topics: Collection[str]) -> Places:
        """See `Log`."""
        spans = await self._spans(await self._partitions(topics))
        return {partition: end for partition, (_, end) in spans.items()}

    async def since(self, topics: Collection[str], time: float) -> Places:
        """See `Log`."""
        partitions = await self._partitions(topics)
        # Before 1970 a broker understands other things by a time: -1 is the end, and -2 the beginning.
        return await self._browsing(lambda browser: browser.at(partitions, max(0.0, time))) if partitions else {}

    async def read(self, places: Places) -> Page:
        """See `Log`."""
        spans = await self._spans(places.keys())
        starts = {each: max(offset, spans[each][0]) for each, offset in places.items() if each in spans}
        left = {each: offset for each, offset in starts.items() if offset < spans[each][1]}
        if not left:
            return Page((), starts, last=True)
        ends = {each: spans[each][1] for each in left}
        records, then = await self._browsing(lambda browser: browser.read(left, ends))
        following = starts | dict(then)
        return Page(records, following, all(following[each] >= end for each, end in ends.items()))

    async def backwards(self, places: Places) -> AsyncGenerator[Sequence[Stored]]:
        """See `Log`."""
        spans = await self._spans(places.keys())
        ends = {each: min(offset, spans[each][1]) for each, offset in places.items() if each in spans}
        while ends := {each: end for each, end in ends.items() if end > spans[each][0]}:
            begins = {each: max(spans[each][0], end - _BACK) for each, end in ends.items()}
            page: list[Stored] = []
            left: Mapping[Partition, int] = begins
            while left:
                wanted, until = left, {each: ends[each] for each in left}
                records, then = await self._browsing(lambda browser, a=wanted, b=until: browser.read(a, b))  # type: ignore[misc]  # mypy infers no lambda with defaults
                page += [each for each in records if each.offset < ends[each.topic, each.partition]]
                left = {each: offset for each, offset in (dict(left) | dict(then)).items() if offset < ends[each]}
            yield page
            ends = begins

    async def groups(self, names: Collection[str] | None) -> Mapping[str, Reading]:
        """See `Log`. A group that is not told of is there, and its state says why."""
        places = asyncio.Semaphore(_AT_ONCE)

        async def asked(admin: Admin, group: str) -> _Told:
            async with places:
                try:
                    return _Told(*await admin.members(group), await admin.committed(group))
                except self._client.away as error:
                    return _Told(f"not told of: {said(error)}", (), {})

        async with self._asking() as admin:
            there = await admin.groups()
            wanted = self._called(there) if names is None else self._meant(there, names)
            found = await asyncio.gather(*(asked(admin, group) for group in wanted.values()))
            # Once for all groups: aiokafka answers that by the whole cluster's topics.
            widths = await admin.widths(sorted({topic for told in found for topic in told.topics}))
        return {name: told.reading(widths) for name, told in zip(wanted, found, strict=True)}

    def _called(self, there: Collection[str]) -> Mapping[str, str]:
        """All groups, those of this service by the names that its handlers say, and what the cluster calls each."""
        mine = {name.removeprefix(self._own): name for name in there if name.startswith(self._own)}
        mine = {name: full for name, full in mine.items() if name not in there}
        return dict(sorted((mine | {name: name for name in there if name not in mine.values()}).items()))

    def _meant(self, there: Collection[str], names: Collection[str]) -> Mapping[str, str]:
        """What the cluster calls groups, each of which is one of this service or said in full."""
        full = {name: self._own + name if self._own + name in there else name for name in sorted(names)}
        return {name: meant for name, meant in full.items() if meant in there}

    async def behind(self, places: Places) -> Mapping[Partition, Behind]:
        """See `Log`."""
        spans = await self._spans(places.keys())
        starts = {each: max(offset, spans[each][0]) for each, offset in places.items() if each in spans}
        left = {each: offset for each, offset in starts.items() if offset < spans[each][1]}
        firsts: dict[Partition, Stored] = {}
        while left:
            wanted, until = left, {each: spans[each][1] for each in left}
            records, then = await self._browsing(lambda browser, a=wanted, b=until: browser.read(a, b))  # type: ignore[misc]  # mypy infers no lambda with defaults
            for record in records:
                firsts.setdefault((record.topic, record.partition), record)
            left = {
                each: offset
                for each, offset in (left | dict(then)).items()
                if each not in firsts and offset < spans[each][1]
            }
        now = time.time()
        return {
            each: Behind(
                max(0, spans[each][1] - start) if each in firsts else 0,
                whole=True,
                first=firsts.get(each),
                seconds=max(0.0, now - firsts[each].written_at) if each in firsts else None,
            )
            for each, start in starts.items()
        }


class _Told(NamedTuple):
    """What the cluster tells of a group."""

    state: str
    members: Sequence[Member]
    committed: Mapping[Partition, int]

    @property
    def topics(self) -> frozenset[str]:
        """Those that it reads or has read."""
        held = {topic for each in self.members for topic, _ in each.partitions}
        return frozenset(held | {topic for topic, _ in self.committed})

    def reading(self, widths: Mapping[str, int]) -> Reading:
        """How far it is, by the number of partitions of each topic."""
        places = {(topic, number): 0 for topic in self.topics for number in range(widths.get(topic, 0))}
        places |= {each: offset for each, offset in self.committed.items() if each in places}
        return Reading(self.state, self.members, self.topics, places)


def _keeps(config: Mapping[str, str]) -> float | None:
    if "retention.ms" not in config:
        return None
    milliseconds = int(config["retention.ms"])
    return math.inf if milliseconds < 0 else milliseconds / 1000
