"""Alerts and the dashboard of the chart ask for metrics that the operator has."""

from __future__ import annotations

import json
import re

import yaml
from helm import CHART

from sonoforge_operator.cluster.metrics import Metrics


def metric_names() -> set[str]:
    """Every name under which the operator shows a metric."""
    found = set()
    for family in Metrics().registry.collect():
        match family.type:
            case "counter":
                found.add(f"{family.name}_total")
            case "histogram":
                found |= {f"{family.name}_{end}" for end in ("bucket", "count", "sum")}
            case _:
                found.add(family.name)
    return found


def expressions() -> dict[str, list[str]]:
    alerts = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    board = json.loads((CHART / "files" / "dashboard.json").read_text())
    return {
        "alerts": [rule["expr"] for group in alerts["groups"] for rule in group["rules"]],
        "dashboard": [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())],
    }


def test_alerts_and_the_dashboard_ask_for_metrics_that_exist():
    used = {where: set(re.findall(r"sonoforge_\w+", " ".join(texts))) for where, texts in expressions().items()}
    assert {where: names - metric_names() for where, names in used.items()} == {"alerts": set(), "dashboard": set()}
    histograms = re.compile(r"_(bucket|count|sum)$")
    shown = {histograms.sub("", name) for name in used["dashboard"]}
    assert {histograms.sub("", name) for name in metric_names()} - shown == set(), "the dashboard shows all"
