"""What is generated of the chart: Chart.yaml, values.yaml, values.schema.json, README.md and the dashboard."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import yaml

from sonoforge_operator.api import PretrainRuntimeSpec
from sonoforge_operator.chart.dashboard import dashboard_file
from sonoforge_operator.chart.values import Values
from sonoforge_trainer.contract import Part

Schema = dict[str, Any]

KUBERNETES = ">=1.30.0-0"
"""Versions of Kubernetes that the chart takes: ValidatingAdmissionPolicy is v1 since 1.30."""
_WIDTH = 116
_HEADER = "# Generated from operator/sonoforge_operator/chart by `make generate`. Do not edit.\n"
_NAMED = ("$defs", "properties", "patternProperties")
_DROPPED = ("title", "default")


def chart_file() -> str:
    """Chart.yaml."""
    release = version("sonoforge")
    document = {
        "apiVersion": "v2",
        "name": "sonoforge",
        "description": "The Sonoforge operator: DINOv2 pretraining on ultrasound, every checkpoint evaluated",
        "type": "application",
        "version": release,
        "appVersion": release,
        "kubeVersion": KUBERNETES,
        "annotations": {"licenses": "Apache-2.0"},
    }
    return _HEADER + yaml.safe_dump(document, sort_keys=False, width=_WIDTH)


# --- values.yaml ------------------------------------------------------------------------------------------------------


def values_file() -> str:
    """values.yaml: every value with its default, below what it means."""
    return _HEADER + "\n".join(_values(Values, Values(), 0)) + "\n"


def _values(model: type[Part], defaults: Part, depth: int) -> Iterator[str]:
    margin = "  " * depth
    for name, field in model.model_fields.items():
        text = " ".join((field.description or "").split())
        yield from (f"{margin}# {line}" for line in textwrap.wrap(text, _WIDTH - len(margin), break_on_hyphens=False))
        value = getattr(defaults, name)
        if isinstance(value, Part) and not isinstance(value, PretrainRuntimeSpec):
            yield f"{margin}{field.alias}:"
            yield from _values(type(value), value, depth + 1)
        else:
            yield from textwrap.indent(yaml.safe_dump({field.alias: _plain(value)}, width=_WIDTH), margin).splitlines()


def _plain(value: object) -> object:
    """A default as YAML has it; a part of a list says what differs from its own defaults."""
    match value:
        case Part():
            return value.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        case tuple():
            return [_plain(entry) for entry in value]
        case _:
            return value


# --- values.schema.json -----------------------------------------------------------------------------------------------


def schema() -> Schema:
    """The closed JSON Schema of the values. `global` is what Helm itself adds where the chart is a part of another."""
    made = _closed(Values.model_json_schema(by_alias=True))
    made["properties"]["global"] = {"type": "object", "description": "Values that Helm hands to every chart. Not used."}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def schema_file() -> str:
    """values.schema.json."""
    return json.dumps(schema(), indent=2) + "\n"


def _closed(source: Any) -> Any:
    """The schema that pydantic makes, without its decoration; a quantity may be written as a number."""
    if isinstance(source, list):
        return [_closed(entry) for entry in source]
    if not isinstance(source, dict):
        return source
    made: Schema = {}
    for key, value in source.items():
        if key in _NAMED:
            made[key] = {name: _closed(each) for name, each in value.items()}
        elif key not in _DROPPED:
            made[key] = _closed(value)
    if made.pop("x-kubernetes-int-or-string", False):
        made["type"] = ["string", "integer"]
    if "patternProperties" in made:
        made["additionalProperties"] = False
    return made


# --- README.md --------------------------------------------------------------------------------------------------------

_README = """\
<!-- Generated from operator/sonoforge_operator/chart by `make generate`. Do not edit. -->
# The chart `sonoforge`

Installs the Sonoforge operator. Helm 3.19 and 4.3 are tested with it, on Kubernetes 1.34. How to operate it, and what
each right is for: `docs/operations.md` of the repository.

```sh
kubectl create namespace research
kubectl -n research create secret generic sonoforge-operator --from-literal=key="$(openssl rand -hex 32)"
helm install sonoforge charts/sonoforge --namespace research
```

By default it serves the jobs of its own namespace with a Role there. `watchNamespaces` gives it a Role in each of a
list; `clusterWide` gives it a ClusterRole. One operator serves a namespace, never two.

| objects | how many a cluster | where a second release is installed |
|---|---|---|
| CRDs | one set | `crds.enabled=false` |
| aggregated ClusterRoles | one set | `aggregatedRoles.enabled=false` |
| everything else | one set a release | |

**Upgrade, rollback, uninstall** touch no job: a job's objects belong to the job. CRDs are upgraded with the release
and stay when it goes, unless `crds.keep` is false. A rollback also rolls the CRDs back: fields that the older ones do
not know are dropped from what is written then. After an uninstall, running jobs go on and nobody looks after them.

A second release that should take over CRDs left by another one is installed with `--take-ownership`.

## Values

An unknown value is refused, and so is one of the wrong form: `values.schema.json` is closed.

| value | default | meaning |
|---|---|---|
"""


def readme_file() -> str:
    """README.md with a table of all values."""
    return _README + "".join(f"| `{name}` | {default} | {text} |\n" for name, default, text in _rows(Values(), ""))


def _rows(part: Part, prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in type(part).model_fields.items():
        value, path = getattr(part, name), f"{prefix}{field.alias}"
        if isinstance(value, Part) and not isinstance(value, PretrainRuntimeSpec):
            yield from _rows(value, f"{path}.")
        else:
            text = " ".join((field.description or "").split()).replace("|", "\\|")
            yield path, f"`{json.dumps(_plain(value))}`", text


def documents() -> dict[str, str]:
    """Every generated file of the chart: path in the chart to its text."""
    return {
        "Chart.yaml": chart_file(),
        "values.yaml": values_file(),
        "values.schema.json": schema_file(),
        "README.md": readme_file(),
        "files/dashboard.json": dashboard_file(),
    }
