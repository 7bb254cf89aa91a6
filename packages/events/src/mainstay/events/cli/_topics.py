"""`mainstay events topics`, `groups`, `lag` and `stuck`: what there is, who reads it, how far they are, and why."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from mainstay.cli import as_json, document, json_line, say, table
from mainstay.core import ConfigurationError
from mainstay.events.cli._service import show, with_log
from mainstay.events.log import EventLog, GroupState, PartitionLag, StuckEvent, TopicState

_WATCH_SECONDS = 2.0
_DAY = 86_400.0


def topics(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[TOPIC…]", help="These, partition by partition.")
    ] = None,
) -> None:
    """The topics, with what they hold and who reads them; 1 where one that a handler reads is missing."""
    found = with_log(lambda log: log.topics(names))
    if as_json():
        document([_topic(each) for each in found])
    elif names:
        _partitions(found)
    else:
        rows = [
            {
                "topic": each.name,
                "partitions": "missing" if each.missing else len(each.partitions),
                "events": each.events,
                "kept": _kept(each),
                "groups": ", ".join(each.groups),
            }
            for each in found
        ]
        table(("topic", "partitions", "events", "kept", "groups"), rows, empty="no topics")
    if not all(each.whole for each in found):
        say("", "Events are counted among the newest 100,000 of the log.")
    if any(each.missing for each in found):
        raise typer.Exit(1)


def _partitions(found: Sequence[TopicState]) -> None:
    rows = [
        {
            "topic": each.name,
            "partition": part.number,
            "first": part.first,
            "last": part.last,
            "events": part.events,
        }
        for each in found
        for part in each.partitions
    ]
    missing = [{"topic": each.name, "partition": "missing"} for each in found if each.missing]
    table(("topic", "partition", "first", "last", "events"), [*rows, *missing])


def _topic(topic: TopicState) -> dict[str, Any]:
    return {
        "topic": topic.name,
        "missing": topic.missing,
        "events": topic.events,
        "whole": topic.whole,
        "keeps_seconds": topic.keeps_seconds,
        "compacted": topic.compacted,
        "groups": topic.groups,
        "partitions": [
            {"partition": each.number, "first": each.first, "last": each.last, "events": each.events}
            for each in topic.partitions
        ],
    }


def _kept(topic: TopicState) -> str:
    seconds = topic.keeps_seconds
    if topic.missing:
        return ""
    known = "" if seconds is None else "for ever" if math.isinf(seconds) else f"{seconds / _DAY:g} days"
    return ", ".join(part for part in (known, "compacted" if topic.compacted else "") if part)


def groups(
    names: Annotated[list[str] | None, typer.Argument(metavar="[GROUP…]", help="Everything about these.")] = None,
) -> None:
    """The consumer groups, with the processes that take part."""
    found = with_log(lambda log: log.groups(names))
    for each in found:
        if names and each.state == "not begun" and not each.topics:
            raise _no_group(each.name)
    if as_json():
        document([_group(each) for each in found])
    elif names:
        for each in found:
            _show_group(each)
    else:
        rows = [
            {
                "group": each.name,
                "state": _state(each) if each.paused is None else f"{_state(each)}, paused",
                "members": len(each.members),
                "partitions": sum(len(member.partitions) for member in each.members),
                "parked": each.parked,
                "topics": ", ".join(each.topics),
            }
            for each in found
        ]
        table(("group", "state", "members", "partitions", "parked", "topics"), rows, empty="no groups")


def _no_group(name: str) -> ConfigurationError:
    return ConfigurationError(f"there is no group {name}: mainstay events groups lists those that there are")


def _state(group: GroupState) -> str:
    return group.state if group.away_seconds is None else f"{group.state} for {_age(group.away_seconds)}"


def _show_group(group: GroupState) -> None:
    facts: dict[str, Any] = {
        "group": group.name,
        "state": _state(group),
        **({} if group.paused is None else {"paused": group.paused}),
        "topics": "\n".join(group.topics),
        "handles": "\n".join(group.handles) or "(not known)",
    }
    if group.parked is not None:
        facts["parked"] = f"{group.parked} keys"
    if group.crashes:
        facts["crashes"] = f"its process ended {group.crashes} times in a row while one event was handled"
    show(facts)
    rows = [
        {
            "process": each.process,
            "since": None if each.since is None else f"{each.since:%Y-%m-%d %H:%M:%S}",
            "partitions": ", ".join(f"{topic}/{number}" for topic, number in each.partitions) or "none",
        }
        for each in group.members
    ]
    say("")
    columns = ("process", "since", "partitions") if any(row["since"] for row in rows) else ("process", "partitions")
    table(columns, rows, empty="no process takes part")


def _group(group: GroupState) -> dict[str, Any]:
    return {
        "group": group.name,
        "state": group.state,
        "away_seconds": group.away_seconds,
        "topics": group.topics,
        "handles": group.handles,
        "paused": group.paused,
        "parked": group.parked,
        "crashes": group.crashes,
        "members": [
            {
                "name": each.name,
                "process": each.process,
                "since": each.since,
                "partitions": [{"topic": topic, "partition": number} for topic, number in each.partitions],
            }
            for each in group.members
        ],
    }


def lag(
    names: Annotated[list[str] | None, typer.Argument(metavar="[GROUP…]", help="Of these groups only.")] = None,
    *,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every two seconds, until Ctrl-C.")] = False,
) -> None:
    """How far groups are behind in each partition: events that are not finished, and the age of the oldest."""

    async def look(log: EventLog) -> None:
        while True:
            await _look(log, names, watch=watch)
            if not watch:
                return
            await asyncio.sleep(_WATCH_SECONDS)

    with_log(look)


async def _look(log: EventLog, names: Sequence[str] | None, *, watch: bool) -> None:
    there = await log.groups(names)
    found: list[PartitionLag] = []
    for each in there:
        if names and each.state == "not begun":
            raise _no_group(each.name)
        found += await log.lag(each.name)
    rows = [_row(each) for each in found]
    if watch and as_json():
        json_line({"time": datetime.now(UTC), "lag": rows})
    else:
        if watch:
            if sys.stdout.isatty():
                print("\x1b[2J\x1b[H", end="")  # noqa: T201  a control of ours
            say(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}", "")
        columns = ("group", "topic", "partition", "events", "seconds", "held by")
        shown = [{**row, "events": f"{row['events']}{'' if row['whole'] else ' or more'}"} for row in rows]
        table(columns, rows if as_json() else shown, empty="no groups")
    sys.stdout.flush()


def _row(lag: PartitionLag) -> dict[str, Any]:
    return {
        "group": lag.group,
        "topic": lag.topic,
        "partition": lag.partition,
        "events": lag.events,
        "whole": lag.whole,
        "seconds": round(lag.seconds, 1),
        "held by": None if lag.holder is None else lag.holder.process,
    }


def stuck(group: Annotated[str, typer.Argument(metavar="GROUP", help="Which.")]) -> None:
    """Why a group does not go on: the events that it has not finished, since when, and which process has them."""

    async def look(log: EventLog) -> Sequence[StuckEvent]:
        if all(each.state == "not begun" for each in await log.groups([group])):
            raise _no_group(group)
        return await log.stuck(group)

    found = with_log(look)
    if as_json():
        document([asdict(each) for each in found])
    for each in found:
        place = f"{each.topic}/{each.partition}" + ("" if each.offset is None else f"@{each.offset}")
        attempt = "" if each.attempt is None else f"attempt {each.attempt}, "
        age = _age((datetime.now(UTC) - each.since).total_seconds())
        say(
            f"{place}  {each.type or '(no type)'}  {'without key' if each.key is None else f'key {each.key}'}",
            *([f"    id {each.id}"] if each.id else []),
            *([f"    handler {each.handler}"] if each.handler else []),
            f"    {attempt}since {each.since:%Y-%m-%d %H:%M:%S} ({age})",
            *([] if each.offset is None else [f"    held by {each.process or 'no process'}"]),
            f"    {each.why}",
        )
    if found:
        raise typer.Exit(1)
    say(f"nothing of group {group} has been waiting for longer than a few seconds")


def _age(seconds: float) -> str:
    for unit, length in (("days", _DAY), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
