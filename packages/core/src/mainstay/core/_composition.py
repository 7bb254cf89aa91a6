"""How the entries of an App fit together, found out before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from mainstay.core._references import bindings_in
from mainstay.core.errors import ConfigurationError
from mainstay.core.given import given_kinds
from mainstay.core.module import Binding, Feature, Module

AnyModule = Module[Any, Any]


def composed(entries: Sequence[AnyModule | Feature]) -> list[AnyModule]:
    """The modules with their parts, requirements first, otherwise as written; every one has checked itself.

    Raises:
        ConfigurationError: something is wrong; the message names the line to write.
    """
    modules = _in_order_of_need(_attach(entries))
    for module in modules:
        module.modules = tuple(modules)
    for module in modules:
        module.check()
    _check_functions(modules)
    return modules


def _attach(entries: Sequence[AnyModule | Feature]) -> list[AnyModule]:
    roots: dict[type[AnyModule], AnyModule] = {}
    for entry in entries:
        if not isinstance(cast("object", entry), Module | Feature):  # callers may be unchecked
            msg = f"an App takes XModule.for_root(…) and XModule.for_feature(…), not {entry!r}"
            raise ConfigurationError(msg)
        if isinstance(entry, Module):
            kind = type(entry)
            if kind in roots:
                msg = f"{kind.__name__}.for_root appears twice: keep one, and add what features bring with for_feature"
                raise ConfigurationError(msg)
            same = next((other for other in roots.values() if other.name == entry.name), None)
            if same is not None:
                msg = f"{type(same).__name__} and {kind.__name__} are both named {entry.name!r}: rename one"
                raise ConfigurationError(msg)
            roots[kind] = entry
    parts: dict[type[AnyModule], list[object]] = {kind: [] for kind in roots}
    for entry in entries:
        if isinstance(entry, Feature):
            if entry.module not in roots:
                name = entry.module.__name__
                msg = f"{name}.for_feature is there without its root: add {name}.for_root() to the App"
                raise ConfigurationError(msg)
            known = parts[entry.module]
            for part in entry.parts:
                if any(part is other for other in known):
                    msg = f"{entry.module.__name__}.for_feature was given {part!r} twice"
                    raise ConfigurationError(msg)
                known.append(part)
    for kind, root in roots.items():
        root.parts = tuple(parts[kind])
    return list(roots.values())


def _in_order_of_need(modules: list[AnyModule]) -> list[AnyModule]:
    by_kind = {type(module): module for module in modules}
    ordered: list[AnyModule] = []
    open_: list[str] = []

    def visit(module: AnyModule) -> None:
        if module in ordered:
            return
        name = type(module).__name__
        if name in open_:
            msg = f"modules require each other in a circle: {' → '.join([*open_, name])}"
            raise ConfigurationError(msg)
        open_.append(name)
        for kind in module.requires():
            if kind not in by_kind:
                msg = f"{name} requires {kind.__name__}: add {kind.__name__}.for_root() to the App"
                raise ConfigurationError(msg)
            visit(by_kind[kind])
        open_.pop()
        ordered.append(module)

    for module in modules:
        visit(module)
    return ordered


def _check_functions(modules: Sequence[AnyModule]) -> None:
    """Every service that a function asks for is yielded, every router that it uses belongs to this App."""
    yielded = {kind for module in modules for kind in module.yields()}
    mine: set[Binding[Any]] = {
        binding
        for module in modules
        for part in module.parts
        if isinstance(binding := cast("Any", getattr(part, "binding", None)), Binding)
    }
    for module in modules:
        for function in module.functions():
            for parameter, kind in given_kinds(function).items():
                if kind not in yielded:
                    msg = (
                        f"{_name(function)}: no module of this App yields the {kind.__name__} that its parameter "
                        f"{parameter!r} is given; the App has {_listed(yielded)}"
                    )
                    raise ConfigurationError(msg)
            for binding in bindings_in(function):
                if binding not in mine and binding.remedy is not None:
                    msg = (
                        f"{_name(function)} uses {binding.owner}, which belongs to no for_feature of this App: "
                        f"add {binding.remedy}"
                    )
                    raise ConfigurationError(msg)


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '?')}.{name}"


def _listed(kinds: set[type]) -> str:
    return ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
