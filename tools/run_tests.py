"""Run every suite in processes of its own and say how many tests passed: `python tools/run_tests.py [PACKAGE …]`.

A package is measured by its own tests and must reach the bound by them; what other suites happen to execute of it does
not count. The suites that are about all packages have no bound of their own.

Six processes run at a time, since most of them wait most of the time: for servers to come back, leases to end,
processes to die. A long suite is divided among several, so that it is not the one that all the others are over before.
"""

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "tests"
COVERAGE = 90  # percent of lines and branches of a package
# Not on Python 3.11: where a traced thread with greenlets ends while another one does, the interpreter asks for ever,
# at the first instruction of a function, for a call that stays pending. 3.12 goes on behind that instruction.
MEASURED = os.environ.get("COVERAGE") != "no" and sys.version_info >= (3, 12)
AT_A_TIME = 6
PART_BYTES = 150_000  # of test code in one process, where that which starts processes and servers counts three times
STARTERS = ("processes(", "subprocess", "forked", "own_postgres", "broker: Kafka")
WHOLE = {"tests", "ticketing"}  # they play the whole, so a test of theirs takes longer
PATIENCE_SECONDS = 600  # a whole run that takes longer is run less often


@dataclass
class Outcome:
    """What came of one suite; `coverage` in percent, None where it is not measured."""

    suite: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    coverage: float | None
    status: int


def suites() -> dict[str, list[Path]]:
    """Return what each suite consists of: the packages by name, and those that are about all of them."""
    found = {path.parent.name: [path] for path in sorted((ROOT / "packages").glob("*/tests"))}
    found["servers"] = [ROOT / "servers" / "tests"]
    found["ticketing"] = [ROOT / "tests" / "ticketing"]
    found["tests"] = sorted((ROOT / "tests").glob("test_*.py"))
    return found


@dataclass(frozen=True)
class Part:
    """What one process runs: all of a suite, or some of its files."""

    suite: str
    number: int
    paths: list[Path]

    @property
    def name(self) -> str:
        """Names its files below `build/tests`."""
        return f"{self.suite}-{self.number}"

    @property
    def size(self) -> int:
        """About how long it takes: bytes of test code, weighed."""
        return sum(_size(file) for path in self.paths for file in _files(path))

    @property
    def data(self) -> Path:
        """What coverage notes of it."""
        return BUILD / f".coverage-{self.name}"


def parts(suite: str, paths: list[Path]) -> list[Part]:
    """Divide a suite into parts of about the same size."""
    files = sorted((file for path in paths for file in _files(path)), key=_size, reverse=True)
    count = -(-sum(map(_size, files)) // (PART_BYTES // 4 if suite in WHOLE else PART_BYTES))
    if count == 1:
        return [Part(suite, 0, paths)]
    shares: list[list[Path]] = [[] for _ in range(count)]
    for file in (file for file in files if file.name.startswith("test_")):
        min(shares, key=lambda share: sum(map(_size, share))).append(file)
    return [Part(suite, number, sorted(share)) for number, share in enumerate(shares)]


def run(part: Part) -> Outcome:
    """Run a part in a process of its own, and print what it printed when it has ended."""
    source = ROOT / "packages" / part.suite / "src"
    junit = BUILD / f"{part.name}.xml"
    for old in (part.data, junit):
        old.unlink(missing_ok=True)
    arguments = [sys.executable, "-m", "pytest", "-q", *map(str, part.paths), f"--junitxml={junit}", "--durations=3"]
    # Two runs at once must not share the notes that pytest keeps of the last one.
    arguments += ["-o", f"cache_dir={BUILD / f'cache-{part.name}'}"]
    if source.is_dir() and MEASURED:
        arguments += [f"--cov={source}", "--cov-report="]
    begun = time.monotonic()
    # A run starts hundreds of processes: what one of them has compiled is there for the next one, whatever the caller's
    # environment says.
    environment = os.environ | {"COVERAGE_FILE": str(part.data), "PYTHONDONTWRITEBYTECODE": ""}
    log = BUILD / f"{part.name}.log"  # to look at while it runs
    # Each has its own folder for temporary ones: where two clear away what is left of others, both may fail by it.
    with log.open("w") as output, TemporaryDirectory(prefix="mainstay-", ignore_cleanup_errors=True) as folder:
        environment["PYTEST_DEBUG_TEMPROOT"] = folder
        done = subprocess.run(
            arguments, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    seconds = time.monotonic() - begun
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    if junit.exists():
        for element in ET.parse(junit).iter("testsuite"):  # noqa: S314 - our own pytest wrote it
            for name in counts:
                counts[name] += int(element.get(name, 0))
    failed = counts["failures"] + counts["errors"]
    passed = max(0, counts["tests"] - failed - counts["skipped"])
    # One string and one write: the other processes print too.
    sys.stdout.write(f"\n== {part.name}\n{log.read_text()}")
    sys.stdout.flush()
    return Outcome(part.suite, passed, failed, counts["skipped"], seconds, None, done.returncode)


def together(suite: str, done: list[tuple[Part, Outcome]]) -> Outcome:
    """The outcome of a suite, from those of its parts."""
    found = [outcome for _, outcome in done]
    passed, failed, skipped = (sum(getattr(each, name) for each in found) for name in ("passed", "failed", "skipped"))
    seconds = sum(each.seconds for each in found)
    status = next((each.status for each in found if each.status != 0), 0)
    return Outcome(suite, passed, failed, skipped, seconds, _coverage(suite, [part for part, _ in done]), status)


def _coverage(suite: str, of: list[Part]) -> float | None:
    """Percent of lines and branches that the parts of a suite executed together; None where it is not measured."""
    data = [str(part.data) for part in of if part.data.exists()]
    if not data:
        return None
    whole, report = f"--data-file={BUILD / f'.coverage-{suite}'}", BUILD / f"{suite}.json"
    print(f"\n== coverage of {suite}", flush=True)
    for arguments in (
        ["combine", "--quiet", whole, *data],
        ["report", whole],
        ["json", "--quiet", whole, "-o", report],
    ):
        subprocess.run([sys.executable, "-m", "coverage", *map(str, arguments)], cwd=ROOT, check=True)
    return float(json.loads(report.read_text())["totals"]["percent_covered"])


def verdict(outcome: Outcome) -> str | None:
    """Return why the suite fails the run, None where it does not."""
    if outcome.status != 0:
        return f"{outcome.failed} failed" if outcome.failed else f"pytest ended with status {outcome.status}"
    if outcome.coverage is not None and outcome.coverage < COVERAGE:
        return f"coverage {outcome.coverage:.1f} % is below {COVERAGE} %"
    return None


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else list(path.rglob("*.py"))


def _size(file: Path) -> int:
    text = file.read_text()
    return len(text) * (3 if any(word in text for word in STARTERS) else 1)


def main(names: list[str]) -> int:
    """Run the named suites, or all; return the exit status."""
    known = suites()
    unknown = sorted(set(names) - set(known))
    if unknown:
        print(f"no suite named {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    BUILD.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in known if not names or name in names]
    todo = [part for name in chosen for part in parts(name, known[name])]
    # The long ones begin first, so that none is left alone at the end: those that play the whole, then by their size.
    todo.sort(key=lambda part: (part.suite not in WHOLE, -part.size))
    begun = time.monotonic()
    print(f"running {', '.join(chosen)}; {AT_A_TIME} processes at a time", flush=True)
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        done = list(zip(todo, pool.map(run, todo), strict=True))
    outcomes = [together(name, [each for each in done if each[0].suite == name]) for name in chosen]
    outcomes.sort(key=lambda each: list(known).index(each.suite))
    print()
    for each in outcomes:
        coverage = "" if each.coverage is None else f"coverage {each.coverage:5.1f} %"
        counts = f"{each.passed:5} passed {each.failed:3} failed {each.skipped:3} skipped"
        reason = verdict(each)
        line = f"{each.suite:16} {counts} {each.seconds:6.1f} s  {coverage:17} {reason or 'ok'}"
        print(line)
    bad = [each.suite for each in outcomes if verdict(each)]
    passed, failed, skipped = (
        sum(getattr(each, name) for each in outcomes) for name in ("passed", "failed", "skipped")
    )
    seconds = time.monotonic() - begun
    print(f"TOTAL: {passed} passed, {failed} failed, {skipped} skipped in {seconds:.0f} s", end="")
    print(f"; not good: {', '.join(bad)}" if bad else "; all good", end="")
    print(f"; longer than the {PATIENCE_SECONDS} s that it should take" if seconds > PATIENCE_SECONDS else "")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
