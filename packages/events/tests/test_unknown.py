"""Events that no process of a group can handle: what its router says becomes of them."""

from typing import Any, Literal

import pytest

from mainstay.core import App, ConfigurationError
from mainstay.core.testing import VirtualClock, eventually
from mainstay.events import Event, EventConsumers, EventRouter, EventsModule, EventsSettings
from mainstay.events.testing import in_memory

Rule = Literal["skip", "dead-letter", "stop"]


class Known(Event, type="shelf.known", version="1.0", key="shelf"):
    shelf: str


class Newer(Event, type="shelf.known", version="2.0", key="shelf"):
    shelf: str


class Other(Event, type="shelf.other", version="1.0", key="shelf"):
    shelf: str


def router(seen: list[str], **rules: Any) -> EventRouter:
    """A feature that handles one of them."""
    events = EventRouter(**rules)

    @events.on(Known, group="shelves")
    async def handle(event: Known) -> None:
        seen.append(event.shelf)

    return events


@pytest.mark.parametrize(
    ("rules", "event", "error"),
    [
        ({}, Other(shelf="a"), None),
        ({}, Newer(shelf="a"), "has version '2.0'; this group reads 1.x"),
        ({"unknown_types": "dead-letter"}, Other(shelf="a"), "group shelves has no handler for shelf.other 1.x"),
        ({"unknown_versions": "skip"}, Newer(shelf="a"), None),
    ],
)
async def test_it_is_skipped_or_a_dead_letter(rules: dict[str, Rule], event: Event, error: str | None) -> None:
    """By default a type is skipped and a version is not; what follows of its key is handled."""
    seen: list[str] = []
    async with in_memory(router(seen, **rules)) as rehearsal:
        await rehearsal.publish(event)
        await rehearsal.publish(Known(shelf="a"))
        await rehearsal.settled()
        letters = await rehearsal.dead_letters()
        assert seen == ["a"]
        assert len(letters) == (0 if error is None else 1)
        assert all(error is not None and error in letter.error for letter in letters)


@pytest.mark.parametrize(
    ("rules", "event", "kind"),
    [
        ({"unknown_types": "stop"}, Other(shelf="a"), "shelf.other 1.x"),
        ({"unknown_versions": "stop"}, Newer(shelf="a"), "shelf.known 2.x"),
    ],
)
async def test_the_partition_stops_and_health_says_where(rules: dict[str, Rule], event: Event, kind: str) -> None:
    """Nothing of the key goes on, and nothing is lost: a process that handles it finds it where it is."""
    seen: list[str] = []
    clock = VirtualClock()
    async with in_memory(router(seen, **rules), clock=clock, partitions=1) as rehearsal:
        (consumer,) = rehearsal.app.get(EventConsumers).consumers
        await rehearsal.publish(event)
        await rehearsal.publish(Known(shelf="a"))
        await eventually(lambda: bool(consumer._failures.stops), what="the stop")
        await clock.advance(60)
        await eventually(lambda: bool(consumer._failures.stops), what="the stop")
        health = await rehearsal.app.get(EventConsumers).health()
        assert health.status == "degraded"
        assert f"group shelves: it has stopped at shelf/0@0 ({kind}, key 'a', since " in health.detail
        assert seen == []
        assert await rehearsal.dead_letters() == []


def test_a_rule_that_is_none_is_refused_and_two_rules_of_a_group_are_an_error_of_the_app() -> None:
    """Where they are written."""
    with pytest.raises(ValueError, match="it is 'skip', 'dead-letter' or 'stop'"):
        router([], unknown_types="ignore")
    first, second = router([], unknown_types="stop"), EventRouter()

    @second.on(Other, group="shelves")
    async def handle(event: Other) -> None:
        raise AssertionError

    with pytest.raises(ConfigurationError, match="group 'shelves' is told two things about what it cannot handle"):
        App(EventsModule.for_root(EventsSettings(transport="memory")), EventsModule.for_feature(first, second))
