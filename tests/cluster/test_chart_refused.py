"""Values that the chart refuses, with each Helm: what it says names the value and what is allowed."""

from __future__ import annotations

import re
from typing import Any

import pytest
from helm import Helm, HelmError

from sonoforge_operator.chart.documents import schema


@pytest.mark.parametrize(
    ("values", "path", "says"),
    [
        ({"replica": 2}, "", "replica"),
        ({"image": {"name": "x"}}, "/image", "name"),
        ({"image": {"digest": "latest"}}, "/image/digest", "pattern"),
        ({"networkPolicy": {"apiServer": {"cidr": []}}}, "/networkPolicy/apiServer", "cidr"),
        ({"metrics": {"podMonitor": {"labels": {"a b": "c"}}}}, "/metrics/podMonitor/labels", "a b"),
        ({"replicas": "two"}, "/replicas", "integer"),
        ({"watchNamespaces": ["Fetal"]}, "/watchNamespaces/0", "pattern"),
        ({"defaultRuntime": {"spec": {"workers": {"image": "x"}}}}, "/defaultRuntime/spec/workers", "image"),
        ({"tolerations": [{"kee": "x"}]}, "/tolerations/0", "kee"),
    ],
)
def test_a_value_that_does_not_exist_or_fit_is_refused_with_its_path(helm: Helm, values, path, says):
    with pytest.raises(HelmError) as error:
        helm.render(values)
    lines = [line for line in str(error.value).splitlines() if line.lstrip().startswith("- at ")]
    assert any(f"at '{path}'" in line and says in line for line in lines), str(error.value)


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"clusterWide": True, "watchNamespaces": ["a"]}, "watchNamespaces"),
        ({"podDisruptionBudget": {"enabled": True}}, "podDisruptionBudget.enabled"),
        (
            {"metrics": {"podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}}},
            "metrics.podMonitor.enabled",
        ),
        ({"admissionPolicy": {"requireDigests": True}}, "admissionPolicy.requireDigests"),
        ({"clusterWide": True, "defaultRuntime": {"enabled": True}}, "jobNamespaces"),
        ({"clusterWide": True, "extraCa": {"certificates": "x"}}, "jobNamespaces"),
    ],
)
def test_values_that_do_not_fit_together_are_refused_with_what_is_allowed(helm: Helm, values, path):
    with pytest.raises(HelmError, match=rf"{re.escape(path)}: found .*Allowed: "):
        helm.render(values)


def closed(part: Any, path: str = "") -> list[str]:
    """Paths of the objects in a schema that take fields which nobody described."""
    found = []
    if isinstance(part, dict):
        if part.get("type") == "object" and part.get("additionalProperties", True) is True and path != "/global":
            found.append(path)
        for key, value in part.items():
            found += closed(value, path if key == "properties" else f"{path}/{key}")
    elif isinstance(part, list):
        found += [each for value in part for each in closed(value, path)]
    return found


def test_the_schema_is_closed_everywhere_and_says_what_each_value_means():
    whole = schema()
    assert closed(whole) == []
    fields = [field for part in (whole, *whole["$defs"].values()) for field in part.get("properties", {}).values()]
    assert len(fields) > 100
    assert [f for f in fields if not f.get("description") and "$ref" not in f] == []
