"""`mainstay events`: looks at topics, groups and events, and at what could not be handled, and clears that away."""

import typer

from mainstay.events.cli._letters import dead_letters
from mainstay.events.cli._parked import parked
from mainstay.events.cli._pauses import pause, paused, resume
from mainstay.events.cli._refused import refused
from mainstay.events.cli._scheduled import scheduled
from mainstay.events.cli._tail import publish, tail
from mainstay.events.cli._topics import groups, lag, stuck, topics

__all__ = ["commands"]

commands = typer.Typer(
    no_args_is_help=True, help="Events: where they are, who reads them, and what could not be handled."
)
for _command in (topics, groups, lag, stuck, tail, publish):
    commands.command()(_command)
commands.add_typer(dead_letters, name="dead-letters")
commands.add_typer(refused, name="refused")
commands.add_typer(parked, name="parked")
commands.add_typer(scheduled, name="scheduled")
commands.command("pause")(pause)
commands.command("resume")(resume)
commands.command("paused")(paused)
