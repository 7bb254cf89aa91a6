"""`mainstay events pause | resume | paused`: a group, a kind of event or a key handles nothing for a while."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mainstay.cli import as_json, document, say, table
from mainstay.events.cli._options import By, Group
from mainstay.events.cli._service import text_of, user, with_service
from mainstay.events.pauses import Pause, Pauses

Paused = Annotated[str, typer.Argument(metavar="GROUP", help="The consumer group.")]
Kind = Annotated[str | None, typer.Option(help="Only this kind of event, by type and major version: 'order.paid 1.x'.")]
Key = Annotated[str | None, typer.Option(help="Only events with this key.")]
Reason = Annotated[str, typer.Option(help="Why, for those who ask later.")]


def pause(group: Paused, reason: Reason, kind: Kind = None, key: Key = None, by: By = None) -> None:
    """Have a group, or a kind of event or a key of it, handle nothing until it is resumed."""
    _one_of(kind, key)
    made = with_service(Pauses, lambda pauses: pauses.pause(group, kind=kind, key=key, by=by or user(), reason=reason))
    say(f"paused: {_named(made)}")
    if as_json():
        document(_row(made))


def resume(group: Paused, kind: Kind = None, key: Key = None) -> None:
    """End a pause, named as it was made."""
    _one_of(kind, key)
    ended = with_service(Pauses, lambda pauses: pauses.resume(group, kind=kind, key=key))
    say(f"resumed: {_named(ended)}, {ended.said}")
    if as_json():
        document(_row(ended))


def paused(group: Group = None) -> None:
    """What is paused, the oldest first."""
    rows = [_row(each) for each in with_service(Pauses, lambda pauses: pauses.list(group))]
    table(("since", "group", "kind", "key", "by", "reason"), rows, empty="nothing is paused")


def _one_of(kind: str | None, key: str | None) -> None:
    if kind is not None and key is not None:
        msg = "--kind and --key are two pauses: pass one of them"
        raise typer.BadParameter(msg)


def _named(pause: Pause) -> str:
    if pause.kind is not None:
        return f"{pause.kind} in group {pause.group}"
    return f"group {pause.group}" if pause.key is None else f"key {text_of(pause.key)} in group {pause.group}"


def _row(pause: Pause) -> dict[str, Any]:
    return {
        "since": f"{pause.since:%Y-%m-%d %H:%M:%S}",
        "group": pause.group,
        "kind": pause.kind or "",
        "key": "" if pause.key is None else text_of(pause.key),
        "by": pause.by,
        "reason": pause.reason,
    }
