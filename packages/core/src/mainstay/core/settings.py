"""Typed, frozen settings that come from the environment, and errors that say what to write."""

from __future__ import annotations

import difflib
import os
from typing import Any

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from mainstay.core.errors import ConfigurationError


class Settings(BaseSettings):
    """Base of every `XSettings`.

    A subclass sets its prefix: `model_config = SettingsConfigDict(env_prefix="MAINSTAY_EVENTS_")`. Each field is read
    from the variable of that prefix and its name in capitals, unless it is passed. Secrets are `SecretStr`.

    Raises:
        ConfigurationError: a value of the wrong type or out of range, an unknown field, or an environment variable
            under the prefix that is no setting. The message names field, variable and remedy, and never repeats a
            value.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True)

    def __init__(self, **values: Any) -> None:
        problems = _unknown_variables(type(self))
        if not problems:
            try:
                super().__init__(**values)
            except ValidationError as error:
                problems = [_explain(type(self), dict(problem)) for problem in error.errors(include_input=False)]
            except ValueError as error:  # pydantic-settings: a variable that should hold JSON does not
                problems = [f"{type(self).__name__}: {error}"]
        if problems:
            raise ConfigurationError("; ".join(problems))


def variable_name(settings: type[Settings], field: str) -> str:
    """The environment variable that sets `field`."""
    return f"{settings.model_config.get('env_prefix', '')}{field}".upper()


def _unknown_variables(settings: type[Settings]) -> list[str]:
    prefix = (settings.model_config.get("env_prefix") or "").upper()
    if not prefix:
        msg = f"{settings.__name__} has no env_prefix; set model_config = SettingsConfigDict(env_prefix='MAINSTAY_…_')"
        raise TypeError(msg)
    known = {variable_name(settings, field) for field in settings.model_fields}
    problems: list[str] = []
    for name in sorted(os.environ):
        if name.upper().startswith(prefix) and name.upper() not in known:
            close = difflib.get_close_matches(name.upper(), known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known)) or 'none'}"
            problems.append(f"environment variable {name} is not a setting of {settings.__name__}: {remedy}")
    return problems


def _explain(settings: type[Settings], problem: dict[str, Any]) -> str:
    path = [str(part) for part in problem["loc"]]
    if not path:  # a validator of the whole model: its message names the fields
        return f"{settings.__name__}: {problem['msg']}"
    field = path[0]
    text = f"{settings.__name__}.{'.'.join(path)}: {problem['msg']}"
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(field, settings.model_fields, n=1)
        return f"{settings.__name__} has no field {field!r}" + (f": did you mean {close[0]!r}?" if close else "")
    return f"{text}; set {variable_name(settings, field)} or pass {settings.__name__}({field}=…)"
