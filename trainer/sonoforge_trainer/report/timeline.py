"""What happened to a run along the axis of samples: restarts, changes of size, and the number of processes."""

from __future__ import annotations

from sonoforge_trainer.contract import RunSummary
from sonoforge_trainer.report.charts import Mark, Series, line_chart
from sonoforge_trainer.report.runs import Run

_MARKED = (
    "WorkerReplaced",
    "Restarted",
    "Resized",
    "Suspended",
    "Resumed",
    "CoordinatorReplaced",
    "NewProcessGroup",
)
"""Events that interrupt a run, or change how many processes it has."""


def marks_of(summary: RunSummary) -> list[Mark]:
    """The interruptions of a run at the samples it had seen; those at one place are one mark."""
    rate = samples_per_step(summary)
    at: dict[int, list[tuple[str, bool]]] = {}
    for event in summary.events:
        if event.reason in _MARKED:
            at.setdefault(event.step, []).append((f"{event.reason}: {event.message}", event.warning))
    return [
        Mark(step * rate, f"step {step}: {'; '.join(text for text, _ in told)}", any(warning for _, warning in told))
        for step, told in sorted(at.items())
    ]


def samples_per_step(summary: RunSummary) -> float:
    """Images of one optimiser step, by the newest checkpoint; 0 before the first step."""
    trained = [c.ref for c in summary.checkpoints if c.ref.step > 0]
    return trained[-1].samples / trained[-1].step if trained else 0.0


def samples_range(summary: RunSummary) -> tuple[float, float] | None:
    """The axis of every chart of a run: from 0 to the samples seen."""
    last = max((c.ref.samples for c in summary.checkpoints), default=0)
    return (0.0, float(last)) if last else None


def world_chart(run: Run) -> str:
    """Processes against samples seen, as steps, with the interruptions; empty where no log says how many there were."""
    points: list[tuple[float, float]] = []
    for record in run.records:
        processes = record.get("world_size")
        if processes is None:
            continue
        if points and points[-1][1] != processes:
            points.append((points[-1][0], float(processes)))
        points.append((float(record["samples"]), float(processes)))
    if not points:
        return ""
    return line_chart(
        f"{run.name}: processes and restarts",
        [Series("processes", [(0.0, points[0][1]), *points])],
        x_label="samples seen",
        marks=marks_of(run.summary),
        x_range=samples_range(run.summary),
        whole_y=True,
    )
