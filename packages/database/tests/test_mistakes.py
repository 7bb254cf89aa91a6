"""Mistakes in the configuration of the database are errors of `App(…)`: nothing is started here."""

from collections.abc import Callable

import pytest

from mainstay.core import App, ConfigurationError
from mainstay.database import DatabaseModule, DatabaseSettings

PASSWORD = "hunter2"


def app(**settings: object) -> App:
    return App(DatabaseModule.for_root(DatabaseSettings.model_validate(settings)))


MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: app(url=f"mysql://app:{PASSWORD}@host/app"), "mysql is not supported: use sqlite"),
    (lambda: app(url=f"{PASSWORD} is no URL"), "is no database URL: write sqlite"),
    (lambda: app(url=f"postgresql://app:{PASSWORD}@x@host/app"), "percent-encode the password"),
    (lambda: app(url=f"postgresql://app:{PASSWORD}@host/app?sslmod=on"), "sslmod"),
    (lambda: app(pool_size=0), "pool_size"),
    (lambda: App(DatabaseModule.for_root(), DatabaseModule.for_root()), "for_root appears twice"),
    (lambda: DatabaseModule.for_feature(object()), "takes .*, not object"),  # type: ignore[arg-type]  # that is the test
]


@pytest.mark.parametrize(("build", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_a_mistake_is_named_when_the_app_is_constructed(build: Callable[[], object], message: str) -> None:
    """With the remedy, and never with the password."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        build()
    assert PASSWORD not in str(caught.value)


def test_the_dialect_is_known_before_anything_connects() -> None:
    """Other modules decide by it."""
    assert DatabaseSettings().dialect == "sqlite"
    assert DatabaseSettings.model_validate({"url": "postgres://app@host/app"}).dialect == "postgresql"


def test_a_description_has_the_address_without_its_secrets() -> None:
    """The setting is a secret as a whole; where the database is, is none."""
    settings = DatabaseSettings.model_validate(
        {"url": f"postgresql://app:{PASSWORD}@host/app?application_name=x&options=-c%20role%3D{PASSWORD}"}
    )
    module = DatabaseModule.for_root(settings)
    assert module.describe() == {"address": ["postgresql+asyncpg://app:***@host/app"]}
