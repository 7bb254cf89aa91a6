"""`mainstay`: the commands of this package and those of every package that is installed."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TextIO

import typer
from typer.core import TyperGroup

from mainstay.cli import commands, target, terminal
from mainstay.core import ConfigurationError, MainstayError

__all__ = ["main"]

GROUP = "mainstay.commands"
_WRONG = 2
_INTERRUPTED = 130
_READER_GONE = 141  # what a shell says of a program that SIGPIPE has ended; 1 would be a finding


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: without them, those of the process.

    Returns:
        The exit status: 0 done, 1 a finding, 2 where the command was used wrongly or could not do its work; one
        message on standard error then says why. 130 after Ctrl-C, 141 where the reader of the output has gone.
    """
    named, wanted = target.APP.set(None), terminal.JSON.set(False)
    out: TextIO | None = sys.stdout  # None where it is closed
    _escape_what_it_lacks(out)
    try:
        status = _status(list(sys.argv[1:] if arguments is None else arguments))
        if sys.stdout is not out:  # so typer answers a broken pipe: with other streams, and status 1
            return _reader_gone(out)
        if out is not None:
            out.flush()
    except BrokenPipeError:
        return _reader_gone(out)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except target.ServiceError as error:
        terminal.complain(error, traced=error.__cause__)
        return error.status
    except (MainstayError, OSError, ValueError) as error:
        terminal.complain(error)
        return _WRONG
    except Exception as error:  # noqa: BLE001  status 1 would be a finding
        terminal.complain(error, traced=error)
        return _WRONG
    finally:
        target.APP.reset(named)
        terminal.JSON.reset(wanted)
    return status


def _escape_what_it_lacks(out: object) -> None:
    # Not every terminal knows every character of an id.
    if isinstance(out, io.TextIOWrapper) and out.errors == "strict":
        out.reconfigure(errors="backslashreplace")


def _reader_gone(out: TextIO | None) -> int:
    if out is not None:
        # What Python would still flush at its end must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        sys.stdout = out
    return _READER_GONE


def _status(arguments: list[str]) -> int:
    rest, app, as_json = _common(arguments)
    target.APP.set(app)
    terminal.JSON.set(as_json)
    try:
        typer.main.get_command(_root).main(args=rest, prog_name="mainstay")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else _WRONG
    return 0


def _common(arguments: list[str]) -> tuple[list[str], str | None, bool]:
    """Take `--app` and `--json` out of the arguments: they may stand before and behind a command's own."""
    rest: list[str] = []
    app, as_json = None, False
    while arguments:
        word = arguments.pop(0)
        if word == "--":
            rest += [word, *arguments]
            break
        if word == "--json":
            as_json = True
        elif word == "--app":
            if not arguments:
                msg = "--app needs a value, such as orders.main:app"
                raise ConfigurationError(msg)
            app = arguments.pop(0)
        elif word.startswith("--app="):
            app = word.removeprefix("--app=")
        else:
            rest.append(word)
    return rest, app, as_json


class _Installed(TyperGroup):
    """The commands of packages beside our own; a package is imported when its command is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted({*super().list_commands(ctx), *_points()})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        own = super().get_command(ctx, cmd_name)
        point = _points().get(cmd_name)
        if own is not None or point is None:
            return own
        command = typer.main.get_command(point.load())
        command.name = cmd_name
        return command


def _points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


_root = typer.Typer(
    cls=_Installed,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Run an App of Mainstay's, say what it is made of, check it before traffic does, and look after it.",
)


@_root.callback()
def _options(
    app: str = typer.Option("", metavar="MODULE:NAME", help="The App, such as orders.main:app; or MAINSTAY_APP."),
    json: bool = typer.Option(False, "--json", help="Print JSON."),  # noqa: FBT001  an option
) -> None:
    """Both are taken out of the arguments before they get here; this is where `--help` finds them."""
    del app, json


for _command in (commands.run, commands.describe, commands.check, commands.health):
    _root.command()(_command)
