"""Run every suite alone and say how many tests passed: `python tools/run_tests.py [PACKAGE …]`.

A package is measured by its own tests and must reach the bound by them; what other suites happen to execute of it does
not count. The top-level suites come last and have no bound of their own.
"""

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "tests"
COVERAGE = 90  # percent of lines and branches of a package


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


def suites() -> dict[str, Path]:
    """Return every suite: the packages by name, then `servers`, then `tests`, which are about all of them."""
    found = {path.parent.name: path for path in sorted((ROOT / "packages").glob("*/tests"))}
    return found | {"servers": ROOT / "servers" / "tests", "tests": ROOT / "tests"}


def run(suite: str, path: Path) -> Outcome:
    """Run one suite in a process of its own."""
    source = path.parent / "src"
    # The plugin in `servers` is imported before anything could measure it.
    measured = source.is_dir() and suite != "servers"
    report, junit = BUILD / f"{suite}.json", BUILD / f"{suite}.xml"
    for old in (report, junit):
        old.unlink(missing_ok=True)
    arguments = [sys.executable, "-m", "pytest", "-q", str(path), f"--junitxml={junit}", "--durations=3"]
    if measured:
        arguments += [f"--cov={source}", "--cov-report=term", f"--cov-report=json:{report}"]
    begun = time.monotonic()
    print(f"\n== {suite}", flush=True)
    environment = os.environ | {"COVERAGE_FILE": str(BUILD / f".coverage-{suite}")}
    status = subprocess.run(arguments, cwd=ROOT, env=environment, check=False).returncode
    seconds = time.monotonic() - begun
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    if junit.exists():
        for element in ET.parse(junit).iter("testsuite"):  # noqa: S314 - our own pytest wrote it
            for name in counts:
                counts[name] += int(element.get(name, 0))
    failed = counts["failures"] + counts["errors"]
    coverage = json.loads(report.read_text())["totals"]["percent_covered"] if report.exists() else None
    passed = max(0, counts["tests"] - failed - counts["skipped"])
    return Outcome(suite, passed, failed, counts["skipped"], seconds, coverage, status)


def verdict(outcome: Outcome) -> str | None:
    """Return why the suite fails the run, None where it does not."""
    if outcome.status != 0:
        return f"{outcome.failed} failed" if outcome.failed else f"pytest ended with status {outcome.status}"
    if outcome.coverage is not None and outcome.coverage < COVERAGE:
        return f"coverage {outcome.coverage:.1f} % is below {COVERAGE} %"
    return None


def main(names: list[str]) -> int:
    """Run the named suites, or all; return the exit status."""
    known = suites()
    unknown = sorted(set(names) - set(known))
    if unknown:
        print(f"no suite named {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    BUILD.mkdir(parents=True, exist_ok=True)
    outcomes = [run(name, path) for name, path in known.items() if path.is_dir() and (not names or name in names)]
    print()
    for each in outcomes:
        coverage = "" if each.coverage is None else f"coverage {each.coverage:5.1f} %"
        counts = f"{each.passed:5} passed {each.failed:3} failed {each.skipped:3} skipped"
        reason = verdict(each)
        line = f"{each.suite:16} {counts} {each.seconds:6.1f} s  {coverage:17} {reason or 'ok'}"
        print(line)
    bad = [each.suite for each in outcomes if verdict(each)]
    passed, failed, skipped, seconds = (
        sum(getattr(each, name) for each in outcomes) for name in ("passed", "failed", "skipped", "seconds")
    )
    print(f"TOTAL: {passed} passed, {failed} failed, {skipped} skipped in {seconds:.0f} s", end="")
    print(f"; not good: {', '.join(bad)}" if bad else "; all good")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
