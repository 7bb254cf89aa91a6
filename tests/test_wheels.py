"""What users install: the built wheels, outside the workspace. uv ignores sibling ranges inside of it."""

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = sorted(path.parent for path in (ROOT / "packages").glob("*/pyproject.toml"))
UV = str(Path(sys.executable).parent / "uv")

# Imports every module of the package; its extras must be installed.
IMPORT_ALL = """
import importlib, pathlib, pkgutil, sys
name = sys.argv[1]
package = importlib.import_module(name)
assert "site-packages" in package.__file__, package.__file__
assert (pathlib.Path(package.__file__).parent / "py.typed").exists()
for found in pkgutil.walk_packages(package.__path__, name + ".", onerror=lambda _: None):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
"""


def _run(*command: str, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def _install(python: str, wheels: Path, *requirements: str, cwd: Path) -> None:
    options = ["--python", python, "--find-links", str(wheels), "--constraint", str(ROOT / "requirements.lock")]
    _run(UV, "pip", "install", "--quiet", *options, *requirements, cwd=cwd)


@functools.cache
def _compiled() -> list[Path]:
    """The directories with what this environment has compiled of third parties' code."""
    return list(Path(sysconfig.get_path("purelib")).rglob("__pycache__"))


def _lend(home: Path) -> None:
    """Copy what is compiled here of the very files that are installed there; Python passes over what does not fit."""
    here, (there,) = Path(sysconfig.get_path("purelib")), home.glob("lib/python*/site-packages")
    for kept in _compiled():
        place = there / kept.relative_to(here)
        if place.parent.is_dir() and not place.exists():
            shutil.copytree(kept, place, copy_function=shutil.copyfile)


def _environment(home: Path, wheels: Path, *requirements: str) -> str:
    """Make a virtual environment with `requirements`, whose versions are those of the lock."""
    python = str(home / "bin" / "python")
    _run(UV, "venv", "--quiet", "--python", sys.executable, str(home), cwd=home.parent)
    _install(python, wheels, *requirements, cwd=home.parent)
    _run(UV, "pip", "check", "--quiet", "--python", python, cwd=home.parent)
    _lend(home)
    return python


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel of every package."""
    place = tmp_path_factory.mktemp("wheels")
    for package in PACKAGES:
        _run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place), cwd=package)
    assert len(list(place.glob("*.whl"))) == len(PACKAGES)
    return place


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_wheel_alone_brings_all_it_needs(package: Path, wheels: Path, tmp_path: Path):
    """Installed alone without extras the package imports; with its extras every module of it does."""
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    module = f"mainstay.{package.name}"
    bare = _environment(tmp_path / "bare", wheels, project["name"])
    _run(bare, "-c", f"import {module}", cwd=tmp_path)
    extras = ",".join(project.get("optional-dependencies", {}))
    python = _environment(tmp_path / "full", wheels, f"{project['name']}[{extras}]") if extras else bare
    # Test support may use pytest, which a test environment has.
    if list(package.glob("src/**/testing.py")):
        _install(python, wheels, "pytest", cwd=tmp_path)
    _run(python, "-c", IMPORT_ALL, module, cwd=tmp_path)


def test_all_wheels_together_agree(wheels: Path, tmp_path: Path):
    """All packages with all extras fit into one environment, and each imports there in an interpreter of its own."""
    requirements = []
    for package in PACKAGES:
        project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
        requirements.append(f"{project['name']}[{','.join(project.get('optional-dependencies', {}))}]")
    python = _environment(tmp_path / "all", wheels, *requirements)
    _install(python, wheels, "pytest", cwd=tmp_path)  # for the test support of some
    for package in PACKAGES:
        _run(python, "-c", IMPORT_ALL, f"mainstay.{package.name}", cwd=tmp_path)


def test_wheels_hold_code_and_nothing_else(wheels: Path):
    """A wheel holds its own part of the namespace, the licence, and no tests."""
    for wheel in wheels.glob("*.whl"):
        listed = _run(sys.executable, "-m", "zipfile", "-l", str(wheel), cwd=wheels).splitlines()[1:]
        names = [line.split()[0] for line in listed]
        own = f"mainstay/{wheel.name.split('-')[0].removeprefix('mainstay_')}/"
        outside = [name for name in names if not name.startswith(own) and ".dist-info/" not in name]
        assert not outside
        assert any(name.endswith("licenses/LICENSE") for name in names), f"{wheel.name} has no licence"
