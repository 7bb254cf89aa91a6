"""`CircuitBreaker` and `KeyedBreaker`: circuits with a name, rules for what counts, and listeners."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any, TypeVar, cast

from mainstay.circuit_breaker._checks import is_whole, require, require_plain
from mainstay.circuit_breaker._rules import Rules
from mainstay.circuit_breaker._verdicts import Errors, are_exceptions
from mainstay.circuit_breaker.circuit import Circuit, KeyedCircuit, use_clock, use_config
from mainstay.circuit_breaker.policy import Layer, Policy
from mainstay.circuit_breaker.settings import BreakerConfig
from mainstay.circuit_breaker.states import CircuitSnapshot, State, StateChange
from mainstay.core import SYSTEM_CLOCK, Binding, Clock

__all__ = ["CircuitBreaker", "KeyedBreaker"]

L = TypeVar("L", bound=Callable[[StateChange], object])

_log = logging.getLogger("mainstay.circuit_breaker")


class _Ruled(Policy):
    """What both kinds of breaker have: rules, listeners, reload, and at most one App."""

    rules: Rules
    _binding: Binding[object] | None = None  # made when an App first wants it: most breakers of a test never meet one

    def _rule(
        self,
        name: str,
        config: BreakerConfig | None,
        *,
        failures: Errors,
        answers: Errors,
        failed_result: Callable[[Any], bool] | None,
        clock: Clock,
    ) -> Rules:
        if not (isinstance(cast("object", name), str) and name):  # `@CircuitBreaker` without a name passes a function
            msg = f"a breaker's name is a non-empty string, not {name!r}: write CircuitBreaker('payments')"
            raise TypeError(msg)
        for field, kinds in (("failures", failures), ("answers", answers)):
            if not are_exceptions(kinds):
                msg = f"CircuitBreaker({name!r}): {field} is a tuple of Exception classes, not {kinds!r}"
                raise TypeError(msg)
        if config is not None:
            _check_config(f"breaker {name!r}", config)
        if failed_result is not None:
            require_plain(f"CircuitBreaker({name!r})", "failed_result", failed_result)
        return Rules(name, config, failures=failures, answers=answers, failed_result=failed_result, clock=clock)

    @property
    def binding(self) -> Binding[object]:
        """The App that it belongs to, if any; it works without."""
        if self._binding is None:
            self._binding = Binding(repr(self), remedy=None)
        return self._binding

    @property
    def name(self) -> str:
        """The name, in rejections, metrics and logs."""
        return self.rules.name

    @property
    def config(self) -> BreakerConfig:
        """The configuration in force."""
        return self.rules.config

    def on_change(self, listener: L) -> L:
        """Call `listener` with every `StateChange`, on the thread whose call caused it and outside every lock.

        Usable as a decorator. What it raises is logged and reaches no caller. It must not block. `unsubscribe` ends it.

        Raises:
            TypeError: `listener` is no plain function.
        """
        require_plain(repr(self), "a listener", listener)
        with _all_lock:
            self.rules.listeners += (listener,)
        return listener

    def unsubscribe(self, listener: Callable[[StateChange], object]) -> None:
        """Call `listener` no more; nothing happens if it was not called."""
        with _all_lock, contextlib.suppress(ValueError):
            listeners = list(self.rules.listeners)
            listeners.remove(listener)
            self.rules.listeners = tuple(listeners)

    def reload(self, config: BreakerConfig) -> None:
        """Use another configuration from now on; windows, states and calls under way are kept.

        While it is open, the break's end is that of the new configuration.

        Raises:
            TypeError: `config` is no `BreakerConfig`.
        """
        _check_config(repr(self), config)
        self.rules.config = config
        for circuit in self.circuits():
            use_config(circuit)
        self._recompile()

    def circuits(self) -> Sequence[Circuit]:
        """The circuits there are now."""
        raise NotImplementedError

    def totals(self) -> dict[str, int]:
        """Calls by outcome since the breaker exists: success, failure, neutral, late, rejected."""
        return _added_up(self.circuits())

    @contextmanager
    def _bound(self, owner: object, config: BreakerConfig, clock: Clock) -> Generator[None]:
        """Belong to a running App: its configuration and its clock, for the length of the block.

        Raises:
            ConfigurationError: it belongs to another running App.
        """
        with self.binding.to(owner):
            before, clock_before = self.rules.config, self.rules.clock
            self._use(clock)
            self.reload(config)
            try:
                yield
            finally:
                self._use(clock_before)
                self.reload(before)

    def _use(self, clock: Clock) -> None:
        if clock is not self.rules.clock:
            self.rules.use(clock)
            for circuit in self.circuits():
                use_clock(circuit)

    def _shape(self) -> tuple[object, ...]:
        config = self.rules.config
        return (
            config.window_calls is None,
            config.slow_seconds is not None,
            self.rules.failed_result is not None,
        )


def _check_config(owner: str, config: object) -> None:
    if not isinstance(config, BreakerConfig):
        msg = f"{owner} is configured by a BreakerConfig, not {config!r}: write BreakerConfig(failure_ratio=0.3)"
        raise TypeError(msg)


OUTCOMES = ("success", "failure", "neutral", "late", "rejected")


def _added_up(circuits: Sequence[Circuit]) -> dict[str, int]:
    success = failure = neutral = late = rejected = 0
    for circuit in circuits:  # plain additions: there may be a hundred thousand
        each = circuit._outcomes()
        success += each[0]
        failure += each[1]
        neutral += each[2]
        late += each[3]
        rejected += each[4]
    return dict(zip(OUTCOMES, (success, failure, neutral, late, rejected), strict=True))


class CircuitBreaker(_Ruled):
    """A circuit breaker for one dependency: decorates functions, runs callables, guards blocks, stands in a `Pipeline`.

    Args:
        name: names the dependency, in rejections, metrics and logs; a handful of names, never one for each user.
        config: when it opens and how it recovers. Without one, what the App's settings say, else `BreakerConfig()`.
        failures: exceptions that count against the dependency. By default every `Exception` but a `MainstayError` whose
            code begins with VAL_, BIZ_, AUTH_ or RES_: who refuses a wrong request, works.
        answers: exceptions that count like a result, although they are among `failures`.
        failed_result: says of a result whether it is a failure, for example `lambda response: response.status >= 500`.
        clock: measures time; tests pass a `VirtualClock`. A running App's clock replaces it.

    Raises:
        TypeError: a name that is no string, exceptions that are none, a `config` or `failed_result` of another kind.

    A cancellation counts as a failure if a deadline of ours caused it, and not at all if the caller went away. It is
    safe to use from any number of threads and event loops at the same time.
    """

    def __init__(
        self,
        name: str,
        config: BreakerConfig | None = None,
        *,
        failures: Errors = (Exception,),
        answers: Errors = (),
        failed_result: Callable[[Any], bool] | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.rules = self._rule(
            name, config, failures=failures, answers=answers, failed_result=failed_result, clock=clock
        )
        self.circuit = Circuit(self.rules)
        _register(self)

    def __repr__(self) -> str:
        return f"<CircuitBreaker {self.name!r} {self.state}>"

    def circuits(self) -> Sequence[Circuit]:
        """Its one circuit."""
        return (self.circuit,)

    @property
    def state(self) -> State:
        """The state of its circuit."""
        return self.circuit.state

    @property
    def reason(self) -> str:
        """Why it is in this state."""
        return self.circuit.reason

    def snapshot(self) -> CircuitSnapshot:
        """Everything about its circuit, consistent in itself."""
        return self.circuit.snapshot()

    def force_open(self, reason: str = "forced open by hand", *, retry_after_seconds: float | None = None) -> None:
        """Reject every call until `reset`; see `Circuit.force_open`."""
        self.circuit.force_open(reason, retry_after_seconds=retry_after_seconds)

    def disable(self, reason: str = "disabled by hand") -> None:
        """Let every call through and draw no conclusion from its outcome, until `reset`."""
        self.circuit.disable(reason)

    def reset(self, reason: str = "reset by hand") -> None:
        """Close with an empty window."""
        self.circuit.reset(reason)

    def trip(self, reason: str) -> None:
        """Open as if a threshold had been passed; see `Circuit.trip`."""
        self.circuit.trip(reason)

    def _layers(self) -> tuple[Layer, ...]:
        circuit = self.circuit
        names: dict[str, object] = {
            "circuit": circuit,
            "admit": circuit._admit,
            "rejection": circuit._rejection,
            "name": self.rules.name,
            "raised": circuit._raised,
            "succeeded": circuit._succeeded,
            "failed": circuit._failed,
            "turn": circuit._turn,
            "was_slow": circuit._was_slow,
            "now": self.rules.now,
            "limit": self.rules.config.slow_seconds or inf,  # calls under way with older code compare with it
            "bad": self.rules.failed_result,
        }
        return (Layer("breaker", self._shape(), self, names),)


class KeyedBreaker(_Ruled):
    """A circuit for each key: each host, each tenant, each shard.

    Args:
        name, config, failures, answers, failed_result, clock: as for `CircuitBreaker`, shared by all circuits.
        key: gets the arguments of the call and returns its key, something hashable: `key=lambda url, **_: url.host`.
        max_keys: how many circuits there are at most. At the bound, one without calls under way and with nothing to
            remember makes room. Where there is none, new keys share a single spare circuit: memory stays bounded, and
            no open circuit is forgotten. >= 1

    Raises:
        TypeError: `key` is no plain function; and as for `CircuitBreaker`.
        ValueError: `max_keys` is no number, or below 1.
    """

    def __init__(
        self,
        name: str,
        config: BreakerConfig | None = None,
        *,
        key: Callable[..., object],
        max_keys: int = 10_000,
        failures: Errors = (Exception,),
        answers: Errors = (),
        failed_result: Callable[[Any], bool] | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        owner = f"KeyedBreaker({name!r})"
        require(owner, "max_keys", max_keys, "1 or more", holds=is_whole(max_keys) and max_keys >= 1)
        self.rules = self._rule(
            name, config, failures=failures, answers=answers, failed_result=failed_result, clock=clock
        )
        require_plain(owner, "key", key)
        self.key = key
        self.max_keys = max_keys
        self._circuits: dict[object, KeyedCircuit] = {}
        self._spare: KeyedCircuit | None = None
        self._gone = dict.fromkeys(OUTCOMES, 0)  # what forgotten circuits had counted
        self._lock = threading.Lock()
        _register(self)

    def __repr__(self) -> str:
        return f"<KeyedBreaker {self.name!r} with {len(self._circuits)} keys>"

    def __len__(self) -> int:
        return len(self._circuits)

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, key: object) -> KeyedCircuit:
        """The circuit of `key`, made if there is none."""
        circuit = self._circuits.get(key)
        return self._make(key) if circuit is None else circuit

    def __contains__(self, key: object) -> bool:
        return key in self._circuits

    def circuits(self) -> Sequence[KeyedCircuit]:
        """The circuits there are now, the spare one last."""
        with self._lock:
            return self._present()

    def totals(self) -> dict[str, int]:
        """Calls by outcome since the breaker exists, forgotten circuits included."""
        with self._lock:  # a circuit forgotten after this is counted here still, as it was
            circuits, gone = self._present(), dict(self._gone)
        present = _added_up(circuits)
        return {outcome: present[outcome] + gone[outcome] for outcome in OUTCOMES}

    def _present(self) -> Sequence[KeyedCircuit]:
        return (*self._circuits.values(), *(() if self._spare is None else (self._spare,)))

    def _hold(self, key: object) -> KeyedCircuit:
        """The circuit of `key`, with one more call under way."""
        while not (circuit := self[key])._hold():
            pass  # forgotten a moment ago: the key gets another
        return circuit

    def _make(self, key: object) -> KeyedCircuit:
        with self._lock:
            circuit = self._circuits.get(key)
            if circuit is None:
                if len(self._circuits) >= self.max_keys and not self._make_room():
                    if self._spare is None:
                        self._spare = _Shared(self.rules, "(others)")
                        _log.warning(
                            "breaker %s: all %d keys remember failures or have calls under way; new ones share a "
                            "circuit",
                            self.name,
                            self.max_keys,
                        )
                    return self._spare
                circuit = self._circuits[key] = KeyedCircuit(self.rules, key)
            return circuit

    def _make_room(self) -> bool:
        """Forget one circuit that has nothing to remember; a bounded search, so that a call never pays for all keys."""
        kept: list[tuple[object, KeyedCircuit]] = []
        candidates = iter(self._circuits.items())
        victim: tuple[object, KeyedCircuit] | None = None
        harmless: tuple[object, KeyedCircuit] | None = None
        for _, (key, circuit) in zip(range(_SEARCH), candidates, strict=False):
            if circuit._forget(strict=True):
                victim = key, circuit
                break
            if harmless is None and circuit._is_forgettable():
                harmless = key, circuit
            kept.append((key, circuit))
        for key, circuit in kept:  # the next search begins after them
            del self._circuits[key]
            self._circuits[key] = circuit
        if victim is None and harmless is not None and harmless[1]._forget(strict=False):
            victim = harmless
        if victim is None:
            return False
        key, circuit = victim
        del self._circuits[key]
        for outcome, value in zip(OUTCOMES, circuit._outcomes(), strict=True):
            self._gone[outcome] += value
        return True

    def _layers(self) -> tuple[Layer, ...]:
        names: dict[str, object] = {
            "key": self.key,
            "name": self.rules.name,
            "get": self._circuits.get,
            "hold": self._hold,
            "now": self.rules.now,
            "limit": self.rules.config.slow_seconds or inf,  # calls under way with older code compare with it
            "bad": self.rules.failed_result,
        }
        return (Layer("keyed_breaker", self._shape(), self, names),)


class _Shared(KeyedCircuit):
    """The circuit of all keys beyond the bound."""

    __slots__ = ()

    def _move(self, to: State, reason: str, come_back_seconds: float | None = None) -> None:
        if to is not State.CLOSED:
            msg = (
                f"this circuit of breaker {self.rules.name!r} is shared by all keys beyond max_keys, so that none of "
                f"them can be forced by itself: reset a key that remembers failures, or raise max_keys"
            )
            raise RuntimeError(msg)
        super()._move(to, reason, come_back_seconds)


_SEARCH = 32
"""How many circuits are looked at for one that can be forgotten."""

_all: weakref.WeakSet[CircuitBreaker | KeyedBreaker] = weakref.WeakSet()
_all_lock = threading.Lock()


def all_breakers() -> list[CircuitBreaker | KeyedBreaker]:
    """Every breaker of the process, by name."""
    with _all_lock:
        return sorted(_all, key=lambda breaker: breaker.name)


def _register(breaker: CircuitBreaker | KeyedBreaker) -> None:
    with _all_lock:
        _all.add(breaker)
