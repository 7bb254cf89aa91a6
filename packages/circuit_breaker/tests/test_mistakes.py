"""Mistakes in breakers and their settings are errors of `App(…)`: nothing is started here."""

from collections.abc import Callable

import pytest

from mainstay.circuit_breaker import (
    BreakerConfig,
    CircuitBreaker,
    CircuitBreakerModule,
    CircuitBreakerSettings,
    KeyedBreaker,
    Pipeline,
    Timeout,
)
from mainstay.core import App, ConfigurationError


def app(*parts: CircuitBreaker | KeyedBreaker | Pipeline, **settings: object) -> App:
    root = CircuitBreakerModule.for_root(CircuitBreakerSettings.model_validate(settings))
    return App(root, CircuitBreakerModule.for_feature(*parts))


P = CircuitBreaker("p")

MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: app(P, CircuitBreaker("p")), "two breakers are called 'p': give one another name"),
    (lambda: app(P, KeyedBreaker("p", key=str)), "two breakers are called 'p'"),
    (lambda: app(P, breakers={"q": BreakerConfig()}), "configures 'q', but the features bring 'p'"),
    (lambda: app(P, breakers={"p": {"failure_ratio": 1.5}}), r"failure_ratio: .*less than or equal to 1"),
    (lambda: app(P, breakers={"p": {"failure_ratoi": 0.5}}), "failure_ratoi"),
    (lambda: app(P, P), "was given .* twice"),
    (lambda: CircuitBreakerModule.for_feature(Timeout(1)), "for_feature takes .*, not Timeout"),  # type: ignore[arg-type]  # that is the test
    (lambda: App(CircuitBreakerModule.for_feature(P)), "is there without its root: add CircuitBreakerModule.for_root"),
]


@pytest.mark.parametrize(("build", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_a_mistake_is_named_when_the_app_is_constructed(build: Callable[[], object], message: str) -> None:
    """With the breaker, and the line to write."""
    with pytest.raises(ConfigurationError, match=message):
        build()


def test_one_breaker_may_stand_in_several_pipelines() -> None:
    """It is one object, so there is nothing to mix up."""
    app(P, Pipeline("one", P), Pipeline("two", P))
