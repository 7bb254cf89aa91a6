"""One measured figure beside its peer's: rounds that alternate, medians, and the bounds that were seen.

Two things measured one after the other differ by whatever else the machine did meanwhile. So subject and peer take
turns, the order swapping each round, and the spread is taken over *pairs*: a disturbance long enough to cover a pair
hits both. A figure is whatever one round returns (nanoseconds a call, events a second); a round does the work, asserts
its result, and times only the work.

A benchmark measures; what its rows must reach stands apart, in `benchmarks/goals.toml`, so that a test can compare the
committed rows with it.
"""

import gc
import inspect
import json
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

ROOT = Path(__file__).resolve().parent.parent
GOALS = ROOT / "benchmarks" / "goals.toml"

Round = Callable[[], float | Awaitable[float]]
Better = Literal["lower", "higher"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of `benchmarks/results/<package>.json`.

    `ratio` is value / peer_value; `goal` bounds the ratio where a peer is named, the value otherwise; `low` and `high`
    are the extremes of what the goal bounds over `rounds` rounds (null: the run kept no count). `met` is null where
    there is no goal.
    """

    name: str
    value: float
    unit: str
    peer: str | None
    peer_value: float | None
    ratio: float | None
    low: float
    high: float
    rounds: int | None
    goal: float | None
    better: Better
    met: bool | None


async def compare(
    name: str,
    unit: str,
    subject: Round,
    *,
    peer: tuple[str, Round] | None = None,
    better: Better = "lower",
    rounds: int = 5,
) -> Row:
    """Run `subject` and `peer` by turns, once unmeasured to warm up, and return the row of their medians."""
    if rounds < 1:
        msg = f"rounds={rounds} measures nothing; give 1 or more"
        raise ValueError(msg)
    runners = [subject] if peer is None else [subject, peer[1]]
    figures: list[list[float]] = [[] for _ in runners]
    for number in range(-1, rounds):
        turns = list(enumerate(runners))
        for index, run in turns if number % 2 else reversed(turns):
            gc.collect()  # nobody pays for the other's garbage
            result = run()
            figure = await result if inspect.isawaitable(result) else result
            if number >= 0:
                figures[index].append(float(figure))
    values = figures[0]
    value = statistics.median(values)
    if peer is None:
        return row(name, unit, value, low=min(values), high=max(values), rounds=rounds, better=better)
    pairs = [mine / theirs for mine, theirs in zip(*figures, strict=True)]
    theirs = (peer[0], statistics.median(figures[1]))
    return row(name, unit, value, peer=theirs, low=min(pairs), high=max(pairs), rounds=rounds, better=better)


def row(
    name: str,
    unit: str,
    value: float,
    *,
    peer: tuple[str, float] | None = None,
    low: float | None = None,
    high: float | None = None,
    rounds: int = 1,
    better: Better = "lower",
) -> Row:
    """Return the row of figures taken elsewhere, such as bytes of memory or a time to recover, in `rounds` rounds."""
    ratio = None if peer is None else value / peer[1]
    bounded = value if ratio is None else ratio
    return Row(
        name=name,
        value=value,
        unit=unit,
        peer=None if peer is None else peer[0],
        peer_value=None if peer is None else peer[1],
        ratio=ratio,
        low=bounded if low is None else low,
        high=bounded if high is None else high,
        rounds=rounds,
        goal=None,
        better=better,
        met=None,
    )


def goals(package: str) -> dict[str, float]:
    """Return what the rows of a package must reach, by the name of the row; empty where nothing is asked."""
    found: dict[str, float] = tomllib.loads(GOALS.read_text()).get(package, {})
    return {name: float(goal) for name, goal in found.items()}


def judged(found: Row, goal: float | None) -> Row:
    """Return the row with its goal and whether it is met: the bound itself is good enough; no goal, no verdict."""
    if goal is None:
        return replace(found, goal=None, met=None)
    bounded = found.value if found.ratio is None else found.ratio
    return replace(found, goal=goal, met=bounded <= goal if found.better == "lower" else bounded >= goal)


def save(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows as JSON, figures to four significant digits: more is noise in every diff."""

    def rounded(value: object) -> object:
        return float(f"{value:.4g}") if isinstance(value, float) else value

    lines = [json.dumps({key: rounded(value) for key, value in asdict(each).items()}) for each in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(f"  {line}" for line in lines) + "\n]\n")


def peer_python(package: str) -> Path:
    """Return the interpreter with the peers of `benchmarks/<package>/peers.txt`, made on first use and on change."""
    pins = ROOT / "benchmarks" / package / "peers.txt"
    home = ROOT / ".venv-peers" / package
    python = home / "bin" / "python"
    stamp = home / "installed.txt"
    if not stamp.exists() or stamp.read_text() != pins.read_text():
        print(f"installing the peers of {package} into {home.relative_to(ROOT)}", file=sys.stderr, flush=True)
        uv = str(ROOT / ".venv" / "bin" / "uv")
        subprocess.run([uv, "venv", "--quiet", "--allow-existing", "--python", sys.executable, str(home)], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--python", str(python), "-r", str(pins)], check=True)
        stamp.write_text(pins.read_text())
    return python


class Peers:
    """A process in the peers' environment that runs rounds on demand, so that they alternate with ours.

    `with Peers("events") as peers:` starts `benchmarks/events/peers.py`, which ends in `serve({"name": function, …})`
    of `benchmarks.peer`; `peers("name", 4)` returns a round that calls `function(4)` over there.
    """

    def __init__(self, package: str, script: str = "peers.py") -> None:
        """Make the environment if need be, and start the script."""
        self._process = subprocess.Popen(
            [str(peer_python(package)), "-m", f"benchmarks.{package}.{Path(script).stem}"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, name: str, *arguments: object) -> Callable[[], float]:
        """Return a round that calls the peer's `name` with `arguments`, which must be JSON."""
        return lambda: self._ask(name, arguments)

    def _ask(self, name: str, arguments: tuple[object, ...]) -> float:
        send, receive = self._process.stdin, self._process.stdout
        assert send is not None
        assert receive is not None
        send.write(json.dumps([name, *arguments]) + "\n")
        send.flush()
        answer = receive.readline()
        if not answer:
            msg = f"the peer {name!r} ended instead of answering; its error stands above"
            raise RuntimeError(msg)
        return float(json.loads(answer))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()  # it holds nothing worth an orderly end
        self._process.communicate()
