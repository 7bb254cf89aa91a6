"""`python -m mainstay_servers`: keep the servers for people, or for one command.

    python -m mainstay_servers                   start all, print their addresses, keep them until Ctrl-C
    python -m mainstay_servers run -- COMMAND    the same around COMMAND, which finds the addresses in its environment

An address that the environment already names is used as it is.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

from mainstay_servers.install import MissingServer
from mainstay_servers.kafka import Kafka
from mainstay_servers.postgres import Postgres
from mainstay_servers.redis import Redis


def _kafka(stack: contextlib.ExitStack) -> str:
    return stack.enter_context(Kafka()).address


def _postgres(stack: contextlib.ExitStack) -> str:
    return stack.enter_context(Postgres()).url


def _redis(stack: contextlib.ExitStack) -> str:
    return stack.enter_context(Redis()).url


_STARTERS: dict[str, Callable[[contextlib.ExitStack], str]] = {
    "MAINSTAY_TEST_KAFKA": _kafka,
    "MAINSTAY_TEST_POSTGRES": _postgres,
    "MAINSTAY_TEST_REDIS": _redis,
}


@contextlib.contextmanager
def addresses() -> Generator[tuple[dict[str, str], list[str]]]:
    """Start what the environment does not name already; yield the addresses, and what is missing and why."""
    found = {name: os.environ[name] for name in _STARTERS if os.environ.get(name)}
    missing: list[str] = []
    with contextlib.ExitStack() as stack:
        with ThreadPoolExecutor() as pool:
            starting = {name: pool.submit(start, stack) for name, start in _STARTERS.items() if name not in found}
        for name, future in starting.items():
            try:
                found[name] = future.result()
            except MissingServer as error:
                missing.append(f"{name}: {error}")
        yield found, missing


def _serve() -> int:
    with addresses() as (found, missing):
        for name in sorted(found):
            print(f"export {name}={found[name]}")
        for line in missing:
            print(f"missing: {line}", file=sys.stderr)
        print("Ctrl-C stops them.", file=sys.stderr, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                signal.pause()
    return 0


def _run(command: list[str]) -> int:
    with addresses() as (found, missing):
        for line in missing:
            print(f"missing: {line}", file=sys.stderr, flush=True)
        with subprocess.Popen(command, env=os.environ | found) as process:
            # Ctrl-C reaches the command by itself, and a `kill` is passed on; either way the servers stay until the
            # command has finished with them.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, lambda _number, _frame: process.terminate())
            return process.wait()


def main(arguments: list[str]) -> int:
    """Do as the command line says; return the exit status."""
    # A terminal that closes and a `kill` end this process as Ctrl-C does: in order.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    if not arguments:
        return _serve()
    if arguments[:2] == ["run", "--"] and arguments[2:]:
        return _run(arguments[2:])
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
