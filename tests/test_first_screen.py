"""What a newcomer meets first: the two commands of the README in a fresh clone, and the service that it shows."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

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
    # One package stands for all of them: this very test is part of the whole.
    for command in (["make", "demo"], ["make", "test", "PACKAGE=core"]):
        done = subprocess.run(command, cwd=clone, env=_environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    left = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True)
    assert left.stdout == ""


@contextmanager
def _service(directory: Path) -> Iterator[tuple[str, Path]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    output = directory / "output.txt"
    with output.open("a") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "service:api", "--port", str(port)],
            cwd=directory,
            env=_environment(),
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + 30
        while True:
            assert process.poll() is None, output.read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < end, output.read_text()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}", output
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(timeout=30)
        finally:
            process.kill()
            process.wait()
    # uvicorn re-raises the signal after a graceful stop.
    assert status in {0, -signal.SIGTERM}, output.read_text()


def test_the_service_of_the_readme_runs_as_written(tmp_path: Path):
    """Typed from the README into an empty directory, the service answers, delivers its event, and stops in order."""
    found = re.search(r"<!-- file: service\.py -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found is not None
    code = [line for line in found[1].splitlines() if line.strip()]
    assert len(code) <= 22, "it is called a service in 20 lines"
    (tmp_path / "service.py").write_text(found[1])
    order = "018f2d5e-0000-7000-8000-000000000001"
    with _service(tmp_path) as (address, output):
        answer = httpx.post(f"{address}/orders/{order}/payment", params={"amount": "12.50"})
        assert answer.status_code == 200, f"{answer.text}\n{output.read_text()}"
        end = time.monotonic() + 30
        while f"a receipt over 12.50 for order {order}" not in output.read_text():
            assert time.monotonic() < end, output.read_text()
            time.sleep(0.05)
    assert output.read_text().count("a receipt over") == 1
