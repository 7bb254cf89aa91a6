"""The public API of each package as text: `python tools/api.py` checks `packages/*/api.txt`, `--write` rewrites them.

A change of the API so becomes a line of the diff. A module is public if no part of its path begins with an underscore,
and must say in `__all__` what it exports. The text comes from the source rather than from `inspect`: it reads the same
under every version of Python. Of a class it holds what a user can reach: methods, fields, members of an enum, nested
classes, and the attributes that `__init__` sets.
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


def public_modules(package: str) -> Iterator[tuple[str, bool]]:
    """Yield the package and the public modules below it, and whether each declares an `__all__`."""
    source = ROOT / "packages" / package / "src"
    for path in sorted(source.glob(f"mainstay/{package}/**/*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        names = parts[:-1] if parts[-1] == "__init__" else parts
        # Revisions of a schema begin with a digit: no import statement reaches them.
        if all(name.isidentifier() and not name.startswith("_") for name in names):
            yield ".".join(names), "\n__all__" in path.read_text()


def undeclared(package: str) -> list[str]:
    """Return what is wrong with the public modules of a package: no `__all__`."""
    without = sorted(name for name, declares in public_modules(package) if not declares)
    return [f"{name} is public and has no __all__; add one, or an underscore" for name in without]


def _function(node: Function) -> str:
    word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    marks = "".join(f"@{ast.unparse(each)} " for each in node.decorator_list)
    return f"{marks}{word} {node.name}({ast.unparse(node.args)}){returns}"


def _names(target: ast.expr) -> Iterator[str]:
    if isinstance(target, ast.Tuple | ast.List):
        for element in target.elts:
            yield from _names(element)
    else:
        yield ast.unparse(target)


def _attributes(init: Function) -> Iterator[tuple[str, str]]:
    """Yield the public attributes that `__init__` sets, each once, with a type where the source states one."""
    arguments = [*init.args.posonlyargs, *init.args.args, *init.args.kwonlyargs]
    types = {each.arg: f": {ast.unparse(each.annotation)}" for each in arguments if each.annotation is not None}
    found: dict[str, str] = {}
    for node in ast.walk(init):
        if isinstance(node, ast.AnnAssign):
            found[ast.unparse(node.target)] = f": {ast.unparse(node.annotation)}"
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                for name in _names(target):
                    found.setdefault(name, types.get(ast.unparse(node.value), ""))
    for name, kind in found.items():
        owner, _, attribute = name.partition(".")
        if owner == "self" and attribute.isidentifier() and not attribute.startswith("_"):
            yield attribute, kind


def _members(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a class, those below an `if` included."""
    for node in body:
        if isinstance(node, ast.If):
            yield from _members([*node.body, *node.orelse])
        else:
            yield node


def _class(node: ast.ClassDef) -> Iterator[str]:
    marks = "".join(f"@{ast.unparse(each)} " for each in node.decorator_list)
    inside = [ast.unparse(each) for each in (*node.bases, *node.keywords)]
    yield f"{marks}class {node.name}({', '.join(inside)})" if inside else f"{marks}class {node.name}"
    declared: set[str] = set()
    attributes: dict[str, str] = {}
    for member in _members(node.body):
        if isinstance(member, Function):
            declared.add(member.name)
            if not member.name.startswith("_") or member.name in PUBLIC_MAGIC:
                yield f"    {_function(member)}"
            if member.name == "__init__":
                attributes |= _attributes(member)
        elif isinstance(member, ast.AnnAssign):
            declared.add(ast.unparse(member.target))
            if not ast.unparse(member.target).startswith("_"):
                yield f"    {ast.unparse(member)}"
        elif isinstance(member, ast.Assign):
            for target in (name for each in member.targets for name in _names(each)):
                declared.add(target)
                if not target.startswith("_") and target != "model_config":
                    yield f"    {target} = {ast.unparse(member.value)}"
        elif isinstance(member, ast.ClassDef) and not member.name.startswith("_"):
            yield from (f"    {line}" for line in _class(member))
    yield from (f"    self.{name}{kind}" for name, kind in attributes.items() if name not in declared)


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
    top = importlib.import_module(f"mainstay.{package}")
    for module_name in (name for name, declares in public_modules(package) if declares):
        module = importlib.import_module(module_name)
        for name in sorted(module.__all__):
            if module is not top and name in top.__all__ and getattr(module, name) is getattr(top, name):
                lines.append(f"{module_name}: {name}, as mainstay.{package}.{name}")
                continue
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
    """Check the modules, check or write the snapshots; return the exit status."""
    stale = 0
    for project in sorted((ROOT / "packages").glob("*/pyproject.toml")):
        for finding in undeclared(project.parent.name):
            stale = 1
            print(finding)
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
