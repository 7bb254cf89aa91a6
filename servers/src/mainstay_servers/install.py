"""Finding the programs, installing them where that is possible, and saying how where it is not."""

import contextlib
import fcntl
import functools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

KAFKA = "4.1.1"
_POM = Path(__file__).parent / "kafka.xml"

# What a server needs, or a test beside it, by the name that each kind of system gives it.
_DEBIAN = {
    "java": "default-jre-headless",
    "mvn": "maven",
    "postgres": "postgresql",
    "redis-server": "redis-server",
    "pgbouncer": "pgbouncer",
    "kcat": "kcat",
    "prometheus": "prometheus",
    "promtool": "prometheus",
}
_BREW = {
    "java": "openjdk@17",
    "mvn": "maven",
    "postgres": "postgresql@17",
    "redis-server": "redis",
    "pgbouncer": "pgbouncer",
    "kcat": "kcat",
    "prometheus": "prometheus",
    "promtool": "prometheus",
}


class MissingServer(Exception):
    """A program is not installed and could not be installed; the message says what to do about it."""


@contextlib.contextmanager
def one_at_a_time() -> Generator[None]:
    """Hold the machine-wide turn: several test runs must not install the same thing at once."""
    with (Path(tempfile.gettempdir()) / f"mainstay-install-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(f"mainstay_servers: {text}", file=sys.stderr, flush=True)


def _remedy(program: str) -> str:
    if platform.system() == "Darwin":
        install = f"brew install {_BREW[program]}"
    elif shutil.which("apt-get"):
        install = f"sudo apt-get install -y --no-install-recommends {_DEBIAN[program]}"
    else:
        install = f"install {_DEBIAN[program]} with your system's package manager"
    return (
        f"`{program}` is not installed. Either: {install}. Or start the servers with `docker compose up -d` "
        "and set the MAINSTAY_TEST_… addresses that compose.yaml names."
    )


def _apt(program: str) -> str | None:
    """Install by apt-get as root on Debian; return the reason why not."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "only root on Debian installs by itself"
    package = _DEBIAN[program]
    _say(f"{program} is missing; installing Debian's {package} once")
    # RUNLEVEL keeps the package from starting a server of its own on the usual port.
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", package],
    ):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
        if done.returncode != 0:
            return f"`{' '.join(command)}` failed: {done.stderr.strip()[-500:]}"
    return None


def _on_path(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")


@functools.cache
def _attempt(program: str) -> str | None:
    """Install once per process, also where it fails: an attempt takes long and would fail again."""
    with one_at_a_time():
        return _apt(program)


def find(program: str, look: Callable[[str], str | None] = _on_path) -> str:
    """Return the path of `program`, installing it if need be. Raises `MissingServer` with the remedy."""
    path = look(program)
    if path is None:
        reason = _attempt(program)
        path = look(program)
        if path is None:
            msg = f"{_remedy(program)} ({reason or 'it was installed and is still not found'})"
            raise MissingServer(msg)
    return path


def kafka_jars() -> Path:
    """Return the directory with Kafka's jars, fetched once per user by Maven and kept in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mainstay"
    jars = cache / f"kafka-{KAFKA}"
    if jars.is_dir():
        return jars
    maven = find("mvn")
    with one_at_a_time():
        if jars.is_dir():  # another run fetched it while this one waited
            return jars
        cache.mkdir(parents=True, exist_ok=True)
        _say(f"fetching Apache Kafka {KAFKA} once, through Maven (45 jars, 43 MB)")
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            # The pom is copied because Maven writes beside it.
            pom = shutil.copy(_POM, Path(scratch) / "pom.xml")
            fresh = Path(scratch) / "jars"
            done = subprocess.run(
                [
                    *(maven, "-q", "-B", "-C", "-f", str(pom), f"-Dkafka.version={KAFKA}"),
                    *("dependency:copy-dependencies", f"-DoutputDirectory={fresh}"),
                ],
                capture_output=True,
                text=True,
                check=False,
                stdin=subprocess.DEVNULL,
            )
            if done.returncode != 0:
                msg = f"Maven could not fetch Apache Kafka {KAFKA}: {(done.stdout + done.stderr).strip()[-800:]}"
                raise MissingServer(msg)
            fresh.rename(jars)  # whole or not at all
    return jars
