"""Pauses, for a person: a whole group, one kind of event or one key of it handles nothing until it is resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mainstay.core import ConfigurationError, derived_id
from mainstay.database import Database
from mainstay.events import tables
from mainstay.events._handled import KEPT_SECONDS, Handled
from mainstay.events.errors import PauseError

__all__ = ["Pause", "Pauses"]


@dataclass(frozen=True, slots=True)
class Pause:
    """What a person has paused, and why.

    Attributes:
        group: the consumer group.
        kind: of which only this kind of event is paused, such as `order.paid 2.x`; None for any other pause.
        key: of which only the events with this key are paused; None for any other pause.
        by: who did it.
        reason: why.
        since: since when, in UTC.
    """

    group: str
    kind: str | None
    key: bytes | None
    by: str
    reason: str
    since: datetime

    @property
    def whole(self) -> bool:
        """Whether it is of the group as a whole."""
        return self.kind is None and self.key is None

    @property
    def said(self) -> str:
        """By whom, since when and why, in one line; without the key, which may be a person's name."""
        return f"paused by {self.by} since {self.since:%Y-%m-%d %H:%M:%S} UTC: {self.reason}"


class Pauses:
    """The pauses of this service; `app.get(Pauses)`, or the commands `mainstay events pause | resume | paused`.

    Every process of the group knows of a pause within about a second, also one that starts later. A handler that runs
    ends as usual. What is paused keeps its order: when it is resumed it is handled from where it stopped. In an App
    without a Database every method raises `ConfigurationError`.
    """

    def __init__(self, database: Database | None) -> None:
        self._known = database

    @property
    def _database(self) -> Database:
        if self._known is None:
            msg = "pauses are kept in the Database, and this App has none: add DatabaseModule.for_root()"
            raise ConfigurationError(msg)
        return self._known

    async def list(self, group: str | None = None) -> Sequence[Pause]:
        """The pauses, the oldest first, of one group or of all."""
        rows = await self._database.read(tables.LIST_PAUSES)
        return [pause for pause in map(pause_of, rows) if group in {None, pause.group}]

    async def pause(
        self, group: str, *, kind: str | None = None, key: str | bytes | None = None, by: str, reason: str
    ) -> Pause:
        """Have a group handle nothing, or nothing of one kind of event or with one key, until it is resumed.

        A paused group holds its partitions and reads nothing more of them. A kind of event stands for its handler: a
        group has one for each. Of a paused kind or key only the events concerned wait, in the Database, and behind
        each all that follows of its key; the others go on.

        Args:
            group: the consumer group.
            kind: type and major version, such as `order.paid 2.x`; one that an upcaster reads is another kind.
            key: as the event class says it, or its bytes; in all topics that the group reads.
            by: who does it.
            reason: why, for those who ask later.

        Raises:
            PauseError: there is no such group, it handles no such kind, or that is paused already.
            ValueError: both a kind and a key are named, or neither a person nor a reason is.
        """
        place = _place(group, kind, key)
        if not by or not reason:
            msg = "pause(by=…, reason=…): say who pauses it, and why"
            raise ValueError(msg)
        database = self._database
        await _is_handled(database, group, kind)
        async with database.transaction() as session:
            row = {**place, "paused_by": by, "reason": reason}
            added: Any = await session.execute(tables.INSERT_PAUSE[database.dialect], row)
            rows = (await session.execute(tables.GET_PAUSE, {"pause": place["id"]})).all()
        pause = pause_of(rows[0])
        if added.rowcount == 0:
            msg = f"{_named(group, kind, key)} is {pause.said}"
            raise PauseError(msg)
        return pause

    async def resume(self, group: str, *, kind: str | None = None, key: str | bytes | None = None) -> Pause:
        """End a pause, named as it was made, and return what it was.

        Raises:
            PauseError: that is not paused.
            ValueError: both a kind and a key are named.
        """
        place = _place(group, kind, key)
        database = self._database
        async with database.transaction() as session:
            rows = (await session.execute(tables.GET_PAUSE, {"pause": place["id"]})).all()
            await session.execute(tables.LEAVE_OUT_PAUSE[database.dialect], {"pause": place["id"]})
            ended: Any = await session.execute(tables.DELETE_PAUSE, {"pause": place["id"]})
        if ended.rowcount == 0:
            msg = f"{_named(group, kind, key)} is not paused: list what is with mainstay events paused"
            raise PauseError(msg)
        return pause_of(rows[0])


def pause_of(row: Any) -> Pause:
    """The pause in a row of the table."""
    since = datetime.fromtimestamp(row.paused_at, UTC)
    return Pause(row.group_name, row.kind, row.key, row.paused_by, row.reason, since)


def said_of(pauses: Sequence[Pause]) -> str | None:
    """What is paused of a group, in one line; None where nothing is."""
    said = [pause.said for pause in pauses if pause.whole]
    said += sorted(f"{pause.kind} is {pause.said}" for pause in pauses if pause.kind is not None)
    keys = [pause for pause in pauses if pause.key is not None]
    if keys:
        oldest = min(keys, key=lambda pause: pause.since)
        said.append(f"{len(keys)} keys are paused, the first of them {oldest.said}")
    return "; ".join(said) or None


def _place(group: str, kind: str | None, key: str | bytes | None) -> dict[str, object]:
    if kind is not None and key is not None:
        msg = "a kind and a key are two pauses: name one of them"
        raise ValueError(msg)
    raw = key.encode() if isinstance(key, str) else key
    name = f"paused:{group}:{'' if kind is None else f'kind:{kind}'}{'' if raw is None else f'key:{raw.hex()}'}"
    return {"id": derived_id(name), "group_name": group, "kind": kind, "key": raw}


def _named(group: str, kind: str | None, key: str | bytes | None) -> str:
    if kind is not None:
        return f"{kind} in group {group}"
    return f"group {group}" if key is None else f"this key of group {group}"


async def _is_handled(database: Database, group: str, kind: str | None) -> None:
    """Refuse a pause of what there is not: a misspelt name would pause nothing."""
    known = await Handled(database, group, ()).look()
    if not known:
        rows = await database.read(tables.HANDLING_GROUPS[database.dialect], {"kept": KEPT_SECONDS})
        there = ", ".join(row.group_name for row in rows) or "none"
        msg = f"no process has a group {group} whose events go through this Database; the groups there are: {there}"
        raise PauseError(msg)
    if kind is not None and kind not in known:
        msg = f"group {group} has no handler for {kind!r}; it handles {', '.join(sorted(known))}"
        raise PauseError(msg)
