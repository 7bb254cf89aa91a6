"""What application code writes type-checks, and what it gets wrong does not."""

import subprocess
import sys
from pathlib import Path

import pytest

_HEADER = """
from collections.abc import AsyncIterator
from typing import assert_type
from mainstay.circuit_breaker import (
    Bulkhead, BreakerConfig, CircuitBreaker, CircuitBreakerModule, CircuitBreakerService, CircuitBreakerSettings,
    KeyedBreaker, OperationConfig, Pipeline, Timeout, in_thread,
)
from mainstay.core import App, Retry

payments = CircuitBreaker("payments", BreakerConfig(failure_ratio=0.3))
guarded = Pipeline("payments", Timeout(10), Retry(attempts=3), payments, Bulkhead(20))


@payments
async def charge(order: str, cents: int = 1) -> float:
    return cents / 100


@guarded
def look_up(order: str) -> bytes:
    return order.encode()


@payments
async def statements(order: str) -> AsyncIterator[str]:
    yield order


"""
_GOOD = """
async def main(app: App) -> None:
    assert_type(await charge("a"), float)
    assert_type(look_up("a"), bytes)
    async for month in statements("a"):
        assert_type(month, str)
    assert_type(await guarded.call(charge, "a", cents=2), float)
    assert_type(payments.call_sync(look_up, "a"), bytes)
    async with payments as entered:
        assert_type(entered, CircuitBreaker)
    service = app.get(CircuitBreakerService)
    assert_type(await service.execute(lambda: charge("a"), OperationConfig(name="charge")), float)
    CircuitBreakerModule.for_root(CircuitBreakerSettings())
    CircuitBreakerModule.for_feature(payments, guarded, KeyedBreaker("hosts", key=lambda host: host))
"""
_BAD = {
    "a wrong argument of what was decorated": "async def main() -> None:\n    await charge(1)\n",
    "a missing argument of what was decorated": "async def main() -> None:\n    await charge()\n",
    "a result of another type": 'async def main() -> None:\n    text: str = await charge("a")\n',
    "a result that nobody awaits": 'async def main() -> None:\n    cents: float = charge("a")\n',
    "a wrong argument of what is called": "async def main() -> None:\n    await payments.call(charge, 1)\n",
    "a plain function where one to await belongs": 'async def main() -> None:\n    await payments.call(look_up, "a")\n',
    "a configuration where the name belongs": "CircuitBreaker(BreakerConfig())\n",
    "a threshold that there is not": "BreakerConfig(failure_rate=0.5)\n",
    "something that is no policy": 'Pipeline("payments", payments, 10)\n',
    "a feature that is no breaker": "CircuitBreakerModule.for_feature(charge)\n",
    "the settings of something else": "CircuitBreakerModule.for_root(BreakerConfig())\n",
    "a rejection's reason by another name": (
        "from mainstay.circuit_breaker import CircuitOpen\n\n\n"
        "def why(error: CircuitOpen) -> None:\n    print(error.retry_after)\n"
    ),
}


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """The lines with errors, by case, of one run of the type checker over all of them."""
    directory = tmp_path_factory.mktemp("typing")
    cases = {"good": _GOOD, **_BAD}
    paths = {case: directory / f"case_{number}.py" for number, case in enumerate(cases)}
    for case, path in paths.items():
        path.write_text(_HEADER + cases[case])
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "mypy", "--config-file", root / "pyproject.toml", *paths.values()]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout
    lines = [line for line in output.splitlines() if ": error:" in line]
    return {case: [line for line in lines if path.name in line] for case, path in paths.items()}


def test_right_code_type_checks(findings):
    """A decorated function keeps its signature under any policy."""
    assert findings["good"] == []


@pytest.mark.parametrize("case", sorted(_BAD))
def test_wrong_code_does_not(findings, case):
    """The mistake is an error of the type checker, and the only one."""
    assert len(findings[case]) == 1, findings[case]
