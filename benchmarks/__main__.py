"""`python -m benchmarks [PACKAGE …] [--quick]`: measure, print a table, write benchmarks/results/<package>.json.

A quick run shows that everything works and its figures say little: it writes to build/benchmarks/, which git ignores.
"""

import argparse
import asyncio
import importlib
import subprocess
import sys

from rich.console import Console
from rich.table import Table

from benchmarks.rows import ROOT, Row, goals, judged, save

HERE = ROOT / "benchmarks"
RESULTS, ROUGH = HERE / "results", ROOT / "build" / "benchmarks"


async def _collect(package: str, *, quick: bool) -> list[Row]:
    bench = importlib.import_module(f"benchmarks.{package}.bench")
    found: list[Row] = []
    wanted = goals(package)
    async for each in bench.rows(quick):
        print(f"  {each.name}: {each.value:.4g} {each.unit}", file=sys.stderr, flush=True)
        found.append(judged(each, wanted.get(each.name)))
    return found


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _table(package: str, rows: list[Row]) -> Table:
    table = Table(title=package, title_justify="left")
    for heading in ("name", "value", "unit", "peer", "peer value", "ratio", "low to high", "rounds", "goal", "met"):
        table.add_column(heading, justify="left" if heading in {"name", "unit", "peer"} else "right")
    for each in rows:
        bound = "" if each.goal is None else ("≤ " if each.better == "lower" else "≥ ") + _number(each.goal)
        table.add_row(
            *(each.name, _number(each.value), each.unit, each.peer or "", _number(each.peer_value)),
            *(_number(each.ratio), f"{_number(each.low)} to {_number(each.high)}"),
            *(_number(each.rounds), bound),
            "" if each.met is None else "yes" if each.met else "NO",
        )
    return table


def main() -> int:
    known = sorted(path.parent.name for path in HERE.glob("*/bench.py"))
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("package", nargs="*", help=f"one or more of {', '.join(known)}; all without")
    parser.add_argument("--quick", action="store_true", help="smaller and rougher, to see that it runs")
    arguments = parser.parse_args()
    packages: list[str] = arguments.package or known
    unknown = sorted(set(packages) - set(known))
    if unknown:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join(known)}")
    if len(packages) > 1:
        # Each in a process of its own: what one package imports or leaves behind must not slow the next.
        quick = ["--quick"] if arguments.quick else []
        return max(
            subprocess.run([sys.executable, "-m", "benchmarks", package, *quick], check=False).returncode
            for package in packages
        )
    rows = asyncio.run(_collect(packages[0], quick=arguments.quick))
    save((ROUGH if arguments.quick else RESULTS) / f"{packages[0]}.json", rows)
    Console(width=None if sys.stdout.isatty() else 160).print(_table(packages[0], rows))
    unmeasured = sorted(set(goals(packages[0])) - {each.name for each in rows})
    if unmeasured and not arguments.quick:
        print(f"benchmarks/goals.toml names rows that were not measured: {'; '.join(unmeasured)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
