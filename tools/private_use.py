"""Private use between packages: `python tools/private_use.py` names each one and ends with status 1 where one is found.

Public is what a module without underscore in its path exports by `__all__`. Everything else belongs to one package, and
its files, tests and benchmark may use it. Files of no package, such as the examples, may use what is public only.

Imports are judged exactly. Attributes with an underscore are judged by name: such a one is another package's where
one of our packages defines it, and neither the file nor its own package does. Attributes of foreign modules, such as
`os._exit`, do not count.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("packages", "benchmarks", "tests", "examples", "servers")


@dataclass
class Packages:
    """What the sources of all packages define: modules with their exports, and private names by package."""

    exports: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    private: dict[str, set[str]] = field(default_factory=dict[str, set[str]])

    def owner(self, name: str) -> str | None:
        """Return the package that defines an attribute of this private name, None where none does."""
        return next((package for package, names in sorted(self.private.items()) if name in names), None)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def _exports(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            found |= set(ast.literal_eval(node.value))
    return found


def _defined(tree: ast.Module) -> set[str]:
    """Return the private names that a file defines: functions, classes, variables, attributes that it assigns."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__slots__":
            found |= {str(each.value) for each in ast.walk(node.value) if isinstance(each, ast.Constant)}
    return {name for name in found if _is_private(name)}


def _foreign_modules(tree: ast.Module) -> set[str]:
    """Return the names by which a file knows whole modules of others."""
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.Import))
    names = (alias for node in imports for alias in node.names)
    return {(alias.asname or alias.name).split(".")[0] for alias in names if not alias.name.startswith("mainstay")}


def survey(root: Path) -> Packages:
    """Read the sources of every package below `root`."""
    found = Packages()
    for source in sorted(root.glob("packages/*/src")):
        private = found.private.setdefault(source.parent.name, set())
        for path in sorted(source.rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            tree = ast.parse(path.read_text())
            found.exports[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = _exports(tree)
            private |= _defined(tree)
    return found


def _package_of(path: Path) -> str | None:
    """Return the package that a file, relative to the root, belongs to, None where it belongs to none."""
    place, *below = path.parts
    return below[0] if place in {"packages", "benchmarks"} and below[1:] else None


def _imported(node: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Yield the modules of ours that a statement imports, with the name that it takes from each."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, None) for alias in node.names if alias.name.startswith("mainstay."))
    elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mainstay":
        yield from ((node.module or "", alias.name) for alias in node.names)


def _misuse(packages: Packages, module: str, name: str | None) -> str | None:
    """Return why an import from another package is private use, None where it is not."""
    if name is not None and f"{module}.{name}" in packages.exports:
        module, name = f"{module}.{name}", None  # a module taken from its package
    if any(_is_private(part) for part in module.split(".")):
        return f"imports {module}, a private module"
    if name is not None and name not in packages.exports.get(module, set()):
        return f"imports {name}, which {module} does not export in __all__"
    return None


def findings(root: Path) -> Iterator[str]:
    """Yield every private use of another package below `root`, with its place."""
    packages = survey(root)
    trees = {
        path.relative_to(root): ast.parse(path.read_text())
        for place in PLACES
        for path in sorted((root / place).rglob("*.py"))
    }
    of_none: set[str] = set()
    for path, tree in trees.items():
        if _package_of(path) is None:
            of_none |= _defined(tree)
    for path, tree in trees.items():
        own = _package_of(path)
        known = _defined(tree) | (of_none if own is None else packages.private.get(own, set()))
        foreign = _foreign_modules(tree)
        for node in ast.walk(tree):
            for module, name in _imported(node):
                if module.split(".")[1:2] not in ([], [own]) and (why := _misuse(packages, module, name)):
                    yield f"{path}:{getattr(node, 'lineno', 0)}: {why}"
            if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in known:
                if isinstance(node.value, ast.Name) and node.value.id in foreign:
                    continue
                owner = packages.owner(node.attr)
                if owner is not None:
                    yield f"{path}:{node.lineno}: uses {node.attr}, a private name of {owner}"


def main() -> int:
    """Print the findings; return the exit status."""
    found = list(findings(ROOT))
    for each in found:
        print(each)
    if found:
        print(f"{len(found)} private uses between packages: export the name in __all__, or do without it")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
