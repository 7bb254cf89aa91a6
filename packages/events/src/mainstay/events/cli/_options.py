"""The arguments and options that several commands have."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated
from uuid import UUID

import typer

_MOST = 2**31 - 1  # no database takes a number without a limit

Ids = Annotated[list[UUID], typer.Argument(metavar="ID…", help="Which.")]
Group = Annotated[str | None, typer.Option(help="Of this consumer group only.")]
Limit = Annotated[int, typer.Option(min=1, max=_MOST, help="At most so many.")]
Type = Annotated[str | None, typer.Option(help="With events of this type only.")]
Key = Annotated[str | None, typer.Option(help="With this key only.")]
Correlation = Annotated[str | None, typer.Option(help="Of this conversation only, by its correlation id.")]
Since = Annotated[datetime | None, typer.Option(help="Given up from this moment on, in UTC.")]
Until = Annotated[datetime | None, typer.Option(help="Given up before this moment, in UTC.")]
By = Annotated[str | None, typer.Option(help="Who does it; the user of this terminal by default.")]
