"""`mainstay breakers`: what a configuration would have done with recorded calls, and which one fits them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mainstay.circuit_breaker.settings import BreakerConfig
from mainstay.circuit_breaker.simulation import read_trace, simulate, suggest
from mainstay.cli import as_json, document

__all__ = ["commands"]

commands = typer.Typer(no_args_is_help=True, help="Circuit breakers: simulate a configuration on recorded calls.")

Trace = Annotated[Path, typer.Argument(metavar="TRACE", help="CSV with a heading, or JSON lines: at, seconds, failed.")]


@commands.command("simulate")
def simulate_trace(
    trace: Trace,
    config: Annotated[str, typer.Option(help="JSON, such as '{\"failure_ratio\": 0.3}'.")] = "{}",
) -> None:
    """Say when a breaker with this configuration would have opened, and for what."""
    _tell(simulate(read_trace(trace), BreakerConfig.model_validate_json(config)))


@commands.command("suggest")
def suggest_config(trace: Trace) -> None:
    """Suggest thresholds, with the reason for each, and simulate them."""
    calls = read_trace(trace)
    suggestion = suggest(calls)
    _tell(suggestion, simulate(calls, suggestion.config))


def _tell(*reports: object) -> None:
    if as_json():
        document([str(report).splitlines() for report in reports])
        return
    for report in reports:
        typer.echo(report)
