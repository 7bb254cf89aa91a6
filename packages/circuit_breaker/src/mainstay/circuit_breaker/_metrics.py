"""Metrics, read from the breakers' own counters at a scrape: a call pays nothing for them.

- `mainstay_circuit_breaker_calls_total{breaker, outcome}`: success, failure, neutral, late, rejected
- `mainstay_circuit_breaker_transitions_total{breaker, to}`: how often a circuit entered a state
- `mainstay_circuit_breaker_circuits{breaker, state}`: circuits in each state; 1 and zeros for a breaker without keys

Breakers of one name are added up. A breaker that is gone takes its counts with it, which Prometheus reads as a counter
that starts anew. Keys are never labels, and after `MAX_NAMES` names the rest go by `(more)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import REGISTRY, Collector

from mainstay.circuit_breaker.breaker import OUTCOMES, CircuitBreaker, KeyedBreaker, all_breakers
from mainstay.circuit_breaker.states import State

MAX_NAMES = 200


class _Collector(Collector):
    def __init__(self) -> None:
        self._names: set[str] = set()

    def describe(self) -> Iterable[Metric]:
        """Nothing: what there is to tell changes."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Add up what the breakers have counted."""
        calls: dict[tuple[str, str], int] = {}
        moves: dict[tuple[str, str], int] = {}
        states: dict[tuple[str, str], int] = {}
        for breaker in all_breakers():
            name = self._label(breaker)
            for outcome, value in breaker.totals().items():
                calls[name, outcome] = calls.get((name, outcome), 0) + value
            for state, value in zip(State, breaker.rules.moves, strict=True):
                moves[name, state] = moves.get((name, state), 0) + value
                states.setdefault((name, state), 0)
            for circuit in breaker.circuits():
                states[name, circuit.state] += 1
        calls_family = CounterMetricFamily(
            "mainstay_circuit_breaker_calls", f"Calls by outcome: {', '.join(OUTCOMES)}.", labels=("breaker", "outcome")
        )
        moves_family = CounterMetricFamily(
            "mainstay_circuit_breaker_transitions", "How often a circuit entered a state.", labels=("breaker", "to")
        )
        states_family = GaugeMetricFamily(
            "mainstay_circuit_breaker_circuits", "Circuits in each state.", labels=("breaker", "state")
        )
        for family, values in ((calls_family, calls), (moves_family, moves), (states_family, states)):
            for labels, value in values.items():
                family.add_metric(labels, value)
            yield family

    def _label(self, breaker: CircuitBreaker | KeyedBreaker) -> str:
        name = breaker.name
        if name not in self._names:
            if len(self._names) >= MAX_NAMES:
                return "(more)"
            self._names.add(name)
        return name


COLLECTOR = _Collector()
REGISTRY.register(COLLECTOR)
