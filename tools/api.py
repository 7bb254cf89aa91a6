"""The public API of each package as text: `python tools/api.py` checks `packages/*/api.txt`, `--write` rewrites them.

A change of the API so becomes a line of the diff. The names come from the `__all__` of each public module, the text
from its source rather than from `inspect`: it reads the same under every version of Python.
"""

import ast
import difflib
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
PUBLIC_MAGIC = {"__init__", "__call__", "__aenter__", "__aexit__", "__enter__", "__exit__", "__aiter__", "__await__"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_modules(package: str) -> Iterator[str]:
    """Yield the package and those modules below it that declare an `__all__`."""
    source = ROOT / "packages" / package / "src"
    for path in sorted(source.glob(f"mainstay/{package}/**/*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if not any(part.startswith("_") for part in name.split(".")) and "\n__all__" in path.read_text():
            yield name


def _function(node: Function) -> str:
    word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    marks = "".join(f"@{ast.unparse(each)} " for each in node.decorator_list)
    return f"{marks}{word} {node.name}({ast.unparse(node.args)}){returns}"


def _class(node: ast.ClassDef) -> Iterator[str]:
    marks = "".join(f"@{ast.unparse(each)} " for each in node.decorator_list)
    inside = [ast.unparse(each) for each in (*node.bases, *node.keywords)]
    yield f"{marks}class {node.name}({', '.join(inside)})" if inside else f"{marks}class {node.name}"
    for member in node.body:
        if isinstance(member, Function):
            if not member.name.startswith("_") or member.name in PUBLIC_MAGIC:
                yield f"    {_function(member)}"
        elif isinstance(member, ast.AnnAssign):
            if not ast.unparse(member.target).startswith("_"):
                yield f"    {ast.unparse(member)}"
        elif isinstance(member, ast.Assign):
            target = ast.unparse(member.targets[0])
            if not target.startswith("_") and target != "model_config":
                yield f"    {target} = {ast.unparse(member.value)}"


def _definitions(module: ModuleType, name: str) -> list[ast.stmt]:
    """Return the statements that define `name`, followed through our own imports; several where there are overloads."""
    found: list[ast.stmt] = []
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom):
            source = node.module or ""
            for alias in node.names:
                if name == (alias.asname or alias.name) and source.startswith("mainstay."):
                    found += _definitions(importlib.import_module(source), alias.name)
            continue
        targets: list[str] = []
        if isinstance(node, Function | ast.ClassDef):
            targets = [node.name]
        elif isinstance(node, ast.AnnAssign):
            targets = [ast.unparse(node.target)]
        elif isinstance(node, ast.Assign):
            targets = [ast.unparse(target) for target in node.targets]
        if name in targets:
            found.append(node)
    return found


def describe(package: str) -> str:
    """Return the public API of a package, sorted by name."""
    lines: list[str] = []
    for module_name in public_modules(package):
        module = importlib.import_module(module_name)
        for name in sorted(module.__all__):
            definitions = _definitions(module, name)
            if not definitions:
                lines.append(f"{module_name}: {name}")
            for node in definitions:
                if isinstance(node, ast.ClassDef):
                    described = list(_class(node))
                elif isinstance(node, Function):
                    described = [_function(node)]
                else:
                    described = [ast.unparse(node)]
                lines.append(f"{module_name}: {described[0]}")
                lines += described[1:]
    return "".join(f"{line}\n" for line in lines)


def main(arguments: list[str]) -> int:
    """Check or write the snapshots; return the exit status."""
    stale = 0
    for project in sorted((ROOT / "packages").glob("*/pyproject.toml")):
        snapshot = project.parent / "api.txt"
        new = describe(project.parent.name)
        old = snapshot.read_text() if snapshot.exists() else ""
        if new == old:
            continue
        if "--write" in arguments:
            snapshot.write_text(new)
            print(f"wrote {snapshot.relative_to(ROOT)}")
        else:
            stale = 1
            name = str(snapshot.relative_to(ROOT))
            sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), name, "the source"))
            print(f"{name} is not what the source says; `make api` rewrites it")
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
