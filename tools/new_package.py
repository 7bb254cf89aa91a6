"""A new package that passes every check: `make new PACKAGE=ledger`.

The files come from `tools/package_template`, and the lists that name every package are extended. What it does is an
example, to be replaced.
"""

import argparse
import keyword
import re
import shutil
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

from run_tests import suites

from mainstay.cli import commands

TEMPLATE = Path(__file__).resolve().parent / "package_template"
LONGEST = 30  # characters of a name: with more, lines of the template are too long


def make(root: Path, package: str) -> list[str]:
    """Make the package in a checkout; returns the files that were made or changed.

    Raises:
        SystemExit: the name will not do, or a list is not as it is expected; nothing has been changed.
    """
    refuse(root, package)
    distribution = f"mainstay-{package.replace('_', '-')}"
    rfc = f"{_next_rfc(root):04}"
    changed = _lists(root, package, distribution, rfc)
    data = {
        "package": package,
        "prefix": "".join(word.capitalize() for word in package.split("_")),
        "distribution": distribution,
        "rfc": rfc,
        "date": datetime.now(UTC).date().isoformat(),
    }
    import copier  # noqa: PLC0415  it takes longer than all the rest, and a name that will not do needs none

    copier.run_copy(str(TEMPLATE), root, data=data, defaults=True, quiet=True)
    for path, text in changed.items():
        path.write_text(text)
    place = root / "packages" / package
    shutil.copy(root / "LICENSE", place)
    tools = Path(sys.executable).parent
    # The name decides where lines break and in which order imports stand; `make check` judges the result.
    for command in ("check --fix-only --quiet", "format --quiet"):
        subprocess.run([tools / "ruff", *command.split(), place], cwd=root, check=True)
    made = [f"packages/{package}/", f"docs/{package}.md", f"docs/rfcs/{rfc}-{package.replace('_', '-')}.md"]
    return made + [str(path.relative_to(root)) for path in changed]


def refuse(root: Path, package: str) -> None:
    """End with a message if the name is no name for a package, or is taken."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", package) or keyword.iskeyword(package):
        sys.exit(f"PACKAGE={package}: a package is a lower-case word, or several joined by _, such as ledger")
    if len(package) > LONGEST:
        sys.exit(f"PACKAGE={package}: a name has {LONGEST} characters at most, this one has {len(package)}")
    taken = {path.name for path in root.glob("packages/*")} | suites().keys()
    if package in taken or (root / "docs" / f"{package}.md").exists():
        sys.exit(f"PACKAGE={package}: the name is taken; there are {', '.join(sorted(taken))}")
    if package.startswith("test"):
        sys.exit(f"PACKAGE={package}: pytest would take its classes for tests; choose a name that begins otherwise")
    if package in _commands(root):
        sys.exit(f"PACKAGE={package}: `mainstay {package}` is a command already")


def _commands(root: Path) -> set[str]:
    """The commands that there are: the CLI's own, and those of the packages."""
    found = set(commands.__all__)
    for path in root.glob("packages/*/pyproject.toml"):
        found |= tomllib.loads(path.read_text())["project"].get("entry-points", {}).get("mainstay.commands", {}).keys()
    return found


def _next_rfc(root: Path) -> int:
    return 1 + max(int(path.name[:4]) for path in (root / "docs" / "rfcs").glob("[0-9]*.md"))


def _lists(root: Path, package: str, distribution: str, rfc: str) -> dict[Path, str]:
    """The files with a list of packages, with the new one in each."""
    source = f'    "packages/{package}/src",\n'
    name = package.replace("_", "-")
    edits: dict[str, list[tuple[str, str]]] = {
        "pyproject.toml": [
            (r"(?m)^(?=mainstay-servers = )", f"{distribution} = {{ workspace = true }}\n"),
            (r'(?s)(?<=mypy_path = \[\n)(?=.*?    "servers/src",\n)', source),
            (r"(?<=\ninclude = \[\n)", source),
            (r"(?<=layers = \[\n    \")", f"mainstay.{package} | "),
        ],
        "README.md": [(r"(?<=\|\n)(?=\n\[Your first service\])", _row(package, distribution))],
        "docs/index.md": [
            (r"(?m)^(?=- \[the ticket office\])", f"- [{package}]({package}.md): functions that are called by name\n"),
            (r"(?<=\))(?=\n- \[decisions\])", f",\n  [{package}](rfcs/{rfc}-{name}.md)"),
        ],
    }
    changed: dict[Path, str] = {}
    for file, replacements in edits.items():
        path = root / file
        text = path.read_text()
        for place, inserted in replacements:
            found = list(re.finditer(place, text))
            if len(found) != 1:
                sys.exit(f"{file}: the list of packages is not where it was: {place} is there {len(found)} times")
            text = text[: found[0].start()] + inserted + text[found[0].start() :]
        changed[path] = text
    return changed


def _row(package: str, distribution: str) -> str:
    return f"| [{distribution}](packages/{package}/README.md) | functions that are called by name |\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", help="its name, such as ledger")
    for file in make(Path(__file__).resolve().parent.parent, parser.parse_args().package):
        print(file)
