"""Several policies around one call, in a stated order."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import cast

from mainstay.circuit_breaker._admission import Layer, Policy
from mainstay.circuit_breaker.breaker import CircuitBreaker, KeyedBreaker
from mainstay.circuit_breaker.circuit import Circuit
from mainstay.circuit_breaker.errors import HarmfulOrderWarning
from mainstay.circuit_breaker.hedge import Hedge
from mainstay.circuit_breaker.limits import Budget
from mainstay.circuit_breaker.retries import Retries
from mainstay.core import Retry

# Outer kind, inner kind, what goes wrong, what to write.
_HARMFUL = (
    ("breaker", "retry", "the breaker sees one outcome for all attempts of a call", "put the breaker inside the retry"),
    ("bulkhead", "retry", "a place stays taken while a retry waits", "put the bulkhead inside the retry"),
    ("rate_limit", "retry", "retries are not counted by the rate limit", "put the rate limit inside the retry"),
    ("bulkhead", "breaker", "calls queue for what is known to be down", "put the breaker outside the bulkhead"),
    ("rate_limit", "breaker", "calls that are rejected use up the rate", "put the breaker outside the rate limit"),
    ("breaker", "fallback", "the breaker counts the fallback as a success", "put the fallback outermost"),
    ("retry", "fallback", "a fallback leaves nothing to retry", "put the fallback outermost"),
    ("breaker", "hedge", "the breaker sees one outcome for both attempts", "put the breaker inside the hedge"),
    ("bulkhead", "hedge", "the second attempt is not counted", "put the bulkhead inside the hedge"),
)
_AS = {"keyed_breaker": "breaker", "async_fallback": "fallback"}


class Pipeline(Policy):
    """Policies around one call, outermost first.

    The order that works: `Fallback`, total `Timeout`, `Retry`, `Budget`, `Hedge`, `CircuitBreaker`, `RateLimit`,
    `Bulkhead`, `Timeout` for each attempt, `Chaos`. Any part may be missing; an order that defeats one of the policies
    gives a `HarmfulOrderWarning`.

    Args:
        name: of the dependency.
        policies: the same objects may stand in several pipelines, and then share what they count.

    Raises:
        TypeError: something that is no policy.
        ValueError: no policy at all.

    It decorates functions, runs callables with `call` and `call_sync`, and guards blocks, as each policy by itself
    does.
    """

    def __init__(self, name: str, *policies: Policy | Retry) -> None:
        if not (isinstance(cast("object", name), str) and name):  # a policy in its place is a likely slip
            msg = f"a pipeline's name is a non-empty string, not {name!r}: write Pipeline('payments', …)"
            raise TypeError(msg)
        if not policies:
            msg = f"Pipeline({name!r}) has no policies"
            raise ValueError(msg)
        self.name = name
        self.policies: tuple[Policy, ...] = tuple(_policy(name, policy) for policy in policies)
        self._order = self._resolve()
        for problem in _harm(self._order):
            warnings.warn(f"Pipeline({name!r}): {problem}", HarmfulOrderWarning, stacklevel=2)

    def __repr__(self) -> str:
        return f"<Pipeline {self.name!r} {' → '.join(type(policy).__name__ for policy in self._order)}>"

    def breakers(self) -> Sequence[CircuitBreaker | KeyedBreaker]:
        """The breakers in it."""
        return [policy for policy in self._order if isinstance(policy, CircuitBreaker | KeyedBreaker)]

    def _resolve(self) -> list[Policy]:
        order: list[Policy] = []
        for policy in self.policies:
            order.extend(policy._order if isinstance(policy, Pipeline) else (policy,))
        return order

    def _layers(self) -> tuple[Layer, ...]:
        layers: list[Layer] = []
        for index, policy in enumerate(self._order):
            if isinstance(policy, Retries | Budget | Hedge):
                inside: list[Circuit] = [other for other in self._order[index:] if isinstance(other, CircuitBreaker)]
                if isinstance(policy, Retries | Budget):
                    layers.append(policy._layer(inside))
                else:
                    outer = [other.budget for other in self._order[:index] if isinstance(other, Retries)]
                    layers.append(policy._layer(inside, deposits=policy.budget not in outer))
            else:
                layers.extend(policy._layers())
        return tuple(layers)


def _policy(name: str, policy: Policy | Retry) -> Policy:
    if isinstance(policy, Retry):
        return Retries(policy)
    if not isinstance(cast("object", policy), Policy):
        msg = f"Pipeline({name!r}) takes policies, such as Timeout(2) or CircuitBreaker('payments'), not {policy!r}"
        raise TypeError(msg)
    return policy


def _harm(order: Sequence[Policy]) -> list[str]:
    kinds = [_AS.get(kind, kind) for kind in (policy._layers()[0].kind for policy in order)]
    problems: list[str] = []
    for outer, inner, harm, remedy in _HARMFUL:
        if outer in kinds and inner in kinds[kinds.index(outer) :]:
            problems.append(f"{outer} stands around {inner}: {harm}; {remedy}")
    return problems
