"""The commands that are about an App as a whole: run, describe, check, health."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer
from pydantic import BaseModel, SecretBytes, SecretStr

from mainstay.cli.target import APP, VARIABLE, ServiceError, app_to_run, needed_app
from mainstay.cli.terminal import as_json, aside, document, say, table
from mainstay.core import App, MainstayError, Module, Settings, stray_variables

__all__ = ["check", "describe", "health", "run"]


def run(app: Annotated[str, typer.Argument(metavar="[MODULE:NAME]", help="The App, instead of --app.")] = "") -> None:
    """Run the App as a worker until SIGTERM or Ctrl-C: consumers, relays, workflows, sealers."""
    if app:
        APP.set(app)
    worker = app_to_run()
    try:
        worker.run()
    except Exception as error:  # as `python main.py` would show it
        msg = "the worker ended with an error"
        raise ServiceError(msg, 1) from error


def describe() -> None:
    """Say what is configured: modules in the order of their start, settings and their origin, and what they hold."""
    app = needed_app()
    modules = [_described(module) for module in app.modules]
    if as_json():
        document({"modules": modules, "read by nothing here": _strays()})
        return
    for module in modules:
        say("", module["module"])
        table(("setting", "value", "from"), module["settings"], empty="  no settings")
        for kind, lines in module["holds"].items():
            say(f"{kind}:", *(f"  {line}" for line in lines or ["none"]))
    if strays := _strays():
        say("", "environment variables that nothing here reads:", *(f"  {name}" for name in strays))


def _described(module: Module[Any, Any]) -> dict[str, Any]:
    settings: Settings = module.settings
    return {
        "module": module.name,
        "settings": [
            {"setting": field, "value": _masked(getattr(settings, field)), "from": settings.origin(field)}
            for field in type(settings).model_fields
        ],
        "holds": {kind: list(lines) for kind, lines in module.describe().items()},
    }


def _strays() -> list[str]:
    return [name for name in stray_variables() if name != VARIABLE]


def check() -> None:
    """Look for what would go wrong once there is traffic; each finding names its remedy. Nothing stored is changed."""
    app = needed_app()
    with aside():
        findings = asyncio.run(_findings(app))
    if as_json():
        document([{"module": module, "finding": text} for module, text in findings])
    else:
        say(*(f"{module}: {text}" for module, text in findings), *([] if findings else ["nothing was found"]))
    if findings:
        raise typer.Exit(1)


async def _findings(app: App) -> list[tuple[str, str]]:
    for module in app.modules:
        module.only_looking()
    found: list[tuple[str, str]] = []
    phase = "start"
    try:
        async with app:
            phase = "stop"
            for module in app.modules:
                found += [(module.name, text) for text in await _inspected(module, app)]
    except Exception as error:  # noqa: BLE001  a start that fails is a finding, in whichever way it does
        found.append((phase, _text(error)))
    return found


def _text(error: Exception) -> str:
    if isinstance(error, MainstayError):
        return str(error)
    return " ".join([f"{type(error).__name__}: {error}", *(f"({note})" for note in getattr(error, "__notes__", ()))])


async def _inspected(module: Module[Any, Any], app: App) -> list[str]:
    try:
        return list(await module.inspect(app))
    except Exception as error:  # noqa: BLE001  a check that cannot be made is a finding, and the others still are made
        return [f"could not be checked: {_text(error)}"]


def health() -> None:
    """Start the App without serving, and say how each of its parts is; 1 where one is down."""
    app = needed_app()
    with aside():
        report = asyncio.run(_health(app))
    table(("part", "status", "detail"), report)
    if any(row["status"] == "down" for row in report):
        raise typer.Exit(1)


async def _health(app: App) -> list[dict[str, str]]:
    for module in app.modules:
        module.only_looking()
    async with app:
        return [
            {"part": name, "status": each.status, "detail": each.detail} for name, each in (await app.health()).items()
        ]


def _masked(value: object) -> object:
    if isinstance(value, SecretStr | SecretBytes):
        return "********"
    if isinstance(value, BaseModel):  # settings of several fields in one: those that are not the usual
        return value.model_dump(mode="json", exclude_defaults=True) or "defaults"
    return value if isinstance(value, str | int | float | bool | None) else str(value)
