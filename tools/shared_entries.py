"""An extension of griffe for docstrings in which several names share a line: `first, last: the numbers it is about`.

Google's sections know one name a line, and would take the second name for a type. Each name gets an entry of its own.
"""

import re
from typing import Any

import griffe

_SHARED = re.compile(r"^(?P<indent> +)(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+): (?P<text>.*)$")
_SECTION = re.compile(r"^(Args|Attributes):$")


class SharedEntries(griffe.Extension):
    """Split the entries before griffe reads the sections."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = split(obj.docstring.value)


def split(docstring: str) -> str:
    """Repeat an entry, with the lines that continue it, for each of its names."""
    lines: list[str] = []
    names: list[str] = []
    entry: list[str] = []
    inside, depth = False, 0

    def close() -> None:
        for name in names:
            lines.extend([f"{' ' * depth}{name}: {entry[0]}", *entry[1:]])
        names.clear()
        entry.clear()

    for line in docstring.splitlines():
        indent = len(line) - len(line.lstrip())
        if names and line.strip() and indent > depth:
            entry.append(line)
            continue
        close()
        if line and not indent:
            inside = bool(_SECTION.match(line))
        if inside and (shared := _SHARED.match(line)):
            depth = indent
            names.extend(shared["names"].split(", "))
            entry.append(shared["text"])
        else:
            lines.append(line)
    close()
    return "\n".join(lines)
