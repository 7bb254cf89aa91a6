"""`make new` makes a package that passes every check and its own tests at once, in a clone that is thrown away."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(place: Path, *command: str, fails: bool = False) -> str:
    """Run a command of a newcomer there, and return what it said."""
    # Nothing of this run may lead back into this checkout.
    ours = ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PACKAGE", "COVERAGE", "COVERAGE_FILE")
    # Only what mypy knows of the libraries is kept from run to run.
    set_here = {"UV_OFFLINE": "1", "MYPY_CACHE_DIR": str(ROOT / "build" / "mypy" / "new-package")}
    environment = {name: value for name, value in os.environ.items() if name not in ours} | set_here
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode != 0) is fails, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def cloned(above: Path) -> Path:
    """Make a checkout of its own, with what is not committed yet."""
    place = above / "clone"
    run(above, "git", "clone", "--quiet", str(ROOT), str(place))
    changed = run(ROOT, "git", "diff", "--name-only", "--no-renames", "HEAD").splitlines()
    for name in changed + run(ROOT, "git", "ls-files", "--others", "--exclude-standard").splitlines():
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes((ROOT / name).read_bytes())
        else:
            (place / name).unlink()
    return place


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A checkout to make a package in."""
    return cloned(tmp_path)


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which each test finds what the one before it has found."""
    return cloned(tmp_path_factory.mktemp("unchanged"))


@pytest.fixture
def environment(clone: Path) -> None:
    """An environment of the clone, with the third-party code of this one and without our packages; needs no network."""
    here, place = Path(sys.prefix), clone / ".venv"
    run(clone, sys.executable, "-m", "venv", "--without-pip", str(place))
    packages = Path(sysconfig.get_path("purelib"))
    # Of a directory that a .pth file names no .pth files are read: those of ours lead into this checkout.
    (place / packages.relative_to(here) / "third_party.pth").write_text(f"{packages}\n")
    for program in (here / "bin").iterdir():
        there, shebang = place / "bin" / program.name, f"#!{here}/bin/".encode()
        if there.exists() or program.is_dir():
            continue
        if program.read_bytes().startswith(shebang):
            there.write_bytes(program.read_bytes().replace(shebang, f"#!{place}/bin/".encode(), 1))
            there.chmod(0o755)
        else:
            there.symlink_to(program)
    (place / ".locked").touch()  # tells make that third-party code is there


@pytest.mark.usefixtures("environment")
def test_a_new_package_passes_every_check_at_once(clone: Path) -> None:
    """Lint, layers, API, private use, both type checkers, shape, docs, and its tests at 100 % coverage."""
    said = run(clone, "make", "new", "PACKAGE=stock_ledger")
    assert "packages/stock_ledger/" in said
    where = "import mainstay.core, mainstay.stock_ledger as new; print(mainstay.core.__file__, new.__file__, sep='\\n')"
    assert all(Path(file).is_relative_to(clone) for file in run(clone, ".venv/bin/python", "-c", where).splitlines())
    run(clone, "make", "lint", "layers")
    run(clone, ".venv/bin/mypy", "packages/stock_ledger")
    run(clone, ".venv/bin/basedpyright", "--pythonpath", ".venv/bin/python", "packages/stock_ledger/src")
    run(clone, "make", "test", "PACKAGE=stock_ledger")
    pytest_ = (".venv/bin/python", "-m", "pytest", "--quiet")
    own = ("--cov=packages/stock_ledger/src", "--cov-fail-under=100", "packages/stock_ledger/tests")
    run(clone, *pytest_, *own)  # `make test` measures only from Python 3.12 on
    run(clone, *pytest_, "tests/test_shape.py", "-k", "every_package_has")
    run(clone, *pytest_, "tests/test_docs.py", "-k", "stock_ledger")
    assert "stock_ledger" in run(clone, ".venv/bin/mainstay", "--help")

    again = run(clone, "make", "new", "PACKAGE=stock_ledger", fails=True)
    assert "the name is taken" in again


@pytest.mark.parametrize("name", ["io", "clock", "settlement_of_foreign_accounts"])
def test_a_name_of_any_length_makes_readable_lines(clone: Path, name: str) -> None:
    """The shortest and the longest name, and one whose class would be called as a class of core is."""
    run(clone, sys.executable, "tools/new_package.py", name)
    ruff = str(Path(sys.executable).parent / "ruff")
    run(clone, ruff, "check", f"packages/{name}")
    run(clone, ruff, "format", "--check", f"packages/{name}")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "lower-case word"),
        ("Ledger", "lower-case word"),
        ("my-ledger", "lower-case word"),
        ("1st", "lower-case word"),
        ("class", "lower-case word"),
        ("_x", "lower-case word"),
        ("settlement_of_foreign_accounts_", "lower-case word"),
        ("settlement_of_foreign_accountss", "30 characters at most, this one has 31"),
        ("events", "the name is taken"),
        ("servers", "the name is taken"),
        ("index", "the name is taken"),
        ("testbed", "pytest would take its classes for tests"),
        ("db", "`mainstay db` is a command already"),
        ("describe", "`mainstay describe` is a command already"),
    ],
)
def test_a_name_that_will_not_do_changes_nothing(unchanged: Path, name: str, why: str) -> None:
    """The message says what a name is, or which are taken."""
    before = run(unchanged, "git", "status", "--short")
    said = run(unchanged, sys.executable, "tools/new_package.py", name, fails=True)
    assert f"PACKAGE={name}: " in said
    assert why in said
    assert run(unchanged, "git", "status", "--short") == before
