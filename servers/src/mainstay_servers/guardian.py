"""A process that outlives its parent by a moment, to stop what the parent started.

A test run can die in ways that run no finalizer (SIGKILL, the out-of-memory killer, a closed terminal). The parent
tells this process, through a pipe on its standard input, which process groups it owns and which directories they
write to. The pipe ends when the parent does, however it does, and then everything still named is stopped and removed.
A parent-death signal would not do: it is Linux only, is tied to the *thread* that started the server, and removes no
files.

Lines: `+group PID SIGNAL`, `-group PID`, `+dir PATH`, `-dir PATH`.
"""

import contextlib
import os
import shutil
import signal
import sys
import time

GRACE_SECONDS = 5.0


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it exists and belongs to another user: the number was used again
        return False
    return True


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def main() -> None:
    """Follow standard input until it ends, then stop and remove what is left."""
    # Ctrl-C is the parent's to handle; this process ends when the parent has.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    groups: dict[int, int] = {}
    directories: set[str] = set()
    for line in sys.stdin:
        verb, _, rest = line.rstrip("\n").partition(" ")
        if verb == "+group":
            group, number = rest.split()
            groups[int(group)] = int(number)
        elif verb == "-group":
            groups.pop(int(rest), None)
        elif verb == "+dir":
            directories.add(rest)
        elif verb == "-dir":
            directories.discard(rest)
    for group, number in groups.items():
        _signal(group, signal.SIGCONT)  # a paused server hears nothing
        _signal(group, number)
    end = time.monotonic() + GRACE_SECONDS
    while any(map(_alive, groups)) and time.monotonic() < end:
        time.sleep(0.02)
    for group in groups:
        _signal(group, signal.SIGKILL)
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
