"""The other side of `rows.Peers`: runs in the peers' environment, hence the standard library only."""

import asyncio
import inspect
import json
import os
import sys
from collections.abc import Awaitable, Callable, Mapping


def serve(rounds: Mapping[str, Callable[..., float | Awaitable[float]]]) -> None:
    """Answer each line of standard input, `[name, *arguments]`, with the figure of that round.

    Async rounds share one event loop.
    """
    # Whatever a peer prints must not be taken for a figure.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with asyncio.Runner() as runner:
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            result = rounds[name](*arguments)
            if inspect.isawaitable(result):
                result = runner.run(_finish(result))
            answers.write(f"{json.dumps(float(result))}\n")
            answers.flush()


async def _finish(result: Awaitable[float]) -> float:
    return await result
