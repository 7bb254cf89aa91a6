"""The catalogue of all error codes, `docs/errors.md`: `python tools/errors_page.py` checks it, `--write` rewrites it.

It is made from the classes, whose docstrings say in one sentence what has happened, and from what HTTP says alone.
"""

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

import mainstay
from mainstay.core import MainstayError
from mainstay.observability.errors import BY_STATUS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "errors.md"
HEAD = """# Errors: every code and what it means

<!-- `make errors` writes this page from the classes of the packages. -->

A code never changes its meaning. It stands in the [problem](observability.md#problems) that a caller gets, in log lines
and in records, and on one class, which `except` catches; the families and their statuses are in [core](core.md#errors).
*Again* says whether the same call may succeed later. An application's own errors have codes of their own.
"""
ALONE = """## Of HTTP alone

What a framework answers by itself, and an `HTTPException`, say a status and no code, so it gets the code of its status.
Every other status from 400 on is `VAL_REQUEST`, from 500 on `SYS_INTERNAL`.

| status | code | title |
|---|---|---|
"""


def error_classes() -> list[type[MainstayError]]:
    """Every class of an error in a package, after each of their modules was imported."""
    for module in pkgutil.walk_packages(mainstay.__path__, "mainstay."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)

    def below(kind: type[MainstayError]) -> Iterator[type[MainstayError]]:
        yield kind
        for each in kind.__subclasses__():
            yield from below(each)

    found = {each for each in below(MainstayError) if each.__module__.startswith("mainstay.")}
    return sorted(found, key=lambda kind: (kind.__module__, kind.__name__))


def page() -> str:
    """The page as the classes say it."""
    packages: dict[str, list[type[MainstayError]]] = {}
    for kind in error_classes():
        if "code" in vars(kind):
            packages.setdefault(kind.__module__.split(".")[1], []).append(kind)
    order = sorted(packages, key=lambda name: (name != "core", name))
    parts = [HEAD]
    for name in order:
        rows = "".join(_row(kind) for kind in sorted(packages[name], key=lambda kind: kind.code))
        parts.append(f"## {name}\n\n| code | status | title | class | again | |\n|---|---|---|---|---|---|\n{rows}")
    rows = "".join(f"| {status} | `{code}` | {title} |\n" for status, (code, title) in sorted(BY_STATUS.items()))
    return "\n".join([*parts, ALONE + rows])


def _row(kind: type[MainstayError]) -> str:
    meaning = " ".join((kind.__doc__ or "").partition("\n\n")[0].split())
    again = "yes" if kind.retryable else ""
    return f"| `{kind.code}` | {kind.status} | {kind.title} | `{kind.__name__}` | {again} | {meaning} |\n"


def main(arguments: list[str]) -> int:
    """Check or write the page; return the exit status."""
    new, old = page(), PAGE.read_text() if PAGE.exists() else ""
    if new == old:
        return 0
    if "--write" in arguments:
        PAGE.write_text(new)
        print("wrote docs/errors.md")
        return 0
    sys.stdout.writelines(
        difflib.unified_diff(old.splitlines(True), new.splitlines(True), "docs/errors.md", "the classes")
    )
    print("docs/errors.md is not what the classes say; `make errors` rewrites it")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
