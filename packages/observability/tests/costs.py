"""What it costs to look at texts of one shape, beside a plain one, as JSON; a process of its own measures nothing else.

echo '["a plain text", ["shape", …]]' | python costs.py
"""

import json
import sys
import time

from mainstay.observability._redaction import redact_text


def cost(unit: str, size: int) -> float:
    """The least processor time of three looks at a text of so many characters, in seconds."""
    text = (unit * (size // len(unit) + 1))[:size]
    best = float("inf")
    for _ in range(3):
        began = time.thread_time()
        redact_text(text)
        best = min(best, time.thread_time() - began)
    return best


if __name__ == "__main__":
    plain, shapes = json.load(sys.stdin)
    usual = cost(plain, 50_000)
    ratios = {shape: cost(shape, 50_000) / usual for shape in shapes}
    ratios["a megabyte"] = cost("://:x", 1_000_000) / cost(plain, 1_000_000)
    json.dump(ratios, sys.stdout)
