"""The Grafana dashboard of jobs and of the operator, as the JSON that Grafana imports."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

_COLUMNS, _HEIGHT = 24, 8
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_JOBS = '{namespace=~"$namespace", job=~"$job"}'


@dataclass(frozen=True)
class Query:
    """One query of a panel."""

    expression: str
    """PromQL."""
    legend: str
    """What a line of it is called."""


@dataclass(frozen=True)
class Panel:
    """One picture. Its unit is the name that Grafana has for it."""

    title: str
    """What it shows."""
    queries: tuple[Query, ...]
    """Its lines."""
    unit: str = "short"
    """Unit of its values."""
    kind: Literal["timeseries", "stat"] = "timeseries"
    """Lines over time, or the newest value."""
    width: int = 8
    """Columns of 24."""


@dataclass(frozen=True)
class Row:
    """Panels below one title."""

    title: str
    """The title."""
    panels: tuple[Panel, ...]
    """Its panels, from left to right."""


def _of_jobs(metric: str, legend: str = "{{namespace}}/{{job}}") -> Query:
    return Query(f"sonoforge_job_{metric}{_JOBS}", legend)


ROWS = (
    Row(
        "Jobs",
        (
            Panel(
                "Jobs by phase", (Query(f"count by (phase) (sonoforge_job_phase{_JOBS})", "{{phase}}"),), kind="stat"
            ),
            Panel("Why jobs do not step", (_of_jobs("stalled", "{{namespace}}/{{job}}: {{reason}}"),)),
            Panel(
                "Ended jobs",
                (
                    Query(
                        "sum by (result, reason) (increase(sonoforge_jobs_ended_total[1d]))", "{{result}}: {{reason}}"
                    ),
                ),
            ),
            Panel("Steps", (_of_jobs("step"),)),
            Panel("Steps in a second", (Query(f"deriv(sonoforge_job_step{_JOBS}[5m])", "{{namespace}}/{{job}}"),)),
            Panel("Part of a step that waits for data", (_of_jobs("data_wait_ratio"),), "percentunit"),
        ),
    ),
    Row(
        "Reliability",
        (
            Panel("Share of time in steps that count", (_of_jobs("goodput_ratio"),), "percentunit"),
            Panel(
                "Lost time by cause", (Query(f"sum by (cause) (sonoforge_job_lost_seconds{_JOBS})", "{{cause}}"),), "s"
            ),
            Panel(
                "Restarts in an hour, by cause",
                (Query("sum by (cause) (increase(sonoforge_restarts_total[1h]))", "{{cause}}"),),
            ),
            Panel(
                "Age of the newest checkpoint",
                (Query(f"time() - sonoforge_job_checkpoint_time_seconds{_JOBS}", "{{namespace}}/{{job}}"),),
                "s",
            ),
            Panel(
                "The newest checkpoint: until its commit, and how long it held training up",
                (
                    _of_jobs("checkpoint_duration_seconds", "{{namespace}}/{{job}}: until its commit"),
                    _of_jobs("checkpoint_stall_seconds", "{{namespace}}/{{job}}: held up"),
                ),
                "s",
            ),
            Panel("Steps done again in an hour", (Query("increase(sonoforge_lost_steps_total[1h])", "steps"),)),
        ),
    ),
    Row(
        "Evaluations",
        (
            Panel("Evaluations to make", (_of_jobs("evaluation_backlog"),), width=12),
            Panel(
                "Ended in an hour, by phase",
                (Query("sum by (phase) (increase(sonoforge_evaluations_total[1h]))", "{{phase}}"),),
                width=12,
            ),
        ),
    ),
    Row(
        "Operator",
        (
            Panel("Replicas that act", (Query("sum(sonoforge_leading)", "leading"),), kind="stat"),
            Panel("Age of the watches' heartbeat", (Query("sonoforge_watch_age_seconds", "{{pod}}"),), "s"),
            Panel(
                "Changes that watches missed in an hour",
                (Query("sum by (kind) (increase(sonoforge_watch_missed_changes_total[1h]))", "{{kind}}"),),
            ),
            Panel(
                "Time of a pass",
                tuple(
                    Query(
                        f"histogram_quantile({q}, sum by (le) (rate(sonoforge_{metric}_seconds_bucket[10m])))", legend
                    )
                    for q, metric, legend in (
                        (0.5, "reconcile", "50 %"),
                        (0.99, "reconcile", "99 %"),
                        (0.99, "reconcile_whole", "99 % with the wait to write"),
                    )
                ),
                "s",
            ),
            Panel(
                "Jobs due, and the longest wait",
                (Query("sonoforge_queue_depth", "due"), Query("sonoforge_queue_oldest_seconds", "seconds")),
            ),
            Panel(
                "Writes and failed passes in a second",
                (
                    Query("rate(sonoforge_api_writes[5m])", "writes"),
                    Query("sum by (cause) (rate(sonoforge_reconcile_failures_total[5m]))", "failed: {{cause}}"),
                ),
            ),
            Panel(
                "Time to the first step",
                tuple(
                    Query(
                        f"histogram_quantile({q}, sum by (le) (rate(sonoforge_time_to_first_step_seconds_bucket[1d])))",
                        f"{100 * q:g} %",
                    )
                    for q in (0.5, 0.9)
                ),
                "s",
            ),
        ),
    ),
)
"""What the dashboard shows. Every metric of the operator is somewhere in it."""


def dashboard_file() -> str:
    """files/dashboard.json."""
    document = {
        "uid": "sonoforge",
        "title": "Sonoforge",
        "description": "Generated from operator/sonoforge_operator/chart by `make generate`.",
        "tags": ["sonoforge"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [_source(), _variable("namespace"), _variable("job", 'namespace=~"$namespace"')]},
        "panels": _panels(),
    }
    return json.dumps(document, indent=1) + "\n"


def _source() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _variable(name: str, among: str = "") -> dict[str, Any]:
    query = f"label_values(sonoforge_job_phase{{{among}}}, {name})"
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": _SOURCE,
        "query": query,
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panels() -> list[dict[str, Any]]:
    """Rows and panels with their places, from the top left."""
    made: list[dict[str, Any]] = []
    top = 0
    for row in ROWS:
        place = {"h": 1, "w": _COLUMNS, "x": 0, "y": top}
        made.append({"id": len(made) + 1, "type": "row", "title": row.title, "gridPos": place, "panels": []})
        top, left = top + 1, 0
        for panel in row.panels:
            if left + panel.width > _COLUMNS:
                top, left = top + _HEIGHT, 0
            place = {"h": _HEIGHT, "w": panel.width, "x": left, "y": top}
            made.append({"id": len(made) + 1, **_panel(panel), "gridPos": place})
            left += panel.width
        top += _HEIGHT
    return made


def _panel(panel: Panel) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + number), "expr": query.expression, "legendFormat": query.legend, "datasource": _SOURCE}
        for number, query in enumerate(panel.queries)
    ]
    return {
        "type": panel.kind,
        "title": panel.title,
        "datasource": _SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
    }
