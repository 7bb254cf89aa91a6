"""Records and errors that are stranger than expected: each becomes a dead letter, and what comes after is handled."""

import asyncio

import pytest
from pydantic import SecretStr, field_validator

from mainstay.core import App
from mainstay.core.testing import eventually
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.events import DeadLetters, Event, EventRouter, EventsModule, EventsSettings
from mainstay.events._delivery import Assignment, Delivery
from mainstay.events._dispatch import Dispatcher
from mainstay.events._failure import Failures
from mainstay.events._routes import Route
from mainstay.events._transport import LogRecord
from mainstay.events.dead_letters import DeadLetter


class Fussy(Event, type="poison.fussy", key="name"):
    name: str

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        return {"good": "good"}[value]  # a KeyError, which pydantic lets through


def _app(url: str, router: EventRouter) -> App:
    settings = EventsSettings(
        transport="sql", partitions=1, retry_attempts=1, retry_initial_seconds=0.01, retry_max_seconds=0.02
    )
    return App(
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url))),
        EventsModule.for_root(settings),
        EventsModule.for_feature(router),
    )


async def test_trap_06_a_validator_that_raises_anything_makes_a_dead_letter(sqlite_url: str) -> None:
    """An exception that is no validation error must not stop the consumer, at every start again."""
    router = EventRouter()
    seen: list[str] = []

    @router.on(Fussy, group="g", on_failure="dead-letter")
    async def handle(event: Fussy) -> None:
        seen.append(event.name)

    app = _app(sqlite_url, router)
    async with app.running(serve=True):
        await router.publish(Fussy.model_construct(name="strange"))
        await router.publish(Fussy(name="good"))
        letters = app.get(DeadLetters)
        await eventually(lambda: seen == ["good"])
        async with asyncio.timeout(10):
            while not (listed := await letters.list()):  # noqa: ASYNC110  another task stores it
                await asyncio.sleep(0.01)
        assert "KeyError" in listed[0].error
        assert all(health.status == "ok" for health in (await app.health()).values())


@pytest.mark.parametrize("name", ["ce_dataversion", "ce_traceparent", "ce_actor", "ce_id", "ce_correlationid", "own"])
async def test_a_header_without_a_value_is_as_if_it_were_not_there(name: str) -> None:
    """Kafka's headers may be null, whoever wrote them."""
    seen: list[str] = []
    buried: list[Exception] = []

    async def handle(event: Fussy) -> None:
        seen.append(event.name)

    async def bury(delivery: Delivery, error: Exception) -> None:
        buried.append(error)

    route = Route("poison.fussy", "g")
    settings = EventsSettings(transport="memory")
    route.reads(Fussy, handle, wants_metadata=False, retry=settings.retry())
    clock = App().clock
    failures = Failures("g", bury=bury, clock=clock)
    dispatcher = Dispatcher("g", {"poison.fussy": route}, concurrency=1, failures=failures, clock=clock)
    assignment = Assignment("poison", 0)
    headers = {"ce_type": b"poison.fussy", "ce_id": b"1", name: None}
    record = LogRecord("poison", 0, 0, b"k", b'{"name":"good"}', list(headers.items()))
    dispatcher.feed(assignment, [record])
    assert await dispatcher.settle([assignment], 10)
    await dispatcher.stop()
    assert (seen, buried) == (["good"], [])
    letter = DeadLetter.of("g", record, ValueError(), 1, clock.now())
    assert dict(letter.headers)[name] is None


async def test_an_error_that_no_store_would_take_is_stored_all_the_same(database_url: str) -> None:
    """Half a surrogate pair, a zero byte or a megabyte in a message must not keep a dead letter from being stored."""
    router = EventRouter()

    @router.on(Fussy, group="g", on_failure="dead-letter")
    async def handle(event: Fussy) -> None:
        msg = "cannot open \udc80 nor \0: " + "x" * 1_000_000
        raise ValueError(msg)

    app = _app(database_url, router)
    async with app.running(serve=True):
        await router.publish(Fussy(name="good"))
        letters = app.get(DeadLetters)
        async with asyncio.timeout(10):
            while not (listed := await letters.list()):  # noqa: ASYNC110  another task stores it
                await asyncio.sleep(0.01)
    assert "ValueError: cannot open \\udc80 nor" in listed[0].error
    assert len(listed[0].error) < 21_000
