"""In an App: settings, binding, the service, metrics, health, history, keys."""

import asyncio
import logging

import pytest
from prometheus_client import REGISTRY
from pydantic import ValidationError

from mainstay.circuit_breaker import (
    BreakerConfig,
    Chaos,
    Circuit,
    CircuitBreaker,
    CircuitBreakerModule,
    CircuitBreakerService,
    CircuitBreakerSettings,
    CircuitOpen,
    Fault,
    KeyedBreaker,
    OperationConfig,
    Pipeline,
    State,
    StateChange,
    Timeout,
)
from mainstay.circuit_breaker.testing import Dependency, forced
from mainstay.core import App, ConfigurationError, Retry
from mainstay.core.testing import VirtualClock


class Boom(Exception):
    pass


def module(*parts, **settings):
    """What an App is made of."""
    return (
        CircuitBreakerModule.for_root(CircuitBreakerSettings(**settings)),
        CircuitBreakerModule.for_feature(*parts),
    )


async def test_the_environment_configures_what_code_left_open(
    clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name beats the code, the code beats the defaults; after the App everything is as it was."""
    monkeypatch.setenv("MAINSTAY_CIRCUIT_BREAKER_DEFAULTS", '{"minimum_calls": 7}')
    monkeypatch.setenv("MAINSTAY_CIRCUIT_BREAKER_BREAKERS", '{"named": {"failure_ratio": 0.3, "slow_seconds": 2}}')
    named = CircuitBreaker("named", BreakerConfig(minimum_calls=3))
    coded = CircuitBreaker("coded", BreakerConfig(minimum_calls=4))
    plain = CircuitBreaker("plain")
    guarded = Pipeline("p", Timeout(1), plain)
    app = App(
        CircuitBreakerModule.for_root(),
        CircuitBreakerModule.for_feature(named, coded),
        CircuitBreakerModule.for_feature(guarded),
        clock=clock,
    )
    async with app:
        assert named.config == BreakerConfig(failure_ratio=0.3, slow_seconds=2)
        assert coded.config.minimum_calls == 4
        assert plain.config.minimum_calls == 7
        assert named.rules.clock is clock
        await guarded.call(Dependency())
        assert app.get(CircuitBreakerService).get_metrics("plain")["success"] == 1
    assert (named.config.minimum_calls, plain.config) == (3, BreakerConfig())
    assert named.rules.clock is not clock


async def test_a_breaker_belongs_to_one_running_app() -> None:
    """A second App that wants it is refused while the first one runs."""
    breaker = CircuitBreaker("p")
    async with App(*module(breaker)):
        with pytest.raises(ConfigurationError, match="belongs to an App that is already running"):
            async with App(*module(breaker)):
                pass
    async with App(*module(breaker, Pipeline("p", breaker))):
        pass


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"failure_ratio": 1.5}, "failure_ratio\n.*less than or equal to 1"),
        ({"failure_ratio": 0}, "failure_ratio\n.*greater than 0"),
        ({"minimum_calls": 0}, "minimum_calls\n.*greater than or equal to 1"),
        ({"break_seconds": -1}, "break_seconds\n.*greater than 0"),
        ({"window_seconds": float("inf")}, "window_seconds\n.*less than inf"),
        ({"ramp_seconds": float("nan")}, "ramp_seconds"),
        ({"break_jitter": 1}, "break_jitter\n.*less than 1"),
        ({"failure_rate": 0.5}, "failure_rate\n.*not permitted"),
        ({"break_seconds": 90}, r"max_break_seconds \(60\) is below break_seconds \(90\)"),
        ({"failure_ratio": None}, "nothing can open it: set failure_ratio"),
        ({"window_calls": 5}, r"minimum_calls \(10\) can never be reached in a window of window_calls=5"),
    ],
)
def test_impossible_settings_are_refused_with_field_and_range(values: dict[str, object], message: str) -> None:
    """At definition, not at the first outage."""
    with pytest.raises(ValidationError, match=message):
        BreakerConfig.model_validate(values)


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown variable under the prefix, and a bad value inside a JSON one, name the variable."""
    monkeypatch.setenv("MAINSTAY_CIRCUIT_BREAKER_BREAKER", "{}")
    with pytest.raises(ConfigurationError, match="did you mean MAINSTAY_CIRCUIT_BREAKER_BREAKERS"):
        CircuitBreakerModule.for_root()
    monkeypatch.delenv("MAINSTAY_CIRCUIT_BREAKER_BREAKER")
    monkeypatch.setenv("MAINSTAY_CIRCUIT_BREAKER_BREAKERS", '{"p": {"failure_ratio": 3}}')
    with pytest.raises(ConfigurationError, match=r"breakers\.p\.failure_ratio"):
        CircuitBreakerModule.for_root()


def calls_metric(name: str, outcome: str) -> float | None:
    return REGISTRY.get_sample_value("mainstay_circuit_breaker_calls_total", {"breaker": name, "outcome": outcome})


async def test_metrics_tell_outcomes_transitions_and_states(clock: VirtualClock) -> None:
    """A scrape reads what the breaker counted, of all breakers of one name together; keys are no labels."""
    first = CircuitBreaker("metered", BreakerConfig(minimum_calls=3), clock=clock)
    second = CircuitBreaker("metered", clock=clock)
    hosts = KeyedBreaker("metered hosts", key=lambda host: host, clock=clock)
    await first.call(Dependency())
    await second.call(Dependency())
    for _ in range(2):
        with pytest.raises(Boom):
            await first.call(Dependency(Boom))
    with pytest.raises(CircuitOpen):
        await first.call(Dependency())
    guarded = hosts(Dependency())
    for host in ("a", "b", "a"):
        await guarded(host)
    assert [calls_metric("metered", outcome) for outcome in ("success", "failure", "neutral", "late", "rejected")] == [
        *(2, 2, 0, 0, 1)
    ]
    assert calls_metric("metered hosts", "success") == 3
    labels = {"breaker": "metered", "to": "open"}
    assert REGISTRY.get_sample_value("mainstay_circuit_breaker_transitions_total", labels) == 1
    states = {
        state: REGISTRY.get_sample_value("mainstay_circuit_breaker_circuits", {"breaker": "metered", "state": state})
        for state in ("open", "closed", "ramping")
    }
    assert states == {"open": 1, "closed": 1, "ramping": 0}
    assert (
        REGISTRY.get_sample_value("mainstay_circuit_breaker_circuits", {"breaker": "metered hosts", "state": "closed"})
        == 2
    )


def test_metric_names_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand names become as many labels as allowed, and one for the rest."""
    from mainstay.circuit_breaker import _metrics

    monkeypatch.setattr(_metrics, "MAX_NAMES", 5)
    breakers = [CircuitBreaker(f"dynamic {number}") for number in range(50)]
    collector = _metrics._Collector()
    families = {family.name: family for family in collector.collect()}
    names = {sample.labels["breaker"] for sample in families["mainstay_circuit_breaker_calls"].samples}
    assert len(names) == 6
    assert "(more)" in names
    assert len(breakers) == 50


async def test_execute_and_its_neighbours(clock: VirtualClock) -> None:
    """An operation under its own breaker and retries, configured by four numbers that may change."""
    async with App(*module(CircuitBreaker("brought")), clock=clock) as app:
        service = app.get(CircuitBreakerService)
        config = OperationConfig(name="charge", failure_threshold=3, recovery_timeout=9, monitoring_period=30)
        assert await service.execute(Dependency("fine"), config) == "fine"
        for _ in range(3):
            with pytest.raises(Boom):
                await service.execute(Dependency(Boom), config)
        assert service.get_state("charge") is State.OPEN
        with pytest.raises(CircuitOpen):
            await service.execute(Dependency(), config)
        assert service.get_metrics("charge") == {"success": 1, "failure": 3, "neutral": 0, "late": 0, "rejected": 1}
        breaker = service.breaker("charge")
        assert (breaker.config.break_seconds, breaker.config.window_seconds) == (9, 30)
        await clock.advance(10)
        retried = config.model_copy(update={"retry_strategy": Retry(attempts=2, wait=lambda _: 0.0, clock=clock)})
        await service.execute(Dependency("fine"), retried)
        await service.execute(Dependency("fine"), retried)
        await clock.advance(60)
        assert await service.execute(Dependency(Boom, "fine"), retried) == "fine"
        assert service.get_state("charge") is State.CLOSED
        with pytest.raises(ValueError, match="has the name of a breaker that a feature brings"):
            await service.execute(Dependency(), OperationConfig(name="brought"))
        with pytest.raises(KeyError, match="no breaker 'refund'; there are brought, charge"):
            service.get_state("refund")
    with pytest.raises(ValidationError, match="failure_threshold"):
        OperationConfig(name="x", failure_threshold=0)


async def test_health_says_what_is_not_closed_and_what_is_rehearsed(clock: VirtualClock) -> None:
    """Open circuits and chaos degrade the service's health, and name themselves."""
    payments, hosts = CircuitBreaker("payments"), KeyedBreaker("hosts", key=str)
    chaos = Chaos("drill", Fault(1, seconds=1), clock=clock)
    async with App(*module(payments, hosts), clock=clock) as app:
        assert (await app.health())["circuit_breaker.CircuitBreakerService"].status == "ok"
        hosts["a"].disable()
        with forced(payments, State.OPEN), chaos.on(seconds=9, reason="test"):
            health = (await app.health())["circuit_breaker.CircuitBreakerService"]
            assert health.status == "degraded"
            assert health.detail == "hosts is disabled; payments is open; chaos drill injects faults"
        hosts["a"].reset()
        assert [(each.name, each.key, each.state) for each in app.get(CircuitBreakerService).snapshot()] == [
            ("hosts", "a", State.CLOSED),
            ("payments", None, State.CLOSED),
        ]


async def test_the_last_minutes_as_text(clock: VirtualClock) -> None:
    """Calls, failures, rejections and states, sampled while the App runs, drawn on one scale of time."""
    payments = CircuitBreaker("payments", BreakerConfig(minimum_calls=4, break_jitter=0, break_seconds=10))
    async with App(*module(payments, history_seconds=60, sample_seconds=5), clock=clock) as app:
        service = app.get(CircuitBreakerService)
        await asyncio.sleep(0)
        for calls, outcome in ((2, None), (8, None), (12, Boom), (5, None), (0, None)):
            for _ in range(calls):
                await asyncio.gather(payments.call(Dependency(outcome)), return_exceptions=True)
            await clock.advance(5)
        assert service.draw("payments").splitlines() == [
            "payments   open: 10 of 20 calls failed",
            "calls      ▂▆█    20",
            "failed       █    10",
            "rejected     ▃█   7",
            "state      ··###",
            "           25 s ago now",
        ]
        await clock.advance(100)
        state, ago = service.draw("payments").splitlines()[4:]
        assert (len(state), ago) == (11 + 12, "           60 s ago now")


async def test_logs_say_what_changed_and_why(clock: VirtualClock, caplog: pytest.LogCaptureFixture) -> None:
    """Opening is a warning with numbers in it and fields beside it; recovering is information."""
    breaker = CircuitBreaker("payments", BreakerConfig(consecutive_failures=2, failure_ratio=None), clock=clock)
    with caplog.at_level(logging.INFO, logger="mainstay.circuit_breaker"):
        for _ in range(2):
            with pytest.raises(Boom):
                await breaker.call(Dependency(Boom))
        breaker.reset()
    opened, closed = caplog.records
    assert (opened.levelname, opened.message) == ("WARNING", "circuit payments: open, was closed: 2 failures in a row")
    facts = ("breaker", "key", "before", "after", "reason")
    assert [getattr(opened, fact) for fact in facts] == ["payments", None, "closed", "open", "2 failures in a row"]
    assert opened.break_seconds == pytest.approx(5, rel=0.1)  # type: ignore[attr-defined]  # from extra=
    assert closed.break_seconds is None  # type: ignore[attr-defined]  # from extra=
    assert closed.levelname == "INFO"


# Keys


async def test_each_key_has_its_own_circuit(clock: VirtualClock) -> None:
    """One host that fails is rejected, the others are not; by async and plain functions, streams and callables."""
    hosts = KeyedBreaker("hosts", BreakerConfig(minimum_calls=2), key=lambda host, **_: host, clock=clock)
    heard: list[StateChange] = []
    hosts.on_change(heard.append)

    @hosts
    async def fetch(host: str, *, fail: bool = False) -> str:
        if fail:
            raise Boom
        return host

    for _ in range(2):
        with pytest.raises(Boom):
            await fetch("bad", fail=True)
    with pytest.raises(CircuitOpen, match="hosts is open"):
        await fetch("bad")
    assert await fetch("good") == "good"
    assert hosts(lambda host: host)("good") == "good"
    assert (hosts["bad"].state, hosts["good"].state, "other" in hosts, len(hosts)) == (
        State.OPEN,
        State.CLOSED,
        False,
        2,
    )
    assert (heard[0].key, heard[0].after) == ("bad", State.OPEN)
    assert repr(hosts) == "<KeyedBreaker 'hosts' with 2 keys>"
    assert hosts
    assert hosts.totals() == {"success": 2, "failure": 2, "neutral": 0, "late": 0, "rejected": 1}
    hosts.reload(BreakerConfig(slow_seconds=1, window_calls=50))
    assert hosts["bad"].state is State.OPEN
    assert await fetch("good") == "good"


async def test_when_every_key_remembers_failures_new_ones_share_a_circuit(clock: VirtualClock) -> None:
    """Memory stays bounded and no open circuit is forgotten; once one has recovered it makes room again."""
    hosts = KeyedBreaker("hosts", BreakerConfig(consecutive_failures=1), key=lambda host: host, max_keys=3, clock=clock)

    @hosts
    async def fetch(host: str) -> None:
        if host.startswith("bad"):
            raise Boom

    for host in ("bad1", "bad2", "bad3"):
        with pytest.raises(Boom):
            await fetch(host)
    await fetch("new1")
    await fetch("new2")
    assert len(hosts) == 3
    assert hosts["new1"] is hosts["new2"]
    assert [circuit.key for circuit in hosts.circuits()][-1] == "(others)"
    hosts["bad2"].reset()
    await fetch("new1")
    assert ("bad2" in hosts, "new1" in hosts) == (False, True)
    assert hosts.totals()["success"] == 3
    with pytest.raises(ValueError, match="max_keys is 0"):
        KeyedBreaker("hosts", key=str, max_keys=0)


async def test_the_shared_circuit_cannot_be_forced_for_one_key(clock: VirtualClock) -> None:
    """Beyond the bound an order for one key would meet all others: it is refused, and names the remedy."""
    hosts = KeyedBreaker("hosts", BreakerConfig(consecutive_failures=1), key=lambda host: host, max_keys=1, clock=clock)

    @hosts
    async def fetch(host: str) -> None:
        if host == "bad":
            raise Boom

    with pytest.raises(Boom):
        await fetch("bad")
    for order in (hosts["tenant 9"].force_open, hosts["tenant 9"].disable):
        with pytest.raises(RuntimeError, match="raise max_keys"):
            order()
    await fetch("tenant 10")
    hosts["tenant 9"].reset()
    hosts["bad"].reset()
    hosts["tenant 9"].force_open()  # there is room again
    with pytest.raises(CircuitOpen):
        await fetch("tenant 9")


async def test_totals_of_keys_never_go_back(clock: VirtualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A circuit that is forgotten while the totals are read is counted once, neither twice nor not at all."""
    hosts = KeyedBreaker("hosts", key=lambda host: host, max_keys=2, clock=clock)
    fetch = hosts(lambda host: host)
    for host in ("a", "b", "a", "b"):
        fetch(host)
    read = Circuit._outcomes

    def read_while_another_makes_room(circuit: Circuit) -> tuple[int, ...]:
        monkeypatch.setattr(Circuit, "_outcomes", read)
        fetch("c")
        return read(circuit)

    monkeypatch.setattr(Circuit, "_outcomes", read_while_another_makes_room)
    assert hosts.totals()["success"] == 4
    assert hosts.totals()["success"] == 5


# Changeable while running


async def test_settings_are_reloaded_while_running(clock: VirtualClock) -> None:
    """As at the start: by name beats the code, the code beats the defaults; windows stay, operations take part."""
    named, coded, plain = (
        CircuitBreaker("named", BreakerConfig(minimum_calls=3)),
        CircuitBreaker("coded", BreakerConfig(minimum_calls=4)),
        CircuitBreaker("plain"),
    )
    async with App(
        *module(named, coded, plain, breakers={"named": BreakerConfig(minimum_calls=5)}), clock=clock
    ) as app:
        service = app.get(CircuitBreakerService)
        operation = OperationConfig(name="charge")
        await service.execute(Dependency(), operation)
        for breaker in (named, coded, plain):
            await breaker.call(Dependency())
        other = CircuitBreakerSettings(
            defaults=BreakerConfig(minimum_calls=7, window_seconds=30),
            breakers={"charge": BreakerConfig(minimum_calls=8)},
        )
        service.reload(other)
        charge = service.breaker("charge")
        assert [each.config.minimum_calls for each in (named, coded, plain, charge)] == [3, 4, 7, 8]
        assert [each.calls for each in service.snapshot()] == [1, 1, 1, 1]
        await service.execute(Dependency(), operation.model_copy(update={"failure_threshold": 2}))
        assert charge.config.minimum_calls == 8  # what an operator sets beats what the code says
        with pytest.raises(ConfigurationError, match="configures 'nobody'"):
            service.reload(CircuitBreakerSettings(breakers={"nobody": BreakerConfig()}))
        with pytest.raises(ConfigurationError, match="does not change history_seconds, sample_seconds: restart"):
            service.reload(other.model_copy(update={"history_seconds": 5.0, "sample_seconds": 1.0}))
        assert plain.config.minimum_calls == 7
        service.reload(CircuitBreakerSettings())
        assert charge.config == operation.model_copy(update={"failure_threshold": 2}).breaker_config()
    assert plain.config == BreakerConfig()


async def test_listeners_of_the_service_hear_every_breaker(clock: VirtualClock) -> None:
    """Those of features, and those that `execute` makes later, until they are unsubscribed or the App stops."""
    brought = CircuitBreaker("brought")
    heard: list[str] = []
    async with App(*module(brought), clock=clock) as app:
        service = app.get(CircuitBreakerService)

        @service.on_change
        def note(change: StateChange) -> None:
            heard.append(f"{change.name} {change.after}")

        await service.execute(Dependency(), OperationConfig(name="charge"))
        charge = service.breaker("charge")
        assert isinstance(charge, CircuitBreaker)
        brought.force_open()
        charge.force_open()
        service.unsubscribe(note)
        service.unsubscribe(note)
        brought.reset()
        charge.reset()
        assert heard == ["brought forced_open", "charge forced_open"]
        service.on_change(note)
        brought.force_open()
    brought.reset()
    assert heard[2:] == ["brought forced_open"]
    brought.on_change(note)
    brought.disable()
    brought.unsubscribe(note)
    brought.reset()
    assert heard[3:] == ["brought disabled"]


@pytest.mark.parametrize("url", ["hunter2", "http://me:hunter2@host", "redis://me:hunter2/x@host:6379"])
def test_an_evidence_url_that_is_none_is_an_error_at_start(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names module, field, variable and form, before anything connects, and repeats nothing of the value."""
    monkeypatch.setenv("MAINSTAY_CIRCUIT_BREAKER_EVIDENCE_URL", url)
    with pytest.raises(ConfigurationError) as caught:
        CircuitBreakerModule.for_root()
    text = str(caught.value)
    assert text.startswith("CircuitBreakerModule.for_root: CircuitBreakerSettings.evidence_url: ")
    assert "redis://user:password@host:6379/0" in text
    assert "set MAINSTAY_CIRCUIT_BREAKER_EVIDENCE_URL" in text
    assert "hunter2" not in text + repr(caught.value)
