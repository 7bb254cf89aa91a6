"""What the demo shows: a progress bar, or plain lines where there is no terminal, and one table at the end."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ticketing.demo import Story
    from ticketing.invariants import Facts, Verdict


_SHOWN = 5  # complaints of one invariant
_JOINED = "\N{NO-BREAK SPACE}"


class Progress:
    """How far the demo is: `done` of `total` purchases have come to an end."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._bar: Bar | None = None
        if console.is_terminal:
            self._bar = Bar(
                SpinnerColumn(),
                TextColumn("selling tickets"),
                BarColumn(bar_width=36),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.description}"),
                console=console,
            )
            self._task = self._bar.add_task("", total=total)
        self._total = total
        self._done = 0
        self._told = 0
        self._kills = 0
        self._moved = asyncio.Event()

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *details: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def done(self) -> int:
        return self._done

    @done.setter
    def done(self, value: int) -> None:
        self._done = value
        self._show()

    @property
    def total(self) -> int:
        return self._total

    @total.setter
    def total(self, value: int) -> None:
        self._total = value
        self._show()

    async def reached(self, done: float) -> None:
        """Wait until so many have come to an end."""
        while self._done < done:
            self._moved.clear()
            await self._moved.wait()

    def _show(self) -> None:
        self._moved.set()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, total=self._total)
        elif self._done >= self._told + max(1, self._total // 5):
            self._told = self._done
            self._console.print(f"{self._done} of {self._total} purchases have come to an end")

    def killed(self, moment: str) -> None:
        """The worker was killed."""
        self._kills += 1
        self.say(f"kill {self._kills}: {moment}")

    def say(self, text: str) -> None:
        """Something else that is worth knowing meanwhile."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            self._console.print(text)


def breaker_changes(log: Path) -> Counter[str]:
    """The states that the circuit entered, from the log of the worker, who had it in its lifetimes."""
    changes: Counter[str] = Counter()
    for line in log.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # what the interpreter itself says when it is killed, for example
        if isinstance(entry, dict) and entry.get("breaker") == "payments":
            changes[str(entry.get("after")).replace("_", " ")] += 1
    return changes


def report(facts: Facts, story: Story, verdicts: list[Verdict], *, engine: str) -> RenderableType:
    """The one table, and under it the verdicts."""
    table = Table(
        box=box.SIMPLE_HEAD, title=f"The ticket office, {engine}", title_style="bold", show_header=False, pad_edge=False
    )
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for row in _rows(facts, story):
        if row is None:
            table.add_section()
        else:
            table.add_row(*map(Text, row))
    return Group(table, _verdicts(verdicts))


def _rows(facts: Facts, story: Story) -> list[tuple[str, str, str] | None]:
    completed, cancelled = facts.in_state("completed"), facts.in_state("cancelled")
    money: list[tuple[str, str, str] | None] = []
    for kind in ("charge", "refund"):
        for who, rows in (("office", facts.payments), ("provider", facts.ledger)):
            amounts = [row["amount_cents"] for row in rows if row["kind"] == kind]
            money.append((f"{kind}s, {who}'s ledger", str(len(amounts)), f"{sum(amounts) / 100:,.2f}"))
    misdeeds = Counter({name: count for name, count in story.provider.items() if name != "well"})
    return [
        ("lines in the file", str(len(facts.file)), f"played in {story.seconds:.1f} s"),
        ("purchases accepted", str(len(story.accepted)), ""),
        ("  completed", str(len(completed)), f"{sum(row['tickets_held'] for row in completed):,} tickets"),
        ("  cancelled", str(len(cancelled)), _counts(Counter(row["reason"] or "?" for row in cancelled))),
        ("purchases rejected", str(story.reasons.total()), _counts(story.reasons)),
        None,
        *money,
        ("provider's misdeeds", str(misdeeds.total()), _counts(misdeeds)),
        ("circuit breaker transitions", str(story.breaker.total()), _counts(story.breaker)),
        None,
        ("events published", str(facts.published), ""),
        ("events handled", str(len(facts.handled)), _counts(Counter(row["consumer"] for row in facts.handled))),
        ("events given up or parked", str(facts.given_up), ""),
        ("audit entries verified", str(facts.audit_entries), ""),
        ("kills survived", str(story.kills.total()), _counts(story.kills)),
    ]


def _counts(counts: Counter[str]) -> str:
    """Each with its number, and no line that ends between the two: so wide as the column is in 80 columns."""
    kept = (f"{name} {count}".replace(" ", _JOINED) for name, count in counts.most_common())
    return fill(", ".join(kept), width=42, break_long_words=False).replace(_JOINED, " ")


def _verdicts(verdicts: list[Verdict]) -> RenderableType:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for verdict in verdicts:
        mark = Text("✔ holds", "green") if verdict.holds else Text("✘ FAILS", "bold red")
        table.add_row(mark, verdict.name)
        for complaint in verdict.complaints[:_SHOWN]:
            table.add_row("", Text(complaint, "red"))
        if len(verdict.complaints) > _SHOWN:
            table.add_row("", Text(f"… and {len(verdict.complaints) - _SHOWN} more", "red"))
    broken = sum(not verdict.holds for verdict in verdicts)
    if broken:
        return Group(table, "", f"[bold red]{broken} of {len(verdicts)} invariants do not hold.")
    return Group(table, "", "[bold green]Every invariant holds.")
