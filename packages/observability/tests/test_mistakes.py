"""Mistakes in the configuration of observability are errors of `App(…)`: nothing is started here."""

from collections.abc import Callable

import pytest

from mainstay.core import App, ConfigurationError
from mainstay.observability import ObservabilityModule, ObservabilitySettings


def app(**settings: object) -> App:
    values = {"service_name": "orders", **settings}
    return App(ObservabilityModule.for_root(ObservabilitySettings.model_validate(values)))


MISTAKES: list[tuple[Callable[[], object], str]] = [
    (
        lambda: app(readiness=["datenbank"]),
        "readiness names 'datenbank'; the parts of this App are observability",
    ),
    (ObservabilityModule.for_root, "MAINSTAY_OBSERVABILITY_SERVICE_NAME"),
    (lambda: app(service_name=""), "service_name"),
    (lambda: app(http_port=65536), "http_port"),
    (lambda: app(log_level="LOUD"), "log_level"),
    (lambda: ObservabilityModule.for_feature(object()), "takes HealthCheck, not object"),  # type: ignore[arg-type]  # that is the test
]


@pytest.mark.parametrize(("build", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_a_mistake_is_named_when_the_app_is_constructed(build: Callable[[], object], message: str) -> None:
    """With the setting, or the parts that there are."""
    with pytest.raises(ConfigurationError, match=message):
        build()


def test_a_part_of_the_app_may_make_it_not_ready() -> None:
    """By the name of its module."""
    app(readiness=["observability"])
