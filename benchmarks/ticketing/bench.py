"""The ticket office's demo with 118 purchases, its worker killed five times on the way: how long it takes."""

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from io import StringIO
from pathlib import Path

from rich.console import Console

from benchmarks.rows import ROOT, Row, row

sys.path.append(
    str(ROOT / "examples")
)  # an example is no installed package; the demo hands the path on to its processes
PURCHASES = 118


async def rows(quick: bool) -> AsyncIterator[Row]:  # noqa: FBT001  the runner's contract
    seconds = [await play() for _ in range(1 if quick else 3)]
    yield row(
        f"demo, {PURCHASES} purchases and 5 kills, embedded",
        "s",
        statistics.median(seconds),
        low=min(seconds),
        high=max(seconds),
        rounds=len(seconds),
    )


async def play() -> float:
    """As `make demo` does it, from the start of the first process until the last verdict."""
    from ticketing.demo import Script, perform

    with tempfile.TemporaryDirectory() as directory:
        purchases = Path(directory) / "purchases.jsonl"
        purchases.write_text("".join(f"{json.dumps(each)}\n" for each in generated()))
        started = time.perf_counter()
        outcome = await perform(Script(purchases), Path(directory), Console(file=StringIO()))
        seconds = time.perf_counter() - started
    assert outcome.holds, [verdict for verdict in outcome.verdicts if not verdict.holds]
    assert (len(outcome.story.accepted), outcome.story.kills.total()) == (PURCHASES, 5)
    return seconds


def generated() -> list[dict[str, object]]:
    """The same purchases each time, with lines and quantities as uneven as a shop sees them."""
    dice = random.Random(PURCHASES)  # noqa: S311  the same in every run
    return [
        {
            "order_id": str(number),
            "customer_id": f"c{dice.randrange(60)}",
            "country": "Norway",
            "placed_at": "6/2/2025 9:00",
            "lines": [
                {
                    "item": (item := f"I{dice.randrange(400)}"),
                    "title": f"Show {item}",
                    "quantity": dice.choice((1, 2, 4, 6, 12, 48)),
                    "unit_price": f"{dice.randrange(1, 100)}.{dice.randrange(100):02}",
                }
                for _ in range(dice.choice((1, 2, 4, 16, 40)))
            ],
        }
        for number in range(1, PURCHASES + 1)
    ]
