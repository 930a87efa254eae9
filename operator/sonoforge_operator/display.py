"""What a person sees while a local run goes on: a live table on a terminal, JSON lines elsewhere."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sonoforge_operator.api import JobFile
from sonoforge_operator.observed import Plan
from sonoforge_operator.status import JobStatus
from sonoforge_trainer.contract import canonical_json, split_score

_RECENT_EVENTS = 8
_JSON_EVERY_SECONDS = 10.0


class Display(Protocol):
    """Shows passes to a person or to a log."""

    def show(self, decided: Plan, now: float) -> None:
        """Show the result of a pass at Unix time `now`."""

    def say(self, message: str) -> None:
        """Show one sentence."""

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End, leaving the terminal as it was."""


def make_display(file: JobFile, *, quiet: bool) -> Display:
    """A live table where the output is a terminal, JSON lines otherwise."""
    return TerminalDisplay(file) if sys.stdout.isatty() and not quiet else JsonDisplay(file)


class JsonDisplay:
    """One JSON object a line: every event, and the progress now and then."""

    def __init__(self, file: JobFile) -> None:
        self._job = file.job.metadata.name
        self._next = 0.0
        self._last: tuple[str, int] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, decided: Plan, now: float) -> None:
        """Write what happened in a pass, and the progress where it moved."""
        for event in decided.events:
            self._write(now, event=event.reason, message=event.message, level="warning" if event.warning else "info")
        progress = decided.status.progress
        state = (decided.status.phase, progress.step if progress else 0)
        if now >= self._next and state != self._last:
            self._next, self._last = now + _JSON_EVERY_SECONDS, state
            self._write(now, event="Progress", level="info", **_facts(decided.status, now))

    def say(self, message: str) -> None:
        """Write one sentence."""
        self._write(time.time(), event="Message", message=message, level="info")

    def _write(self, now: float, **fields: object) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
        sys.stdout.write(canonical_json({"time": stamp, "job": self._job, **fields}) + "\n")
        sys.stdout.flush()


class TerminalDisplay:
    """A progress bar, the figures that matter, the newest scores and the newest events, kept in place."""

    def __init__(self, file: JobFile, console: Console | None = None) -> None:
        self._file = file
        self._live = Live(console=console or Console(), refresh_per_second=4, transient=False)
        self._events: list[Text] = []

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, decided: Plan, now: float) -> None:
        """Draw the state after a pass."""
        for event in decided.events:
            stamp = time.strftime("%H:%M:%S", time.localtime(now))
            self._events.append(
                Text(f"{stamp}  {event.reason}  {event.message}", style="yellow" if event.warning else "")
            )
        self._events = self._events[-_RECENT_EVENTS:]
        self._live.update(self._render(decided.status, now))

    def say(self, message: str) -> None:
        """Print one sentence above the table."""
        self._live.console.print(message)

    def _render(self, status: JobStatus, now: float) -> Group:
        facts = _facts(status, now)
        progress = status.progress
        done = Table.grid(expand=True)
        done.add_row(
            ProgressBar(total=max(1, progress.steps if progress else 1), completed=progress.step if progress else 0)
        )
        title = Text(f"{self._file.job.metadata.name}  {status.phase}", style="bold")
        line = Text("  ".join(f"{n} {v}" for n, v in facts.items() if n != "phase" and v not in ("", None)))
        best_by = self._file.job.spec.evaluation.best_by
        return Group(title, done, line, _table(status, best_by), *self._events)


def _facts(status: JobStatus, now: float) -> dict[str, object]:
    progress = status.progress
    facts: dict[str, object] = {"phase": status.phase}
    if progress:
        left = progress.budget_samples - progress.samples
        facts |= {
            "step": f"{progress.step}/{progress.steps}",
            "samples": progress.samples,
            "processes": progress.world_size,
            "loss": None if progress.loss is None else round(progress.loss, 4),
            "images/s": round(progress.samples_per_second, 1),
            "dataWait": round(progress.data_wait, 3),
            "eta": f"{left / progress.samples_per_second:.0f}s" if progress.samples_per_second > 0 else None,
        }
    if status.checkpoints:
        facts["checkpoints"] = len(status.checkpoints)
        facts["evaluated"] = sum(c.evaluated for c in status.checkpoints)
    if status.best:
        facts["best"] = f"{status.best_score:.4f} at {status.best}"
    restarts = sum(status.restarts.values())
    if restarts:
        facts["restarts"] = restarts
        facts["lostSteps"] = status.lost_steps
    stall = status.condition("Stalled")
    if stall and stall.status == "True":
        facts["stalled"] = f"{stall.reason}: {stall.message}"
    return facts


def scores_table(status: JobStatus, best_by: str | None, *, width: int = 200) -> str:
    """The scores of every checkpoint as text: one for each evaluation and protocol, and the one that decides."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(_table(status, best_by))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _table(status: JobStatus, best_by: str | None) -> Table:
    names = sorted({name for c in status.checkpoints for e in c.evaluations for name in _headlines(e.scores, best_by)})
    table = Table(box=None, pad_edge=False)
    for title in ("CHECKPOINT", "STEP", "SAMPLES"):
        table.add_column(title, justify="left" if title == "CHECKPOINT" else "right", vertical="bottom", no_wrap=True)
    for name in names:
        table.add_column("\n".join(split_score(name)), justify="right", no_wrap=True)
    table.add_column("")
    for checkpoint in status.checkpoints:
        cells = []
        for name in names:
            owner = next((e for e in checkpoint.evaluations if e.name == split_score(name)[0]), None)
            score = checkpoint.score(name)
            cells.append(f"{score:.4f}" if score is not None else (owner.phase.lower() if owner else ""))
        table.add_row(
            checkpoint.ref.id.split("-")[-1],
            str(checkpoint.ref.step),
            str(checkpoint.ref.samples),
            *cells,
            "best" if checkpoint.best else "",
        )
    return table


_HEADLINE_METRICS = ("f1_macro", "dice_foreground", "rankme")


def _headlines(scores: Mapping[str, object], best_by: str | None) -> list[str]:
    return [name for name in scores if name == best_by or name.split("/")[-1] in _HEADLINE_METRICS]
