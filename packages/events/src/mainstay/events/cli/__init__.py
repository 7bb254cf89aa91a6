"""`mainstay events`: looks at what could not be handled, has it tried again, or clears it away."""

import typer

from mainstay.events.cli._letters import dead_letters
from mainstay.events.cli._parked import parked
from mainstay.events.cli._refused import refused

__all__ = ["commands"]

commands = typer.Typer(no_args_is_help=True, help="Events: what could not be handled, and sending it again.")
commands.add_typer(dead_letters, name="dead-letters")
commands.add_typer(refused, name="refused")
commands.add_typer(parked, name="parked")
