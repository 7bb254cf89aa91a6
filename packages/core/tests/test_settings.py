"""Settings: from the environment, frozen, and errors that say what to write."""

from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from mainstay.core import ConfigurationError, Settings, stray_variables


class PostSettings(Settings):
    model_config = SettingsConfigDict(env_prefix="MAINSTAY_POST_")
    transport: Literal["pigeon", "coach"] = "coach"
    batch_size: int = Field(default=10, ge=1)
    routes: tuple[str, ...] = ()
    password: SecretStr = SecretStr("")

    @model_validator(mode="after")
    def pigeons_carry_one(self):
        if self.transport == "pigeon" and self.batch_size > 1:
            msg = "transport='pigeon' carries one letter: set batch_size=1"
            raise ValueError(msg)
        return self


class Coach(BaseModel):
    model_config = ConfigDict(extra="forbid")
    horses: int = 2


class CoachSettings(Settings):
    model_config = SettingsConfigDict(env_prefix="MAINSTAY_COACH_")
    by_town: dict[str, Coach] = Field(default_factory=dict)
    spare: tuple[Coach | None, ...] = ()


def test_fields_come_from_the_environment(monkeypatch):
    """Each field has its variable; what is passed wins over it."""
    monkeypatch.setenv("MAINSTAY_POST_BATCH_SIZE", "7")
    monkeypatch.setenv("MAINSTAY_POST_ROUTES", '["north"]')
    settings = PostSettings()
    assert (settings.batch_size, settings.routes, settings.transport) == (7, ("north",), "coach")
    assert PostSettings(batch_size=8).batch_size == 8


def test_settings_are_frozen():
    """The configuration of a running App cannot be changed."""
    with pytest.raises(ValueError, match="frozen"):
        PostSettings().batch_size = 3  # type: ignore[misc]  # the point


def test_a_wrong_value_names_field_variable_and_call(monkeypatch):
    """The message holds the three things a reader needs, all problems at once, and not the value."""
    monkeypatch.setenv("MAINSTAY_POST_BATCH_SIZE", "s3cret-many")
    monkeypatch.setenv("MAINSTAY_POST_TRANSPORT", "s3cret-owl")
    with pytest.raises(ConfigurationError) as caught:
        PostSettings()
    message = str(caught.value)
    assert "PostSettings.batch_size" in message
    assert "set MAINSTAY_POST_BATCH_SIZE or pass PostSettings(batch_size=…)" in message
    assert "PostSettings.transport" in message
    assert "s3cret" not in message


def test_an_unknown_variable_under_the_prefix_is_an_error(monkeypatch):
    """A typing mistake in a deployment is found at the start, with the name that was meant."""
    monkeypatch.setenv("MAINSTAY_POST_TRANSPROT", "pigeon")
    with pytest.raises(ConfigurationError, match=r"MAINSTAY_POST_TRANSPROT .* did you mean MAINSTAY_POST_TRANSPORT\?"):
        PostSettings()
    monkeypatch.delenv("MAINSTAY_POST_TRANSPROT")
    monkeypatch.setenv("MAINSTAY_POST_QQQQQQQQQQQQQQQQ", "1")
    with pytest.raises(ConfigurationError, match=r"known are MAINSTAY_POST_BATCH_SIZE, "):
        PostSettings()


def test_an_unknown_field_is_an_error():
    """A wrong keyword names the one that was meant."""
    with pytest.raises(ConfigurationError, match=r"no field batchsize: did you mean batch_size\?$"):
        PostSettings(batchsize=1)  # type: ignore[call-arg]  # the point
    with pytest.raises(ConfigurationError, match=r"no field xyz: known are batch_size, password, routes, transport$"):
        PostSettings(xyz=1)  # type: ignore[call-arg]  # the point


def test_a_rule_over_several_fields_speaks_for_itself():
    """The message of a whole-model validator comes through."""
    with pytest.raises(ConfigurationError, match="carries one letter: set batch_size=1"):
        PostSettings(transport="pigeon")


def test_broken_json_in_the_environment_names_the_field(monkeypatch):
    """A list or a mapping that is not JSON is a configuration error: the line to write, and not the value."""
    monkeypatch.setenv("MAINSTAY_POST_ROUTES", "s3cret [")
    with pytest.raises(ConfigurationError) as caught:
        PostSettings()
    text = """PostSettings.routes: MAINSTAY_POST_ROUTES is not JSON; write MAINSTAY_POST_ROUTES='["…", …]'"""
    assert str(caught.value) == text
    monkeypatch.setenv("MAINSTAY_COACH_BY_TOWN", "s3cret {")
    with pytest.raises(ConfigurationError) as caught:
        CoachSettings()
    text = """CoachSettings.by_town: MAINSTAY_COACH_BY_TOWN is not JSON; write MAINSTAY_COACH_BY_TOWN='{"…": …}'"""
    assert str(caught.value) == text


def test_secrets_stay_secret(monkeypatch):
    """Neither repr nor errors show a password."""
    monkeypatch.setenv("MAINSTAY_POST_PASSWORD", "hunter2")
    assert "hunter2" not in repr(PostSettings())
    with pytest.raises(ConfigurationError) as caught:
        PostSettings(batch_size=0)
    assert "hunter2" not in str(caught.value) + repr(caught.value.__cause__) + repr(caught.value.__context__)


def test_settings_without_a_prefix_are_a_programming_error():
    """A class that would read arbitrary variables is refused."""

    class Bare(Settings):
        path: str = ""

    with pytest.raises(TypeError, match="has no env_prefix"):
        Bare()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("by_town", '{"York": {"horse": 4}}', "CoachSettings.by_town.York has no field horse: did you mean horses?"),
        ("by_town", '{"York": {"zzz": 4}}', "CoachSettings.by_town.York has no field zzz: known are horses"),
        ("spare", '[null, {"horse": 4}]', "CoachSettings.spare.1 has no field horse: did you mean horses?"),
    ],
)
def test_an_unknown_field_of_a_nested_model_names_the_place(field, value, message, monkeypatch):
    """What is misspelt inside a mapping or a list is found there, and the remedy is of that place."""
    variable = f"MAINSTAY_COACH_{field.upper()}"
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError) as caught:
        CoachSettings()
    assert str(caught.value) == f"{message}; set {variable} or pass CoachSettings({field}=…)"


KUBERNETES = {
    "MAINSTAY_POST_SERVICE_HOST": "10.0.0.11",
    "MAINSTAY_POST_SERVICE_PORT": "80",
    "MAINSTAY_POST_SERVICE_PORT_HTTP": "80",
    "MAINSTAY_POST_PORT": "tcp://10.0.0.11:80",
    "MAINSTAY_POST_PORT_80_TCP": "tcp://10.0.0.11:80",
    "MAINSTAY_POST_PORT_80_TCP_PROTO": "tcp",
    "MAINSTAY_POST_PORT_80_TCP_PORT": "80",
    "MAINSTAY_POST_PORT_80_TCP_ADDR": "10.0.0.11",
    "MAINSTAY_POST_OFFICE_SERVICE_HOST": "10.0.0.12",
    "MAINSTAY_POST_OFFICE_PORT": "tcp://10.0.0.12:80",
    "MAINSTAY_SERVICE_HOST": "10.0.0.13",
    "MAINSTAY_PORT": "tcp://10.0.0.13:80",
}


def test_a_service_named_like_a_package_does_not_stop_a_start(monkeypatch):
    """Kubernetes tells every container of a namespace about every Service in it."""
    for name, value in KUBERNETES.items():
        monkeypatch.setenv(name, value)
    assert PostSettings() == PostSettings(batch_size=PostSettings().batch_size)
    assert [name for name in stray_variables() if name in KUBERNETES] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("MAINSTAY_POST_PORT", "8080"), ("MAINSTAY_POST_HTP_PORT", "9000"), ("MAINSTAY_POST_SERVICE_NAME", "orders")],
)
def test_a_mistake_that_looks_like_a_service_is_still_one(name, value, monkeypatch):
    """Only the names that Kubernetes makes, with the values that it gives them, are passed over."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=f"{name} is not a setting"):
        PostSettings()


def test_the_origin_of_a_value(monkeypatch):
    """Code, the variable by its name, or the default; code goes before the environment; equality is by value."""
    monkeypatch.setenv("MAINSTAY_POST_BATCH_SIZE", "7")
    read, passed = PostSettings(), PostSettings(batch_size=7)
    assert read.origin("batch_size") == "MAINSTAY_POST_BATCH_SIZE"
    assert passed.origin("batch_size") == "code"
    assert read == passed
    monkeypatch.delenv("MAINSTAY_POST_BATCH_SIZE")
    assert PostSettings().origin("batch_size") == "default"
