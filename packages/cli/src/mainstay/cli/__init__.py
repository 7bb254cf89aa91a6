"""The command `mainstay`, and what a package's own commands are written with.

A package brings its commands as a `typer.Typer` through the entry point group `mainstay.commands`, from a module
`cli.py` that nothing else imports: so typer and rich are needed only where the command is.
"""

from mainstay.cli.main import main
from mainstay.cli.target import named_app, needed_app, object_at, settings_of
from mainstay.cli.terminal import as_json, document, json_line, say, shown, table

__all__ = [
    "as_json",
    "document",
    "json_line",
    "main",
    "named_app",
    "needed_app",
    "object_at",
    "say",
    "settings_of",
    "shown",
    "table",
]
