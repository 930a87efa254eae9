"""What a person sees while a local run goes on: a live table on a terminal, JSON lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sonoforge_operator.api import JobFile
from sonoforge_operator.observed import Plan
from sonoforge_operator.scores import best_words, score_cell, score_names, shown_checkpoints
from sonoforge_operator.status import JobStatus
from sonoforge_trainer.contract import canonical_json, selection_score, split_score

_RECENT_EVENTS = 8
_JSON_EVERY_SECONDS = 10.0
_LABEL_WIDTH, _SCORE_WIDTH = 36, 10


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
            self._write(now, event="Progress", level="info", **_facts(decided.status))

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
        self._console = console or Console()
        self._live = Live(console=self._console, refresh_per_second=4, transient=False)
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
        self._live.update(self._render(decided.status))

    def say(self, message: str) -> None:
        """Print one sentence above the table."""
        self._console.print(message)

    def _render(self, status: JobStatus) -> Group:
        progress = status.progress
        done = Table.grid(expand=True)
        done.add_row(
            ProgressBar(total=max(1, progress.steps if progress else 1), completed=progress.step if progress else 0)
        )
        title = Text(f"{self._file.job.metadata.name}  {status.phase}", style="bold")
        best_by = self._file.job.spec.evaluation.best_by
        told = (_progress_words(status), _record_words(status, best_by))
        lines = [Text(" · ".join(words)) for words in told if words]
        stall = status.condition("Stalled")
        if stall and stall.status == "True":
            lines.append(Text(f"{stall.reason}: {stall.message}", style="yellow"))
        return Group(title, done, *lines, self._scores(status), *self._events)

    def _scores(self, status: JobStatus) -> Table:
        """A row for each score; as many checkpoints as fit."""
        best_by = self._file.job.spec.evaluation.best_by
        deciding = selection_score(best_by) if best_by else None
        shown = shown_checkpoints(status, (self._console.width - _LABEL_WIDTH) // _SCORE_WIDTH)
        names = score_names(status, best_by)
        table = Table(box=None, pad_edge=False, show_header=bool(names))
        table.add_column("SCORE AT STEP", no_wrap=True)
        for checkpoint in shown:
            table.add_column(str(checkpoint.ref.step), justify="right", no_wrap=True)
        for name in names:
            decides = name == deciding
            cells = [Text(score_cell(c, name), style="green" if c.best and decides else "") for c in shown]
            table.add_row(Text(" ".join(split_score(name)), style="bold" if decides else ""), *cells)
        return table


def duration(seconds: float) -> str:
    """A time for a person: 45 s, 12 min, 1 h 20 min, 2 d 3 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def seconds_left(status: JobStatus) -> float | None:
    """Time to the end of the budget at the present rate; None where it is not known, or nothing is left to train."""
    progress = status.progress
    if progress is None or progress.samples_per_second <= 0 or status.outcome is not None:
        return None
    return (progress.budget_samples - progress.samples) / progress.samples_per_second


def _progress_words(status: JobStatus) -> list[str]:
    progress = status.progress
    if progress is None:
        return []
    words = [
        f"step {progress.step} of {progress.steps}",
        f"{progress.samples:,} images",
        f"{progress.world_size} process{'es' if progress.world_size != 1 else ''}",
    ]
    if progress.loss is not None:
        words.append(f"loss {progress.loss:.4f}")
    words += [f"{progress.samples_per_second:.1f} images/s", f"{progress.data_wait:.0%} of it waiting for data"]
    left = seconds_left(status)
    return words if left is None else [*words, f"{duration(left)} left"]


def _record_words(status: JobStatus, best_by: str | None) -> list[str]:
    words = []
    if status.checkpoints:
        words.append(
            f"{sum(c.evaluated for c in status.checkpoints)} of {len(status.checkpoints)} checkpoints evaluated"
        )
    best = next((c for c in status.checkpoints if c.best), None)
    if best and status.best_compared is not None:
        words.append(f"{best_words(best_by)} {status.best_compared:.4f} at step {best.ref.step}")
    if status.restarts:
        words.append("restarts: " + ", ".join(f"{n} {cause}" for cause, n in sorted(status.restarts.items())))
    if status.lost_steps:
        words.append(f"{status.lost_steps} steps done again")
    return words


def _facts(status: JobStatus) -> dict[str, object]:
    """The state as fields for machines."""
    progress = status.progress
    facts: dict[str, object] = {"phase": status.phase}
    if progress:
        left = seconds_left(status)
        facts |= {
            "step": progress.step,
            "steps": progress.steps,
            "samples": progress.samples,
            "processes": progress.world_size,
            "loss": progress.loss,
            "samplesPerSecond": round(progress.samples_per_second, 2),
            "dataWait": round(progress.data_wait, 3),
            "secondsLeft": None if left is None else round(left),
        }
    facts["checkpoints"] = len(status.checkpoints)
    facts["evaluated"] = sum(c.evaluated for c in status.checkpoints)
    if status.best:
        facts |= {"best": status.best, "bestScore": status.best_score, "bestCompared": status.best_compared}
    if status.restarts:
        facts |= {"restarts": status.restarts, "lostSteps": status.lost_steps}
    stall = status.condition("Stalled")
    if stall and stall.status == "True":
        facts["stalled"] = f"{stall.reason}: {stall.message}"
    return facts
