"""`make new` makes a package that passes every check and its own tests at once, in a clone that is thrown away."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(place: Path, *command: str, fails: bool = False) -> str:
    """Run a command of a newcomer there, and return what it said."""
    # Nothing of this run may lead back into this checkout.
    ours = ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PACKAGE", "COVERAGE", "COVERAGE_FILE")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode != 0) is fails, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A checkout of its own, with what is not committed yet."""
    place = tmp_path / "clone"
    run(tmp_path, "git", "clone", "--quiet", str(ROOT), str(place))
    changed = run(ROOT, "git", "ls-files", "--modified", "--others", "--exclude-standard").splitlines()
    for name in changed:
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes((ROOT / name).read_bytes())
    return place


def test_a_new_package_passes_every_check_at_once(clone: Path) -> None:
    """Lint, layers, API, private use, both type checkers, shape, docs, and its tests at 100 % coverage."""
    said = run(clone, "make", "new", "PACKAGE=stock_ledger")
    assert "packages/stock_ledger/" in said
    run(clone, "make", "lint", "layers")
    run(clone, ".venv/bin/mypy", "packages/stock_ledger")
    run(clone, ".venv/bin/basedpyright", "--pythonpath", ".venv/bin/python", "packages/stock_ledger/src")
    run(clone, "make", "test", "PACKAGE=stock_ledger")
    measured = json.loads((clone / "build" / "tests" / "stock_ledger.json").read_text())
    assert measured["totals"]["percent_covered"] == 100
    pytest_ = (".venv/bin/python", "-m", "pytest", "--quiet")
    run(clone, *pytest_, "tests/test_shape.py", "-k", "every_package_has")
    run(clone, *pytest_, "tests/test_docs.py", "-k", "stock_ledger")
    assert "stock_ledger" in run(clone, ".venv/bin/mainstay", "--help")

    again = run(clone, "make", "new", "PACKAGE=stock_ledger", fails=True)
    assert "the name is taken" in again


@pytest.mark.parametrize("name", ["Ledger", "my-ledger", "1st", "class", "_x", "events", "servers"])
def test_a_name_that_will_not_do_changes_nothing(clone: Path, name: str) -> None:
    """It says what a name is, or which are taken."""
    before = run(clone, "git", "status", "--short")
    tool = (sys.executable, "tools/new_package.py")
    said = run(clone, *tool, name, fails=True)
    assert f"PACKAGE={name}: " in said
    assert run(clone, "git", "status", "--short") == before
