"""What a newcomer meets first: the two commands of the README in a fresh clone, and the service that it shows."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def _environment() -> dict[str, str]:
    """Return an environment that knows nothing of this checkout; the run's servers stay named."""
    ours = ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PACKAGE", "COVERAGE_FILE")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {
        name: value
        for name, value in kept.items()
        if not name.startswith("MAINSTAY_") or name.startswith("MAINSTAY_TEST_")
    }


def test_both_commands_of_the_readme_run_in_a_fresh_clone(tmp_path: Path):
    """In a clone of what is committed, `make demo` and `make test` do all their set-up and leave nothing behind."""
    first_screen = README.splitlines()[:40]
    assert [line.split("#")[0].strip() for line in first_screen if line.startswith("make ")] == [
        "make demo",
        "make test",
    ]
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    # One package stands for all of them, the quickest: this very test is part of the whole.
    for command in (["make", "demo"], ["make", "test", "PACKAGE=observability"]):
        done = subprocess.run(command, cwd=clone, env=_environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    left = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True)
    assert left.stdout == ""


ORDER = "018f2d5e-0000-7000-8000-000000000001"
RECEIPT = f"a receipt over 12.50 for order {ORDER}"


def _wait_for(condition: Callable[[], bool], output: Path) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, output.read_text()
        time.sleep(0.05)


class _Service:
    """The README's service under uvicorn, in a directory of its own."""

    def __init__(self, directory: Path, **settings: str) -> None:
        found = re.search(r"<!-- file: service\.py -->\n```python\n(.*?)```", README, re.DOTALL)
        assert found is not None
        self.code = found[1]
        self.directory = directory
        self.environment = _environment() | settings
        self.output = directory / "output.txt"
        (directory / "service.py").write_text(self.code)

    def start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        with self.output.open("a") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "uvicorn", "service:api", "--port", str(self.port)],
                cwd=self.directory,
                env=self.environment,
                stdout=sink,
                stderr=subprocess.STDOUT,
            )
        _wait_for(self._listening, self.output)

    def _listening(self) -> bool:
        assert self.process.poll() is None, self.output.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def pay(self) -> None:
        url = f"http://127.0.0.1:{self.port}/orders/{ORDER}/payment"
        answer = httpx.post(url, params={"amount": "12.50"}, timeout=30)
        assert answer.status_code == 200, f"{answer.text}\n{self.output.read_text()}"

    def stop(self) -> None:
        self.process.terminate()
        # uvicorn raises the signal again after a graceful stop.
        assert self.process.wait(timeout=60) in {0, -signal.SIGTERM}, self.output.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[_Service]:
    """The service, embedded, and gone after the test."""
    made = _Service(tmp_path)
    made.start()
    yield made
    made.kill()


def test_the_service_of_the_readme_runs_as_written(service: _Service):
    """Typed from the README into an empty directory, the service answers, delivers its event, and stops in order."""
    assert len([line for line in service.code.splitlines() if line.strip()]) <= 20
    service.pay()
    _wait_for(lambda: RECEIPT in service.output.read_text(), service.output)
    service.stop()
    assert service.output.read_text().count(RECEIPT) == 1


def test_the_service_of_the_readme_survives_a_kill(service: _Service):
    """Killed right after its answer, the service has the event: if the receipt was not printed, the next start does."""
    service.pay()
    service.kill()
    service.start()
    _wait_for(lambda: RECEIPT in service.output.read_text(), service.output)


def test_the_service_of_the_readme_runs_on_kafka_and_postgresql(tmp_path: Path, kafka: str, postgres: str):
    """The same file on the real engines, with the settings and the command that the README names."""
    settings = {
        "MAINSTAY_DATABASE_URL": postgres,
        "MAINSTAY_EVENTS_TRANSPORT": "kafka",
        "MAINSTAY_EVENTS_KAFKA_SERVERS": kafka,
        "MAINSTAY_EVENTS_SOURCE": "orders",
    }
    assert all(f"{name}=" in README for name in settings)
    assert "mainstay db upgrade && uvicorn service:api" in README
    made = _Service(tmp_path, **settings)
    command = str(Path(sys.executable).parent / "mainstay")
    subprocess.run([command, "db", "upgrade"], cwd=tmp_path, env=made.environment, check=True, capture_output=True)
    made.start()
    try:
        made.pay()
        _wait_for(lambda: RECEIPT in made.output.read_text(), made.output)
        made.stop()
    finally:
        made.kill()
