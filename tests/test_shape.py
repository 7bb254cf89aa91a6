"""Every package has one shape, and every list of packages has every package.

`deviations` reads a checkout. A rule says what must be there because of what there is: `SCHEMA` where there are
migrations, `_metrics.py` where something is counted, an entry point where there is a `cli.py`.
"""

from __future__ import annotations

import ast
import functools
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "api.txt", "tests")
NAMELESS = {"utils", "util", "common", "helpers", "misc", "tools"}
COUNTERS = {"Counter", "Gauge", "Histogram", "Summary"}
MODULES = ("module", "settings", "errors", "testing")
HEADINGS = [
    "About",
    "Usage",
    "Settings",
    "Guarantees",
    "Seen from outside",
    "Testing",
    "Anti-patterns",
    "Measured",
]
# What a package lacks today, with the reason why that is right, or why it is not yet.
LACKS = {
    ("cli", "module"): "it puts nothing into an App; it is given one",
    ("cli", "settings"): "its options are the command line's",
    ("cli", "errors"): "what it refuses is a ConfigurationError",
    ("cli", "testing"): "`mainstay.cli.main` is what a test calls",
    ("cli", "RFC"): "ADR 0080 decides about the command",
    ("core", "RFC"): "RFC 0001 is the convention",
    ("core", "circle"): "a module names the App that runs it, for type checkers only",
    (
        "workflow",
        "circle",
    ): "a run, its steps and its workflow name each other until the executor is cut by reasons to change",
}


def deviations(root: Path) -> list[str]:
    """What is not as it should be, a sentence each."""
    found: list[str] = []
    names = sorted(path.parent.name for path in root.glob("packages/*/pyproject.toml"))
    for name in names:
        found += _package(root / "packages" / name, name)
    return [*found, *_lists(root, names)]


def _package(place: Path, name: str) -> Iterator[str]:
    source = place / "src" / "mainstay" / name
    for file in FILES:
        if not (place / file).exists():
            yield f"{name}: {file} is missing"
    if not (source / "py.typed").exists():
        yield f"{name}: py.typed is missing, so type checkers do not see its types"
    project = tomllib.loads((place / "pyproject.toml").read_text())["project"]
    if project["name"] != f"mainstay-{name.replace('_', '-')}":
        yield f"{name}: the distribution is called {project['name']}"
    if project.get("scripts") and name != "cli":
        yield f"{name}: has a script of its own; commands come through the entry points mainstay.commands"
    files = {path.stem: path for path in sorted(source.glob("*.py"))}
    files |= {name: source / name / "__init__.py" for name in ("cli", "testing") if (source / name).is_dir()}
    modules = {stem: _parsed(path.read_text()) for stem, path in files.items()}
    yield from (f"{name}: {stem}.py says nothing by its name" for stem in sorted(NAMELESS & modules.keys()))
    classes = [
        (stem, each) for stem, tree in modules.items() for each in ast.walk(tree) if isinstance(each, ast.ClassDef)
    ]
    for stem, each in classes:
        bases = {ast.unparse(base).partition("[")[0] for base in each.bases}
        if name == "core":
            continue
        if "Module" in bases and stem != "module":
            yield f"{name}: {each.name} is in {stem}.py; modules are in module.py"
        if "Settings" in bases and stem != "settings":
            yield f"{name}: {each.name} is in {stem}.py; settings are in settings.py"
        if "MainstayError" in bases and stem != "errors":
            yield f"{name}: {each.name} derives from MainstayError in {stem}.py; it derives from the base in errors.py"
    bases_of_errors = [
        each.name for stem, each in classes if stem == "errors" and "MainstayError" in map(ast.unparse, each.bases)
    ]
    if name != "core" and len(bases_of_errors) > 1:
        yield f"{name}: errors.py has {len(bases_of_errors)} base errors: {', '.join(bases_of_errors)}"
    lacks = [stem for stem in MODULES if stem not in modules]
    if name != "core" and "errors" in modules and not bases_of_errors:
        lacks.append("base error")
    if not any((place.parents[1] / "docs" / "rfcs").glob(f"[0-9]*-{name.replace('_', '-')}.md")):
        lacks.append("RFC")
    if _circle(name, modules):
        lacks.append("circle")
    for lack in lacks:
        if (name, lack) not in LACKS:
            yield f"{name}: " + (
                f"its files import each other in a circle: {' → '.join(_circle(name, modules))}"
                if lack == "circle"
                else f"has no {lack if lack in {'base error', 'RFC'} else lack + '.py'}"
            )
    yield from (
        f"{name}: LACKS excuses {lack}, which is there" for of, lack in LACKS if of == name and lack not in lacks
    )
    if (command := source / "cli" / "__init__.py").exists():
        modules["cli"] = _parsed(command.read_text())
    yield from _by_need(source, name, modules)


@functools.cache
def _parsed(text: str) -> ast.Module:
    """The syntax tree, which no rule changes: a checkout with a planted deviation has most files as they are."""
    return ast.parse(text)


def _circle(name: str, modules: dict[str, ast.Module]) -> list[str]:
    """One circle of imports between the files of a package, those for type checkers included; empty without one."""
    imports: dict[str, set[str]] = {}
    for stem, tree in modules.items():
        if stem == "__init__":
            continue
        imports[stem] = set()
        for node in tree.body:
            inside = node.body if isinstance(node, ast.If) else [node]
            for each in inside:
                if isinstance(each, ast.ImportFrom) and each.module is not None:
                    if each.module == f"mainstay.{name}":
                        imports[stem] |= {alias.name for alias in each.names}
                    elif each.module.startswith(f"mainstay.{name}.") and each.module.split(".")[2] != stem:
                        imports[stem].add(each.module.split(".")[2])
    done: set[str] = set()

    def look(stem: str, path: list[str]) -> list[str]:
        if stem in path:
            return [*path[path.index(stem) :], stem]
        if stem in done:
            return []
        done.add(stem)
        return next((found for to in sorted(imports.get(stem, ())) if (found := look(to, [*path, stem]))), [])

    return next((found for stem in sorted(imports) if (found := look(stem, []))), [])


def _by_need(source: Path, name: str, modules: dict[str, ast.Module]) -> Iterator[str]:
    for stem, tree in modules.items():
        counts = any(
            isinstance(statement, ast.Assign)
            and isinstance(statement.value, ast.Call)
            and ast.unparse(statement.value.func) in COUNTERS
            for statement in tree.body
        )
        if counts and stem != "_metrics" and name != "observability":  # whose requests are what it is about
            yield f"{name}: {stem}.py makes metrics; they are in _metrics.py"
    if (source / "migrations").is_dir() and not any("SCHEMA" in _assigned(tree) for tree in modules.values()):
        yield f"{name}: has migrations and no SCHEMA"
    for stem in ("testing", "cli", "__init__"):
        if stem in modules and modules[stem].body and "__all__" not in _assigned(modules[stem]):
            yield f"{name}: {stem}.py has no __all__"
    if "cli" in modules and "mainstay.commands" not in (source.parents[2] / "pyproject.toml").read_text():
        yield f"{name}: cli is in no entry point mainstay.commands"


def _assigned(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def _lists(root: Path, names: list[str]) -> Iterator[str]:
    workspace = tomllib.loads((root / "pyproject.toml").read_text())
    tool = workspace["tool"]
    layers = " ".join(
        layer for contract in tool["importlinter"]["contracts"] for layer in contract.get("layers", ())
    ).replace("|", " ")
    readme, index = (root / "README.md").read_text(), (root / "docs" / "index.md").read_text()
    for name in names:
        distribution = f"mainstay-{name.replace('_', '-')}"
        for what, there in (
            ("uv's sources in pyproject.toml", distribution in tool["uv"]["sources"]),
            ("mypy's mypy_path", f"packages/{name}/src" in tool["mypy"]["mypy_path"]),
            ("basedpyright's include", f"packages/{name}/src" in tool["basedpyright"]["include"]),
            ("the layers", f"mainstay.{name}" in layers.split()),
            ("the table in README.md", f"[{distribution}](packages/{name}/README.md)" in readme),
            ("docs/index.md", f"({name}.md)" in index),
            ("docs", (root / "docs" / f"{name}.md").exists()),
        ):
            if not there:
                yield f"{name}: is not in {what}"
        page = root / "docs" / f"{name}.md"
        if page.exists() and (found := _headings(page.read_text())) != HEADINGS:
            yield f"{name}: docs/{name}.md has the headings {', '.join(found)}; every page has {', '.join(HEADINGS)}"


def _headings(page: str) -> list[str]:
    inside, found = False, list[str]()
    for line in page.splitlines():
        inside ^= line.lstrip().startswith("```")
        if line.startswith("## ") and not inside:
            found.append(line.removeprefix("## "))
    return found


def test_every_package_has_the_shape():
    """And is in every list."""
    assert deviations(ROOT) == []


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the rules read."""
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    without = shutil.ignore_patterns(".venv*", "__pycache__", "build", "*.egg-info")
    for name in ("packages", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=without)
    return tmp_path


def _instead(file: str, old: str, new: str) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        text = (root / file).read_text()
        assert old in text
        (root / file).write_text(text.replace(old, new))

    return plant


def _file(path: str, text: str) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        (root / path).write_text(text)

    return plant


def _without(path: str) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        (root / path).unlink()

    return plant


EVENTS = "packages/events/src/mainstay/events"


@pytest.mark.parametrize(
    ("plant", "finding"),
    [
        (_without("packages/events/CHANGELOG.md"), "events: CHANGELOG.md is missing"),
        (_without(f"{EVENTS}/py.typed"), "events: py.typed is missing"),
        (_file(f"{EVENTS}/utils.py", "X = 1\n"), "events: utils.py says nothing"),
        (_file(f"{EVENTS}/more.py", "class A(MainstayError): ...\n"), "events: A derives"),
        (_file(f"{EVENTS}/more.py", "A = Counter('a', 'b')\n"), "events: more.py makes metrics"),
        (
            _instead(f"{EVENTS}/errors.py", "class DecodeError(EventsError)", "class DecodeError(MainstayError)"),
            "2 base",
        ),
        (_instead(f"{EVENTS}/tables.py", "SCHEMA =", "schema ="), "events: has migrations and no SCHEMA"),
        (_instead(f"{EVENTS}/testing/__init__.py", "__all__", "__any__"), "events: testing.py has no __all__"),
        (_instead("packages/events/pyproject.toml", "mainstay.commands", "console_scripts"), "events: cli is in no"),
        (_instead("pyproject.toml", "mainstay-events = {", "mainstay-other = {"), "events: is not in uv's sources"),
        (_instead("pyproject.toml", '    "packages/events/src",\n', ""), "events: is not in mypy's mypy_path"),
        (_instead("pyproject.toml", "mainstay.events |", ""), "events: is not in the layers"),
        (_instead("README.md", "(packages/events/README.md)", "(events)"), "events: is not in the table in README.md"),
        (_instead("docs/index.md", "(events.md)", "(event.md)"), "events: is not in docs/index.md"),
        (_without("docs/events.md"), "events: is not in docs"),
        (_without("docs/rfcs/0006-events.md"), "events: has no RFC"),
        (_without("packages/workflow/src/mainstay/workflow/testing.py"), "workflow: has no testing.py"),
        (_instead("docs/events.md", "## Guarantees", "## Promises"), "events: docs/events.md has the headings About,"),
        (
            _instead(f"{EVENTS}/errors.py", "class EventsError(MainstayError)", "class EventsError(Error)"),
            "no base error",
        ),
        (
            _instead(f"{EVENTS}/errors.py", "\nfrom mainstay", "\nfrom mainstay.events.module import X\nfrom mainstay"),
            "events: its files import each other in a circle: ",
        ),
        (_file("packages/cli/src/mainstay/cli/errors.py", "X = 1\n"), "cli: LACKS excuses errors, which is there"),
    ],
)
def test_a_planted_deviation_is_found(checkout, plant, finding):
    """Each rule can fail."""
    plant(checkout)
    assert any(finding in each for each in deviations(checkout)), deviations(checkout)
