"""`python -m mainstay.circuit_breaker rehearse TRACE` and `… suggest TRACE`: what a configuration would have done."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mainstay.circuit_breaker.rehearsal import read_trace, rehearse, suggest
from mainstay.circuit_breaker.settings import BreakerConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the two commands; 2 if the trace or the configuration cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m mainstay.circuit_breaker", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_ in (("rehearse", "when it would have opened, and for what"), ("suggest", "thresholds, and why")):
        command = commands.add_parser(name, help=help_)
        command.add_argument("trace", type=Path, help="CSV with a heading, or JSON lines: at, seconds, failed")
        if name == "rehearse":
            command.add_argument("--config", default="{}", help="JSON, such as '{\"failure_ratio\": 0.3}'")
    chosen = parser.parse_args(arguments)
    try:
        trace = read_trace(chosen.trace)
        if chosen.command == "rehearse":
            print(rehearse(trace, BreakerConfig.model_validate_json(chosen.config)))  # noqa: T201  a command's output
        else:
            suggestion = suggest(trace)
            print(suggestion)  # noqa: T201  a command's output
            print(rehearse(trace, suggestion.config))  # noqa: T201  a command's output
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)  # noqa: T201  a command's output
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
