"""Typed, frozen settings that come from the environment, and errors that say what to write."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, PrivateAttr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from mainstay.core.errors import ConfigurationError

__all__ = ["Settings", "refuse_misspelt_prefixes", "stray_variables"]

# Kubernetes tells every container about every Service: for one that is called mainstay-events there are
# MAINSTAY_EVENTS_SERVICE_HOST, MAINSTAY_EVENTS_PORT=tcp://… and so on (the form that Docker links had).
_OF_A_SERVICE = re.compile(r"(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")
_WITH_AN_ADDRESS = re.compile(r"PORT(_\d+_(TCP|UDP|SCTP))?")


class _Passed:
    """The fields that code has passed. Any two are equal, since settings are equal by their values alone."""

    __slots__ = ("fields",)

    def __init__(self, fields: Collection[str]) -> None:
        self.fields = frozenset(fields)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Passed)

    def __hash__(self) -> int:
        return 0


class Settings(BaseSettings):
    """Base of every `XSettings`.

    A subclass sets its prefix: `model_config = SettingsConfigDict(env_prefix="MAINSTAY_EVENTS_")`. Each field is read
    from the variable of that prefix and its name in capitals, unless it is passed. Secrets are `SecretStr`.

    Variables that Kubernetes adds for a Service whose name begins like the prefix are no settings and are passed over.

    Raises:
        ConfigurationError: a value of the wrong type or out of range, an unknown field, or another environment
            variable under the prefix that is no setting. The message names field, variable and remedy, and never
            repeats a value.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True)

    _passed: _Passed = PrivateAttr(default_factory=lambda: _Passed(()))

    def __init__(self, **values: Any) -> None:
        problems = _unknown_variables(type(self))
        if not problems:
            try:
                super().__init__(**values)
            except ValidationError as error:
                problems = [_explain(type(self), dict(problem)) for problem in error.errors(include_input=False)]
            except SettingsError as error:
                problems = [_explain_json(type(self), str(error))]
        if problems:
            raise ConfigurationError("; ".join(problems))
        self._passed = _Passed(values)

    @classmethod
    def variable(cls, field: str) -> str:
        """The environment variable that sets `field`."""
        return f"{cls.model_config.get('env_prefix', '')}{field}".upper()

    def origin(self, field: str) -> str:
        """The place that the value of `field` comes from: `code`, the environment variable's name, or `default`."""
        if field in self._passed.fields:
            return "code"
        return self.variable(field) if field in self.model_fields_set else "default"


def stray_variables() -> list[str]:
    """The variables that begin with `MAINSTAY_` and that no settings class of this process reads.

    Another process may mean them, so most are no mistake. `MAINSTAY_TEST_…` belongs to tests.
    """
    read = tuple(each.variable("") for each in _loaded(Settings) if each is not Settings)
    return [
        name
        for name, value in sorted(os.environ.items())
        if name.upper().startswith("MAINSTAY_")
        and not name.upper().startswith(("MAINSTAY_TEST_", *read))
        and not _of_a_service(name.upper().removeprefix("MAINSTAY_"), value)
    ]


def refuse_misspelt_prefixes(settings: Collection[type[Settings]]) -> None:
    """Refuse a stray variable that has a field of `settings` behind a prefix much like theirs.

    It would be ignored, and the field's default taken.

    Raises:
        ConfigurationError: there is one; the message names the variable that was meant.
    """
    for name in stray_variables():
        for each in settings:
            prefix = each.variable("")
            for field in each.model_fields:
                written = name.upper().removesuffix(field.upper())
                # Without what all begin with, since that makes any two alike. Different packages stay below 0.8.
                words = (written.removeprefix("MAINSTAY_"), [prefix.removeprefix("MAINSTAY_")])
                if written != name.upper() and difflib.get_close_matches(*words, cutoff=0.8):
                    msg = f"environment variable {name} is read by nothing: did you mean {prefix}{field.upper()}?"
                    raise ConfigurationError(msg)


def _of_a_service(rest: str, value: str) -> bool:
    """Whether Kubernetes made the variable, by its name behind a prefix: a whole name, or the end of a longer one."""
    for at in [0, *(match.end() for match in re.finditer("_", rest))]:
        if _OF_A_SERVICE.fullmatch(rest, at):
            return not _WITH_AN_ADDRESS.fullmatch(rest, at) or "://" in value
    return False


def _loaded(settings: type[Settings]) -> list[type[Settings]]:
    return [settings, *(below for each in settings.__subclasses__() for below in _loaded(each))]


def _unknown_variables(settings: type[Settings]) -> list[str]:
    prefix = (settings.model_config.get("env_prefix") or "").upper()
    if not prefix:
        msg = f"{settings.__name__} has no env_prefix; set model_config = SettingsConfigDict(env_prefix='MAINSTAY_…_')"
        raise TypeError(msg)
    known = {settings.variable(field) for field in settings.model_fields}
    return [
        f"environment variable {name} is not a setting of {settings.__name__}: {_meant(name.upper(), known)}"
        for name, value in sorted(os.environ.items())
        if name.upper().startswith(prefix)
        and name.upper() not in known
        and not _of_a_service(name.upper().removeprefix(prefix), value)
    ]


def _meant(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known)) or 'none'}"


def _explain(settings: type[Settings], problem: dict[str, Any]) -> str:
    path = [str(part) for part in problem["loc"]]
    if not path:  # a validator of the whole model: its message names the fields
        return f"{settings.__name__}: {problem['msg']}"
    field = path[0]
    text = f"{'.'.join([settings.__name__, *path])}: {problem['msg']}"
    if problem["type"] == "extra_forbidden":
        *above, name = path
        text = (
            f"{'.'.join([settings.__name__, *above])} has no field {name}: {_meant(name, _fields_at(settings, above))}"
        )
        if not above:
            return text  # nothing could be set under that name
    return f"{text}; set {settings.variable(field)} or pass {settings.__name__}({field}=…)"


def _explain_json(settings: type[Settings], text: str) -> str:
    """Say of a variable that should hold JSON what to write; `text` is what pydantic-settings says, without remedy."""
    for field, info in settings.model_fields.items():
        if f'"{field}"' in text:
            kind = get_origin(info.annotation) or info.annotation
            shape = '{"…": …}' if isinstance(kind, type) and issubclass(kind, Mapping | BaseModel) else '["…", …]'
            variable = settings.variable(field)
            return f"{settings.__name__}.{field}: {variable} is not JSON; write {variable}='{shape}'"
    return f"{settings.__name__}: {text}"


def _fields_at(settings: type[Settings], path: list[str]) -> set[str]:
    """The fields that there are at `path`, whose parts are fields of models, keys of mappings and indices of lists."""
    models: list[type[BaseModel]] = [settings]
    for part in path:
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        models = [model for field in fields for model in _models_in(field.annotation)] or models
    return {field for model in models for field in model.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
