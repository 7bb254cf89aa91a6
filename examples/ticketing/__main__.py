"""`python -m ticketing demo`, and the three processes that it starts: api, worker, provider.

Each command imports what it runs: a worker that was killed is back sooner without the web server and the demo.
"""

# ruff: noqa: PLC0415  see above
from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

cli = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


class Engine(StrEnum):
    """What carries the office: SQLite alone, or Kafka and PostgreSQL."""

    EMBEDDED = "embedded"
    FULL = "full"


@cli.callback()
def main(
    attached: Annotated[bool, typer.Option(help="Stop when the standard input ends.")] = False,  # noqa: FBT002  typer's way
) -> None:
    """A ticket office that survives being killed."""
    if attached:
        threading.Thread(target=_stop_with_input, daemon=True).start()


def _stop_with_input() -> None:
    """The starter of this process holds the other end of the pipe; it ends also with a process that is killed."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


@cli.command()
def demo(
    purchases: Annotated[
        Path | None,
        typer.Option(help="JSON lines, a purchase each.", envvar="PURCHASES", exists=True, dir_okay=False),
    ] = None,
    engine: Annotated[Engine, typer.Option(help="SQLite, or Kafka and PostgreSQL.", envvar="ENGINE")] = Engine.EMBEDDED,
    kills: Annotated[int, typer.Option(help="How often the worker is killed.", min=0)] = 5,
    seed: Annotated[int, typer.Option(help="Whom the provider treats badly.")] = 1,
    keep: Annotated[bool, typer.Option(help="Keep databases and logs, and say where.")] = False,  # noqa: FBT002  typer's way
) -> None:
    """Play a file of purchases through the office, kill its worker on the way, and audit what is left."""
    from ticketing.demo import DEFAULT_PURCHASES, Script, play

    sys.exit(asyncio.run(play(Script(purchases or DEFAULT_PURCHASES, engine.value, kills, seed), keep=keep)))


@cli.command()
def api(port: int = 8000) -> None:
    """Accept purchases over HTTP."""
    import uvicorn

    # uvicorn stops in order on SIGTERM, and then raises the signal once more for earlier handlers.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    uvicorn.run("ticketing.api:api", port=port, log_config=None)


@cli.command()
def worker() -> None:
    """Sell tickets: execute the sagas, relay and handle events, seal the audit log."""
    gc.disable()  # what is imported stays: to look through it is a sixth of a start
    from ticketing.main import app

    gc.enable()
    app.run()


@cli.command()
def provider(ledger: Path, port: int = 8001, seed: int = 1) -> None:
    """Be the payment provider, and misbehave."""
    from ticketing.provider import Behaviour, Provider

    server = Provider(ledger, Behaviour(seed=seed), port=port)
    # shutdown() waits for the loop that serves, which is this thread's
    signal.signal(signal.SIGTERM, lambda _number, _frame: threading.Thread(target=server.shutdown).start())
    try:
        server.serve_forever(poll_interval=0.05)
    finally:
        server.server_close()


if __name__ == "__main__":
    cli()
