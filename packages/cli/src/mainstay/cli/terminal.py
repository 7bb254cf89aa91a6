"""Everything that a command prints: for people, for a pipe, or as JSON.

Data comes from others: an error's text, a run's id, an actor's name. All of it goes through `shown`, so that none of it
moves the cursor, changes a colour or begins a line of its own.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from math import isfinite
from textwrap import wrap
from typing import cast

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["as_json", "aside", "complain", "document", "json_line", "say", "shown", "table"]

JSON: ContextVar[bool] = ContextVar("mainstay_cli_json", default=False)


def as_json() -> bool:
    """Whether the user asked for JSON."""
    return JSON.get()


def shown(text: object) -> str:
    """The text with each character that is not printable replaced by its escape, line ends too."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in str(text))


def say(*lines: object) -> None:
    """Print lines for people, each on one line, control characters escaped; nothing where JSON was asked for."""
    if not as_json():
        for line in lines:
            print(shown(line))


def document(value: object) -> None:
    """Print a JSON document; the one thing on standard output where JSON was asked for.

    What JSON does not know is printed as text, an infinite number too.
    """
    print(json.dumps(_plain(value), indent=2, ensure_ascii=True, allow_nan=False, default=str))


def json_line(value: object) -> None:
    """Print a JSON document on one line, as one of many, and what JSON does not know as `document` does."""
    print(json.dumps(_plain(value), ensure_ascii=True, allow_nan=False, default=str))


def _plain(value: object) -> object:
    if isinstance(value, float) and not isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in cast("Mapping[object, object]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in cast("Sequence[object]", value)]
    return value


def complain(error: BaseException, *, traced: BaseException | None = None) -> None:
    """Print an error on standard error, on one line, below the traceback of `traced`."""
    if sys.stderr is None:  # pyright: ignore[reportUnnecessaryComparison]  closed; `print` would take the other stream
        return
    if traced is not None:
        for line in "".join(traceback.format_exception(traced)).rstrip("\n").split("\n"):
            print(shown(line), file=sys.stderr)
    text = str(error) or type(error).__name__
    print(f"mainstay: {shown(text)}", file=sys.stderr)


@contextmanager
def aside() -> Generator[None, None, None]:
    """Let what the service's own code prints go to standard error."""
    with redirect_stdout(sys.stderr):
        yield


def table(
    columns: Sequence[str],
    rows: Sequence[Mapping[str, object]],
    *,
    empty: str = "nothing",
    beneath: str | None = None,
) -> None:
    """Print rows: as JSON objects, as a table in a terminal, in aligned columns elsewhere.

    Args:
        columns: the keys of the rows, in the order in which they are shown; also the headings.
        rows: what to show. JSON holds every key, also those that are no columns.
        empty: what is said for people where there are no rows.
        beneath: a column of long texts. Where the terminal is too narrow for a row, they stand beneath it, so that the
            other columns, such as an id, stay whole.
    """
    if as_json():
        document([dict(row) for row in rows])
    elif not rows:
        say(empty)
    elif sys.stdout is not None and sys.stdout.isatty():  # pyright: ignore[reportUnnecessaryComparison]  or closed
        console = Console()
        cells = _cells(columns, rows)
        if beneath is not None and sum(map(max, _lengths(cells))) + 3 * (len(columns) - 1) > console.width:
            _stacked(columns, rows, beneath, console.width)
            return
        drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for column in columns:
            drawn.add_column(column, overflow="fold")
        for row in rows:
            drawn.add_row(*(Text(_cell(row.get(column))) for column in columns))
        console.print(drawn)
    else:
        print(*_aligned(columns, rows), sep="\n")


def _stacked(columns: Sequence[str], rows: Sequence[Mapping[str, object]], beneath: str, width: int) -> None:
    head, *lines = _aligned([column for column in columns if column != beneath], rows)
    print(head, "─" * width, sep="\n")
    for line, row in zip(lines, rows, strict=True):
        print(line)
        for part in wrap(_cell(row.get(beneath)), width - 4, break_on_hyphens=False):
            print(f"    {part}")


def _aligned(columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> list[str]:
    cells = _cells(columns, rows)
    widths = [max(lengths) for lengths in _lengths(cells)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def _cells(columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> list[list[str]]:
    return [list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]


def _lengths(cells: Sequence[Sequence[str]]) -> list[list[int]]:
    return [[len(cell) for cell in column] for column in zip(*cells, strict=True)]


def _cell(value: object) -> str:
    return "" if value is None else shown(value)
