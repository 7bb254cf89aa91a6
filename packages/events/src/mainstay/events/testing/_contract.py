"""The contract that every transport keeps, as a suite."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID, uuid4

from mainstay.core import App, Context, FullJitter, Retry, bind, current
from mainstay.core.testing import eventually
from mainstay.events.dead_letters import DeadLetter, DeadLetters
from mainstay.events.event import Event, Version
from mainstay.events.metadata import ONLY_GROUP, TYPE, Metadata, Outgoing, encode, envelope
from mainstay.events.publisher import EventPublisher
from mainstay.events.router import EventRouter

_LEAK: ContextVar[str] = ContextVar("leak")


def _bytes_of(event: Outgoing | DeadLetter) -> str:
    """All that a record is, but for the header that says which group a redriven one is for."""
    return repr((event.key, event.value, [pair for pair in event.headers if pair[0] != ONLY_GROUP]))


class Placed(Event, type="contract.placed", version="1.0", key="order"):
    """An event of the contract."""

    order: str
    number: int = 0


class Paid(Event, type="contract.paid", version="1.0", key="order"):
    """Another one on the same topic."""

    order: str
    number: int = 0


class Noted(Event, type="contract.noted", version="1.0"):
    """One without a key."""

    number: int = 0


class TransportContract:
    """What every transport keeps. Subclass it, implement `service`, and let pytest (with pytest-asyncio) collect it."""

    prefix: str
    """Put before every topic and group of one test, so that tests share a broker."""

    def service(self, *routers: EventRouter, **settings: Any) -> App:
        """An App with these routers and settings on the transport under test; called again, a second process' view."""
        raise NotImplementedError

    def settings(self, **more: Any) -> dict[str, Any]:
        """Settings that keep this test apart from others."""
        topics = dict.fromkeys(("contract.placed", "contract.paid", "contract.noted"), f"{self.prefix}-contract")
        return {"topics": topics, "partitions": 4, "retry_initial_seconds": 0.01, "retry_max_seconds": 0.05, **more}

    @asynccontextmanager
    async def serving(self, *routers: EventRouter, **settings: Any) -> AsyncGenerator[App, None]:
        """A service that also consumes."""
        async with self.service(*routers, **self.settings(**settings)).running(serve=True) as app:
            yield app

    def group(self, name: str) -> str:
        """The name of a group of this test."""
        return f"{self.prefix}-{name}"

    async def test_an_event_arrives_with_its_fields_and_what_travels_beside_them(self) -> None:
        """A handler gets the event, its id, type, version, source and key, and works in the publisher's context."""
        events = EventRouter()
        seen: list[tuple[Placed, Metadata, Context]] = []

        @events.on(Placed, group=self.group("one"))
        async def handle(event: Placed, meta: Metadata) -> None:
            seen.append((event, meta, current()))

        async with self.serving(events, source="shop"):
            with bind(correlation_id="conversation-1", causation_id="request-1", actor="ann", tenant="acme"):
                await events.publish(Placed(order="a/ü", number=7))
            await eventually(lambda: bool(seen), what="the delivery")
        event, meta, context = seen[0]
        assert event == Placed(order="a/ü", number=7)
        assert (meta.type, meta.version, meta.source, meta.key) == ("contract.placed", Version(1, 0), "shop", "a/ü")
        assert (meta.correlation_id, meta.causation_id) == ("conversation-1", "request-1")
        assert (meta.actor, meta.tenant, meta.attempt) == ("ann", "acme", 1)
        assert UUID(meta.id).version == 7
        assert meta.time is not None
        assert meta.time.utcoffset() is not None
        assert context == Context("conversation-1", meta.id, "ann", "acme")

    async def test_each_group_receives_every_event_once(self) -> None:
        """Two groups on one topic both get all of it, and a group that handles one type skips the other."""
        events = EventRouter()
        first: list[int] = []
        second: list[str] = []

        @events.on(Placed, group=self.group("first"))
        async def count(event: Placed) -> None:
            first.append(event.number)

        @events.on(Placed, Paid, group=self.group("second"))
        async def note(event: Placed | Paid) -> None:
            second.append(f"{type(event).__name__}{event.number}")

        async with self.serving(events):
            for number in range(20):
                await events.publish(Placed(order=f"o{number}", number=number))
                await events.publish(Paid(order=f"o{number}", number=number))
            await eventually(lambda: len(first) >= 20 and len(second) >= 40, what="everything handled")
        assert sorted(first) == list(range(20))
        assert sorted(second) == sorted([f"Placed{n}" for n in range(20)] + [f"Paid{n}" for n in range(20)])

    async def test_equal_keys_keep_their_order_and_different_keys_do_not_wait(self) -> None:
        """Events of one key are handled in turn, also across types, while a slow key holds nobody else up."""
        events = EventRouter()
        seen: dict[str, list[int]] = {}
        gate = asyncio.Event()

        @events.on(Placed, Paid, group=self.group("order"))
        async def handle(event: Placed | Paid) -> None:
            if event.order == "slow":
                await gate.wait()
            await asyncio.sleep(0)
            seen.setdefault(event.order, []).append(event.number)

        async with self.serving(events):
            for number in range(25):
                kind = Placed if number % 2 else Paid
                await events.publish_batch([kind(order=order, number=number) for order in ("slow", "a", "b", "c", "d")])
            others = ("a", "b", "c", "d")
            await eventually(lambda: all(len(seen.get(order, ())) == 25 for order in others), what="the other keys")
            assert "slow" not in seen
            gate.set()
            await eventually(lambda: len(seen.get("slow", ())) == 25, what="the slow key")
        assert all(numbers == list(range(25)) for numbers in seen.values())

    async def test_events_arrive_together_and_one_that_fails_is_told_from_the_others(self) -> None:
        """A batch has events of one partition in its order; only the bad one of them becomes a dead letter."""
        events = EventRouter()
        largest = 0
        seen: dict[int, list[int]] = {}

        @events.on_batch(
            Placed,
            group=self.group("batch"),
            size=8,
            wait_seconds=0.1,
            retry=Retry(attempts=2),
            on_failure="dead-letter",
        )
        async def handle(some: list[Placed], metas: list[Metadata]) -> None:
            nonlocal largest
            largest = max(largest, len(some))
            if any(event.number == 7 for event in some):
                msg = "seven"
                raise RuntimeError(msg)
            (partition,) = {meta.partition for meta in metas}
            seen.setdefault(partition, []).extend(event.number for event in some)

        async with self.serving(events) as app:
            await events.publish_batch([Placed(order=f"o{number % 5}", number=number) for number in range(60)])
            await eventually(lambda: sum(map(len, seen.values())) == 59, what="the others")
            letters = await app.get(DeadLetters).list(self.group("batch"))
        assert [(letter.key, letter.attempts) for letter in letters] == [(b"o2", 2)]
        assert sorted(number for numbers in seen.values() for number in numbers) == [*range(7), *range(8, 60)]
        assert all(numbers == sorted(numbers) for numbers in seen.values())
        assert 1 < largest <= 8

    async def test_order_is_kept_through_retries(self) -> None:
        """While an event is retried, the next of its key waits; other keys go on."""
        events = EventRouter()
        seen: list[tuple[str, int]] = []
        failures = iter([True, True, False])

        @events.on(Placed, group=self.group("retry"), retry=Retry(attempts=5, wait=FullJitter(0.05, 0.05)))
        async def handle(event: Placed) -> None:
            if event.order == "shaky" and event.number == 0 and next(failures):
                msg = "not yet"
                raise RuntimeError(msg)
            seen.append((event.order, event.number))

        async with self.serving(events):
            await events.publish_batch([Placed(order="shaky", number=number) for number in range(3)])
            await events.publish(Placed(order="other", number=9))
            await eventually(lambda: len(seen) == 4, what="all handled")
        assert [number for order, number in seen if order == "shaky"] == [0, 1, 2]

    async def test_what_keeps_failing_becomes_a_dead_letter_and_can_be_redriven(self) -> None:
        """After its attempts an event is kept, the rest goes on, and a redrive reaches this group only."""
        events = EventRouter()
        broken = True
        handled: list[int] = []
        others: list[int] = []
        attempts: list[int] = []

        once_more = Retry(attempts=3, wait=FullJitter(0.0, 0.0))

        @events.on(Placed, group=self.group("fails"), retry=once_more, on_failure="dead-letter")
        async def handle(event: Placed, meta: Metadata) -> None:
            if event.number == 1:
                attempts.append(meta.attempt)
                if broken:
                    msg = "the printer is on fire"
                    raise RuntimeError(msg)
            handled.append(event.number)

        @events.on(Placed, group=self.group("fine"))
        async def fine(event: Placed) -> None:
            others.append(event.number)

        async with self.serving(events) as app:
            letters = app.get(DeadLetters)
            await events.publish_batch([Placed(order="a", number=number) for number in range(3)])
            await eventually(lambda: handled == [0, 2], what="the rest")
            listed = await letters.list(self.group("fails"))
            assert len(listed) == 1
            letter = await letters.get(listed[0].id)
            assert (letter.group, letter.type, letter.attempts) == (self.group("fails"), "contract.placed", 3)
            assert b'"number":1' in (letter.value or b"")
            assert letter.key == b"a"
            assert "the printer is on fire" in letter.error
            assert dict(letter.headers)[TYPE] == b"contract.placed"
            assert attempts == [1, 2, 3]
            await eventually(lambda: len(others) == 3, what="the other group")
            broken = False
            await letters.redrive(letter.id)
            await eventually(lambda: handled == [0, 2, 1], what="the redriven event")
            assert await letters.list(self.group("fails")) == []
            await events.publish(Placed(order="z", number=99))
            await eventually(lambda: 99 in others, what="the event after it")
        assert sorted(others) == [0, 1, 2, 99]

    async def test_poison_bytes_are_kept_as_they_are_and_stop_nothing(self) -> None:
        """What is no event, or not this one, becomes a dead letter at once, byte for byte; what follows is handled."""
        events = EventRouter()
        handled: list[int] = []

        @events.on(Placed, group=self.group("poison"), on_failure="dead-letter")
        async def handle(event: Placed) -> None:
            handled.append(event.number)

        async with self.serving(events) as app:
            await events.publish(Placed(order="a", number=1))
            shared = envelope(time=datetime.now(UTC), source="x", context=Context())
            good = encode(Placed(order="a"), id=str(uuid4()), topic=f"{self.prefix}-contract", shared=shared)
            newer = [(name, b"2.0" if name == "ce_dataversion" else value) for name, value in good.headers]
            poison = [
                good._replace(value=b"\xff\xfe not json", headers=[*good.headers, ("x-raw", b"\x80\xff")]),
                good._replace(value=b'{"order": 5}'),
                good._replace(headers=[]),
                good._replace(headers=newer),
                good._replace(value=None, headers=[*good.headers, ("x-null", None), ("x-empty", b"")]),
            ]
            await self.send_raw(app, poison)
            await events.publish(Placed(order="a", number=2))
            await eventually(lambda: handled == [1, 2], what="what follows")
            listed = await app.get(DeadLetters).list(self.group("poison"))
            assert sorted(map(_bytes_of, listed)) == sorted(map(_bytes_of, poison))
            assert all(letter.attempts == 1 for letter in listed)
            # Sent again they are what they were, and become dead letters for the same reasons.
            for letter in listed:
                await app.get(DeadLetters).redrive(letter.id)
            await events.publish(Placed(order="a", number=3))
            await eventually(lambda: handled == [1, 2, 3], what="what follows")
            again = await app.get(DeadLetters).list(self.group("poison"))
            assert sorted(map(_bytes_of, again)) == sorted(map(_bytes_of, poison))
            assert not {letter.id for letter in listed} & {letter.id for letter in again}

    async def send_raw(self, app: App, batch: Sequence[Outgoing]) -> None:
        """Put records on the topic past the publisher."""
        await app.get(EventPublisher)._send(batch)

    async def test_a_newer_minor_version_is_read_and_unknown_fields_are_ignored(self) -> None:
        """A publisher may add a field before its readers know it."""
        events = EventRouter()
        seen: list[tuple[Placed, Version]] = []

        @events.on(Placed, group=self.group("minor"))
        async def handle(event: Placed, meta: Metadata) -> None:
            seen.append((event, meta.version))

        class Newer(Event, type="contract.placed", version="1.3", key="order"):
            order: str
            number: int
            colour: str

        async with self.serving(events):
            await events.publish(Newer(order="a", number=3, colour="red"))
            await eventually(lambda: bool(seen), what="the delivery")
        assert seen == [(Placed(order="a", number=3), Version(1, 3))]

    async def test_a_restart_goes_on_where_the_group_left_off(self) -> None:
        """What was handled before a stop is not handled again, and what was published meanwhile is not lost."""
        seen: list[int] = []

        def feature() -> EventRouter:
            events = EventRouter()

            @events.on(Placed, Noted, group=self.group("restart"))
            async def handle(event: Placed | Noted) -> None:
                seen.append(event.number)

            return events

        events = feature()
        async with self.serving(events):
            await events.publish_batch([Placed(order=f"o{number}", number=number) for number in range(10)])
            await events.publish_batch([Noted(number=number) for number in range(10, 20)])
            await eventually(lambda: len(seen) == 20, what="the first half")
        events = EventRouter()
        async with self.service(events, **self.settings()):
            await events.publish_batch([Placed(order=f"o{number}", number=number) for number in range(20, 30)])
        async with self.serving(feature()):
            await eventually(lambda: len(seen) >= 30, what="the second half")
        assert sorted(seen) == list(range(30))

    async def test_a_group_that_begins_at_the_latest_event_misses_nothing_after_it(self) -> None:
        """What was there before is passed over, and what comes after its first event is not, also over a restart."""
        seen: dict[str, list[int]] = {"earliest": [], "latest": []}

        def feature(start: Literal["earliest", "latest"]) -> EventRouter:
            events = EventRouter()

            @events.on(Placed, group=self.group(start), start=start)
            async def handle(event: Placed) -> None:
                seen[start].append(event.number)

            return events

        async with self.serving(events := feature("earliest")):
            await events.publish_batch([Placed(order=f"o{number}", number=-1) for number in range(20)])
            await eventually(lambda: len(seen["earliest"]) == 20, what="what was there before")
        async with self.serving(events := feature("latest")):
            while not seen["latest"]:
                await events.publish(Placed(order=f"o{uuid4()}", number=0))
                await asyncio.sleep(0.02)
        async with self.service(events := EventRouter(), **self.settings()):
            await events.publish_batch([Placed(order=f"o{number}", number=number) for number in range(1, 21)])
        async with self.serving(feature("latest")):
            await eventually(lambda: set(seen["latest"]) == set(range(21)), what="what came meanwhile")

    async def test_a_drain_finishes_what_runs_and_starts_nothing_new(self) -> None:
        """Stopping waits for the handler that runs; events behind it are left for the next owner."""
        events = EventRouter()
        started, done = asyncio.Event(), False

        @events.on(Placed, group=self.group("drain"))
        async def handle(_event: Placed) -> None:
            nonlocal done
            started.set()
            await asyncio.sleep(0.2)
            done = True

        async with self.serving(events):
            await events.publish(Placed(order="a"))
            await started.wait()
        assert done

    async def test_what_a_handler_sets_in_its_context_does_not_reach_the_next_event(self) -> None:
        """Each event starts with a fresh context, whatever a handler before it left behind."""
        events = EventRouter()
        leaks: list[str] = []

        @events.on(Noted, group=self.group("leak"))
        async def handle(event: Noted) -> None:
            leaks.append(_LEAK.get(""))
            _LEAK.set(f"left by {event.number}")

        async with self.serving(events, concurrency=1):
            await events.publish_batch([Noted(number=number) for number in range(5)])
            await eventually(lambda: len(leaks) == 5, what="all handled")
        assert leaks == [""] * 5
