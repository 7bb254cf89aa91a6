"""The routers and trails that a function uses, found in its code without running it.

A forgotten `for_feature` line would otherwise be noticed in production, by the first event that is not published.
Names are followed as far as they are plain: globals, closures, attributes of modules, and from there into functions of
the same top-level package. A name that is computed is not found here but at its first use, by its `Binding`.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from mainstay.core.module import Binding

_LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF")
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_MISSING = object()


def bindings_in(function: Callable[..., Any]) -> Iterator[Binding[Any]]:
    """The bindings of everything that `function`, or a function of its package that it names, refers to."""
    seen: set[int] = set()
    open_: list[object] = [function]
    while open_:
        plain = _plain(open_.pop())
        if plain is None or id(plain) in seen:
            continue
        seen.add(id(plain))
        for value in _referred(plain):
            binding = getattr(value, "binding", None)
            if isinstance(binding, Binding):
                yield binding
            elif _package(value) == _package(plain):
                open_.append(value)


def _plain(value: object) -> FunctionType | None:
    if not callable(value):
        return None
    found = inspect.unwrap(value)
    found = getattr(found, "__func__", found)
    return found if isinstance(found, FunctionType) else None


def _package(value: object) -> str | None:
    module = getattr(value, "__module__", None)
    return module.partition(".")[0] if isinstance(module, str) and callable(value) else None


def _referred(function: FunctionType) -> Iterator[object]:
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
    names: dict[str, object] = dict(function.__globals__)
    for name, cell in cells.items():
        try:
            names[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            names.pop(name, None)
    yield from _loaded(function.__code__, names)


def _loaded(code: CodeType, names: dict[str, object]) -> Iterator[object]:
    value: object = _MISSING
    for instruction in dis.get_instructions(code):
        if instruction.opname in _LOADS:
            value = names.get(str(instruction.argval), _MISSING)
        elif instruction.opname in _ATTRIBUTES and isinstance(value, ModuleType):
            value = getattr(value, str(instruction.argval), _MISSING)
        else:
            value = _MISSING
        if value is not _MISSING:
            yield value
    for constant in code.co_consts:  # functions, comprehensions and lambdas inside
        if isinstance(constant, CodeType):
            yield from _loaded(constant, names)
