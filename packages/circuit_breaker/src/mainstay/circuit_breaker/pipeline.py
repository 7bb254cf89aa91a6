"""Several policies around one call, in a stated order."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

from mainstay.circuit_breaker.breaker import CircuitBreaker, KeyedBreaker
from mainstay.circuit_breaker.errors import HarmfulOrderWarning
from mainstay.circuit_breaker.hedge import Hedge
from mainstay.circuit_breaker.limits import Budget
from mainstay.circuit_breaker.policy import Layer, Policy
from mainstay.circuit_breaker.retries import IsWell, Retries
from mainstay.core import Retry

__all__ = ["Pipeline"]

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
    ("rate_limit", "hedge", "the second attempt is not counted", "put the rate limit inside the hedge"),
    ("retry", "retry", "attempts multiply, three of three are nine", "leave one of them out"),
    ("budget", "retry", "the budget sees one outcome for all attempts of a call", "put the budget inside the retry"),
    ("hedge", "retry", "both attempts retry, each for itself", "put the hedge inside the retry"),
    ("chaos", "breaker", "the breaker does not see the faults", "put the chaos innermost"),
    ("bulkhead", "fallback", "a place stays taken while a fallback answers", "put the fallback outermost"),
    ("rate_limit", "fallback", "what the rate limit rejects is not answered", "put the fallback outermost"),
    ("budget", "fallback", "the budget counts the fallback as an answer", "put the fallback outermost"),
    ("hedge", "fallback", "the first attempt to fail wins with its fallback", "put the fallback outermost"),
    ("chaos", "fallback", "the faults are not answered", "put the fallback outermost"),
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
        ValueError: no policy at all, or one that stands in it twice.

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
        self._order: list[Policy] = [member for policy in self.policies for member in policy._members()]
        for index, policy in enumerate(self._order):
            if any(policy is other for other in self._order[:index]):
                msg = (
                    f"Pipeline({name!r}) has {policy!r} twice, and twice around one call it stands in its own way: "
                    f"leave one out, or make two"
                )
                raise ValueError(msg)
        for problem in _harm(self._order):
            warnings.warn(f"Pipeline({name!r}): {problem}", HarmfulOrderWarning, stacklevel=2)

    def __repr__(self) -> str:
        return f"<Pipeline {self.name!r} {' → '.join(type(policy).__name__ for policy in self._order)}>"

    def breakers(self) -> Sequence[CircuitBreaker | KeyedBreaker]:
        """The breakers in it."""
        return [policy for policy in self._order if isinstance(policy, CircuitBreaker | KeyedBreaker)]

    def _members(self) -> Sequence[Policy]:
        return self._order

    def _layers(self) -> tuple[Layer, ...]:
        layers: list[Layer] = []
        for index, policy in enumerate(self._order):
            if isinstance(policy, Retries | Budget | Hedge):
                is_well = _is_well(self._order[index:])
                if isinstance(policy, Retries | Budget):
                    layers.append(policy._layer(is_well))
                else:
                    outer = [other.budget for other in self._order[:index] if isinstance(other, Retries)]
                    layers.append(policy._layer(is_well, deposits=policy.budget not in outer))
            else:
                layers.extend(policy._layers())
        return tuple(layers)


def _is_well(inside: Sequence[Policy]) -> IsWell:
    circuits = [policy.circuit for policy in inside if isinstance(policy, CircuitBreaker)]
    keyed = [policy for policy in inside if isinstance(policy, KeyedBreaker)]

    def is_well(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if any(circuit.window is None for circuit in circuits):
            return False
        return all(breaker[breaker.key(*args, **kwargs)].window is not None for breaker in keyed)

    return is_well


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
        if outer in kinds and inner in kinds[kinds.index(outer) + 1 :]:
            problems.append(f"{outer} stands around {inner}: {harm}; {remedy}")
    return problems
