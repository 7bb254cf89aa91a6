"""The tools that judge everything else: a snapshot that misses a change, or a figure that flatters, judges nothing."""

import ast
import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import __main__ as runner
from benchmarks.rows import GOALS, Row, compare, goals, judged, row, save

ROOT = Path(__file__).resolve().parent.parent
KEYS = ["name", "value", "unit", "peer", "peer_value", "ratio", "low", "high", "rounds", "goal", "better", "met"]


def _tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _package(root: Path, body: str) -> None:
    source = root / "packages" / "sample_api" / "src" / "mainstay" / "sample_api"
    source.mkdir(parents=True, exist_ok=True)
    (source / "part.py").write_text(body)
    (source / "__init__.py").write_text(
        'from mainstay.sample_api.part import Thing, make\n\n__all__ = ["Thing", "make"]\n'
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("x: int", "x: str"),
        ("x: int", "x: int = 1"),
        ("def make(a)", "def make(a, b=None)"),
        ("def make(a)", "async def make(a)"),
        ("def run(self)", "def run(self, *, fast)"),
        ("class Thing", "class Thing(Exception)"),
    ],
)
def test_the_snapshot_shows_a_change_of_the_api(before, after, tmp_path, monkeypatch):
    """A changed field, default, parameter, kind or base changes the text; a changed body does not."""
    body = "class Thing:\n    x: int\n    def run(self): return 1\n    def _own(self): ...\n\n\ndef make(a): return a\n"
    tool = _tool("api")
    monkeypatch.setattr(tool, "ROOT", tmp_path)

    def describe(text: str) -> str:
        _package(tmp_path, text)
        for name in [name for name in sys.modules if name.startswith("mainstay.sample_api")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        import mainstay

        monkeypatch.setattr(mainstay, "__path__", [str(tmp_path / "packages/sample_api/src/mainstay")])
        return str(tool.describe("sample_api"))

    old = describe(body)
    assert "_own" not in old
    assert describe(body.replace("return 1", "return 200")) == old
    assert describe(body.replace(before, after)) != old


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("class Kind(Enum):\n    RED = 1\n", "RED = 1"),
        ("@dataclass\nclass Kind:\n    size: int = 0\n", "size: int = 0"),
        ("class Kind:\n    def __init__(self, size: int):\n        self.size = size\n", "self.size: int"),
        ("class Kind:\n    def __init__(self):\n        self.size, self.free = 1, 2\n", "self.free"),
        ("class Kind:\n    class Inner:\n        size: int\n", "class Inner"),
        ("class Kind:\n    if True:\n        def run(self): ...\n", "def run(self)"),
    ],
)
def test_the_snapshot_shows_what_a_user_can_reach_of_a_class(text, finding):
    """Members of an enum, fields, attributes that `__init__` sets, nested classes, and what stands below an `if`."""
    (node,) = ast.parse(text).body
    assert finding in "\n".join(_tool("api")._class(node))


def test_the_snapshot_hides_what_begins_with_an_underscore():
    """Private attributes, fields and classes are not part of it."""
    text = "class Kind:\n    _a: int\n    class _B: ...\n    def __init__(self):\n        self._c = self.d.e = 1\n"
    assert list(_tool("api")._class(ast.parse(text).body[0])) == ["class Kind", "    def __init__(self)"]


def test_a_public_module_says_what_it_exports(tmp_path, monkeypatch):
    """Without `__all__` it is a finding."""
    tool = _tool("api")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    _package(tmp_path, "class Thing: ...\n")
    (missing,) = tool.undeclared("sample_api")
    assert missing.startswith("mainstay.sample_api.part is public and has no __all__")
    _package(tmp_path, '"""A part."""\n\n__all__ = ["Thing"]\n\n\nclass Thing: ...\n')
    assert tool.undeclared("sample_api") == []


@pytest.mark.parametrize(
    ("place", "line", "finding"),
    [
        ("packages/b/src/mainstay/b/x.py", "from mainstay.a._core import Thing", "mainstay.a._core, a private module"),
        ("packages/b/tests/test_x.py", "import mainstay.a._core", "mainstay.a._core, a private module"),
        ("packages/b/src/mainstay/b/x.py", "from mainstay.a import _core", "mainstay.a._core, a private module"),
        ("packages/b/src/mainstay/b/x.py", "from mainstay.a import hidden", "hidden, which mainstay.a does not export"),
        ("tests/test_x.py", "from mainstay.a.part import other", "other, which mainstay.a.part does not export"),
        ("packages/b/tests/test_x.py", "thing()._keeper.stop()", "_keeper, a private name of a"),
        ("examples/x.py", "print(thing._slot)", "_slot, a private name of a"),
        ("benchmarks/b/bench.py", "from mainstay.a import _core", "mainstay.a._core, a private module"),
        ("packages/a/tests/test_x.py", "from mainstay.a._core import Thing; Thing()._keeper", None),
        ("benchmarks/a/bench.py", "from mainstay.a._core import Thing; Thing()._keeper", None),
        ("packages/b/tests/test_x.py", "from mainstay.a import Thing; from mainstay.a import part", None),
        ("packages/b/tests/test_x.py", "class Own:\n    _keeper = 1\n\n\nprint(Own._keeper)", None),
        ("packages/b/tests/test_x.py", "import os\nos._exit(1)", None),
    ],
)
def test_private_use_of_another_package_is_found(place, line, finding, tmp_path):
    """An import of what is not exported, and an attribute that another package keeps for itself."""
    files = {
        "packages/a/src/mainstay/a/__init__.py": 'from mainstay.a._core import Thing\n\n__all__ = ["Thing"]\n',
        "packages/a/src/mainstay/a/_core.py": (
            "class Thing:\n    __slots__ = ('_slot',)\n"
            "    def __init__(self):\n        self._keeper = 1\n    def _exit(self): ...\n"
        ),
        "packages/a/src/mainstay/a/part.py": "__all__ = []\nother = 1\n",
        "packages/b/src/mainstay/b/__init__.py": "__all__ = []\n",
        place: line,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = list(_tool("private_use").findings(tmp_path))
    if finding is None:
        assert found == []
    else:
        (only,) = found
        assert only.startswith(f"{place}:1: ")
        assert finding in only


def test_rounds_alternate_and_the_goal_bounds_the_ratio():
    """Each side goes first in every other round, the figures are medians, and the spread is over pairs."""
    order: list[str] = []
    ours, theirs = iter([99, 10, 30, 20]), iter([99, 10, 10, 40])

    async def subject() -> float:
        order.append("ours")
        return next(ours)

    def peer() -> float:
        order.append("theirs")
        return next(theirs)

    found = asyncio.run(compare("x", "ns", subject, peer=("them", peer), rounds=3))
    assert order in (["ours", "theirs", "theirs", "ours"] * 2, ["theirs", "ours", "ours", "theirs"] * 2)
    assert (found.value, found.peer_value, found.ratio) == (20, 10, 2.0)
    assert (found.low, found.high) == (0.5, 3.0)
    assert found.rounds == 3
    assert (found.goal, found.met) == (None, None)
    assert judged(found, 1.0).met is False


@pytest.mark.parametrize(
    ("better", "value", "met"),
    [("lower", 5.0, True), ("lower", 5.1, False), ("higher", 5.0, True), ("higher", 4.9, False)],
)
def test_a_goal_without_a_peer_bounds_the_value(better, value, met):
    """The bound itself is good enough, on either side."""
    assert judged(row("x", "s", value, better=better), 5.0).met is met


def test_rows_are_written_in_the_agreed_form(tmp_path):
    """The file is a list of objects with the agreed keys, in their order."""
    save(tmp_path / "x.json", [row("x", "s", 1.23456789)])
    (only,) = json.loads((tmp_path / "x.json").read_text())
    assert list(only) == KEYS
    assert only["value"] == 1.235
    assert only["met"] is None


def test_every_package_is_measured():
    """Each package has a benchmark and committed rows; but for the command, which is run once by a person."""
    packages = {path.parent.name for path in (ROOT / "packages").glob("*/pyproject.toml")}
    for package in sorted(packages - {"cli"}):
        assert (ROOT / "benchmarks" / package / "bench.py").exists(), package
        assert json.loads((ROOT / "benchmarks" / "results" / f"{package}.json").read_text()), package


def test_committed_rows_are_judged_by_the_goals_as_they_stand():
    """Each row has the agreed form, the goal of its name and its verdict; each goal names a row that was measured."""
    for results in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        rows = json.loads(results.read_text())
        wanted = goals(results.stem)
        assert sorted(set(wanted) - {each["name"] for each in rows}) == [], results.stem
        for each in rows:
            assert list(each) == KEYS, each["name"]
            assert each["goal"] == wanted.get(each["name"]), each["name"]
            bounded = each["value"] if each["ratio"] is None else each["ratio"]
            # Figures are written to four digits: a verdict that hangs on the fifth is the run's own.
            if each["goal"] is None or abs(bounded - each["goal"]) > 1e-3 * each["goal"]:
                assert judged(Row(**each), each["goal"]).met is each["met"], each["name"]
    measured = {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert set(tomllib.loads(GOALS.read_text())) <= measured


@pytest.mark.parametrize("quick", [True, False])
def test_a_quick_run_leaves_the_committed_rows_alone(quick, tmp_path, monkeypatch):
    """What was measured roughly goes to a directory that git ignores."""

    async def rows(quick: bool) -> AsyncIterator[Row]:
        yield row("retry, no failure", "s", 1.0)
        yield row("timeout around nothing", "s", 1.0)

    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    assert runner.ROUGH.relative_to(ROOT).parts[0] == "build"
    monkeypatch.setattr(runner, "ROUGH", tmp_path / "rough")
    monkeypatch.setattr("benchmarks.core.bench.rows", rows)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "core", *(["--quick"] if quick else [])])
    assert runner.main() == 0
    assert (tmp_path / "rough" / "core.json").exists() is quick
    assert (tmp_path / "results" / "core.json").exists() is not quick


@pytest.mark.parametrize(
    ("status", "failed", "coverage", "good"),
    [(0, 0, 90.0, True), (0, 0, 89.9, False), (1, 1, 99.0, False), (5, 0, None, False), (0, 0, None, True)],
)
def test_a_suite_fails_by_its_tests_or_its_coverage(status, failed, coverage, good):
    """A failed test, a run that ended otherwise, and a coverage below the bound each fail the suite."""
    tool = _tool("run_tests")
    outcome = tool.Outcome("x", 1, failed, 0, 1.0, coverage, status)
    assert (tool.verdict(outcome) is None) is good


def test_a_long_suite_is_divided_and_none_of_its_files_is_forgotten():
    """Each file with tests is run once, and no part is much longer than the others."""
    tool = _tool("run_tests")
    for suite, paths in tool.suites().items():
        parts = tool.parts(suite, paths)
        if len(parts) > 1:
            files = sorted(file for part in parts for file in part.paths)
            of_suite = (file for path in paths for file in ([path] if path.is_file() else path.rglob("test_*.py")))
            assert files == sorted(of_suite)
            assert max(part.size for part in parts) < 1.5 * tool.PART_BYTES
        else:
            assert parts[0].paths == paths


def test_the_pythons_of_a_machine_are_found_oldest_first(tmp_path):
    """From PATH and from pyenv; a shim that only says where the version would be found is none."""
    programs, kept = tmp_path / "bin", tmp_path / "pyenv" / "versions" / "3.13.9" / "bin"
    scripts = {
        programs / "python3.11": "exit 0",
        programs / "python3.12": "exit 127",
        programs / "python3.13": "exit 127",
        kept / "python3.13": "exit 0",
    }
    for path, line in scripts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
    environment = {"PATH": f"{programs}:/bin", "PYENV_ROOT": str(tmp_path / "pyenv"), "HOME": str(tmp_path)}
    command = ["/bin/bash", str(ROOT / "tools" / "pythons.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = [line for line in done.stdout.splitlines() if line.startswith(str(tmp_path))]
    assert found == [str(programs / "python3.11"), str(kept / "python3.13")]


def _make_environment(place: Path, python: Path | str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "tools" / "venv.sh"), str(python), ".venv"],
        cwd=place,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def _has_pip(place: Path) -> bool:
    return subprocess.run([place / ".venv/bin/python", "-m", "pip", "--version"], check=False).returncode == 0


def test_an_environment_that_was_left_without_pip_is_completed(tmp_path):
    """What an attempt that failed has left behind does not make every later one fail."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    assert not _has_pip(tmp_path)
    done = _make_environment(tmp_path, sys.executable)
    assert done.returncode == 0, done.stderr
    assert _has_pip(tmp_path)


@pytest.mark.parametrize("user", ["0", "1000"])
def test_a_python_that_can_make_no_environment_is_helped_or_the_package_named(user, tmp_path):
    """As Debian's without its venv package: root installs that once and says so, others are told the command."""
    python, programs, missing = tmp_path / "python3", tmp_path / "bin", tmp_path / "hidden" / "ensurepip.py"
    # The package manager is a stand-in: a test may not change the machine.
    scripts = {
        python: f'PYTHONPATH="{missing.parent}" exec "{sys.executable}" "$@"',
        programs / "id": f"echo {user}",
        programs / "apt-get": f'echo "$@" >> "{tmp_path}/apt.txt"; rm -f "{missing}"',
    }
    programs.mkdir()
    missing.parent.mkdir()
    missing.write_text("raise ImportError\n")
    for path, line in scripts.items():
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    done = _make_environment(tmp_path, python, PATH=f"{programs}:{os.environ['PATH']}")
    if user == "0":
        assert done.returncode == 0, done.stderr
        assert f"installing Debian's {package} once" in done.stderr
        assert (tmp_path / "apt.txt").read_text().split()[-1] == package
        assert _has_pip(tmp_path)
    else:
        assert done.returncode == 1
        assert f"sudo apt-get install -y {package}" in done.stderr
        assert not (tmp_path / "apt.txt").exists()
