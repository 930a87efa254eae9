"""The CustomResourceDefinitions, generated from the types. `python -m sonoforge_operator.crd` writes all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any, Literal

import yaml

from sonoforge_operator import api, resources
from sonoforge_operator.admission import LISTS, RULES, SHORT_NAME
from sonoforge_operator.chart.documents import documents
from sonoforge_operator.install import install
from sonoforge_operator.presets import hint
from sonoforge_operator.reference import reference
from sonoforge_operator.schema import Options, Schema, structural
from sonoforge_trainer import contract
from sonoforge_trainer.contract import Part

HEADER = "# Generated from the types in operator/ by `make generate`. Do not edit.\n"
CATEGORY = "sonoforge"


@dataclass(frozen=True)
class Column:
    """A column of `kubectl get`."""

    name: str
    """Its title."""
    path: str
    """Field it shows, from the object's root."""
    type: Literal["string", "integer", "number", "boolean", "date"] = "string"
    """Type of the field; a date is shown as an age."""
    wide: bool = False
    """Whether it is only in `-o wide`."""

    def document(self) -> Schema:
        """An entry of additionalPrinterColumns."""
        made: Schema = {"name": self.name, "type": self.type, "jsonPath": self.path}
        return made | ({"priority": 1} if self.wide else {})


_AGE = Column("AGE", ".metadata.creationTimestamp", "date")


@dataclass(frozen=True)
class Resource:
    """A kind of custom resource."""

    kind: str
    """Its kind."""
    short: str
    """Its short name."""
    description: str
    """What it is for; `kubectl explain` begins with it."""
    spec: type[Part]
    """Type of its spec."""
    status: type[Part] | None = None
    """Type of its status, where it has one."""
    columns: tuple[Column, ...] = (_AGE,)
    """Columns of `kubectl get`."""
    scale: Mapping[str, str] | None = None
    """The scale subresource, where there is one."""
    rules: tuple[Schema, ...] = ()
    """CEL rules on the whole object."""
    frozen: bool = False
    """Whether the spec may never change."""

    @property
    def plural(self) -> str:
        """Its name in paths and commands."""
        return f"{self.kind.lower()}s"

    def schema(self, *, hints: bool = True) -> Schema:
        """The structural schema of the whole object. With `hints`, descriptions say what the presets give."""
        spec = structural(self.spec, Options(RULES, LISTS))
        if "training" in spec["properties"]:
            spec["properties"]["training"] = _training(spec["properties"]["training"], hints=hints)
        if self.frozen:
            spec["x-kubernetes-validations"] = [
                {"rule": "self == oldSelf", "message": f"a {self.kind} is a record of what was made; it cannot change"}
            ]
        properties = {
            "apiVersion": {"description": f"Always {api.API_VERSION}.", "type": "string"},
            "kind": {"description": f"Always {self.kind}.", "type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
        }
        if self.status:
            properties["status"] = structural(self.status, Options(lists=LISTS, defaults=False, constraints=False))
        made: Schema = {
            "description": self.description,
            "type": "object",
            "required": ["spec"],
            "properties": properties,
        }
        if self.rules:
            made["x-kubernetes-validations"] = list(self.rules)
        return made

    def definition(self) -> Schema:
        """The CustomResourceDefinition."""
        version: Schema = {
            "name": api.VERSION,
            "served": True,
            "storage": True,
            "additionalPrinterColumns": [column.document() for column in self.columns],
            "schema": {"openAPIV3Schema": self.schema()},
        }
        if self.status:
            version["subresources"] = {"status": {}, **({"scale": dict(self.scale)} if self.scale else {})}
        return {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{self.plural}.{api.GROUP}"},
            "spec": {
                "group": api.GROUP,
                "scope": "Namespaced",
                "names": {
                    "kind": self.kind,
                    "listKind": f"{self.kind}List",
                    "plural": self.plural,
                    "singular": self.kind.lower(),
                    "shortNames": [self.short],
                    "categories": [CATEGORY],
                },
                "versions": [version],
            },
        }


def _training(field: Schema, *, hints: bool) -> Schema:
    """The schema of spec.training without any default: one from the API server would replace the preset's number."""
    made = structural(contract.TrainConfig, Options(RULES, LISTS, defaults=False, hint=hint if hints else None))
    validations = made.get("x-kubernetes-validations", []) + [
        rule for rule in field["x-kubernetes-validations"] if "oldSelf" in rule["rule"]
    ]
    return made | {"description": field["description"], "x-kubernetes-validations": validations}


RESOURCES = (
    Resource(
        kind="PretrainJob",
        short="pj",
        description="One pretraining run: what to train, on how many nodes, and how every checkpoint is evaluated.",
        spec=api.PretrainJobSpec,
        status=resources.PretrainJobStatus,
        columns=(
            Column("PHASE", ".status.phase"),
            Column("NODES", ".status.nodesText"),
            Column("STEP", ".status.step", "integer"),
            Column("PROGRESS", ".status.progressText"),
            Column("ETA", ".status.eta"),
            Column("CKPT-AGE", ".status.lastCheckpoint.time", "date"),
            Column("BEST", ".status.bestText"),
            Column("RESTARTS", ".status.restartsTotal", "integer"),
            _AGE,
            Column("QUEUE", ".status.queue", wide=True),
            Column("LOSS", ".status.lossText", wide=True),
            Column("THROUGHPUT", ".status.throughputText", wide=True),
            Column("REASON", ".status.reason", wide=True),
        ),
        scale={
            "specReplicasPath": ".spec.workers.maxNodes",
            "statusReplicasPath": ".status.nodes.ready",
            "labelSelectorPath": ".status.selector",
        },
        rules=(SHORT_NAME,),
    ),
    Resource(
        kind="PretrainRuntime",
        short="prt",
        description="What a platform team gives to jobs that name it: images, nodes, storage, and limits.",
        spec=api.PretrainRuntimeSpec,
        columns=(
            Column("ACCELERATOR", ".spec.accelerator.resourceName"),
            Column("MAX-NODES", ".spec.limits.maxNodes", "integer"),
            Column("QUEUE", ".spec.queueName"),
            _AGE,
            Column("IMAGE", ".spec.images.trainer", wide=True),
            Column("STORAGE", ".spec.storage.endpointUrl", wide=True),
        ),
        rules=(SHORT_NAME,),
    ),
    Resource(
        kind="EvalSuite",
        short="evs",
        description="A named list of evaluations that jobs run on every checkpoint.",
        spec=api.EvalSuiteSpec,
        rules=(SHORT_NAME,),
    ),
    Resource(
        kind="Checkpoint",
        short="ckpt",
        description="One durable checkpoint of a PretrainJob with its scores. The operator makes and removes it.",
        spec=resources.CheckpointSpec,
        status=resources.CheckpointObjectStatus,
        columns=(
            Column("JOB", ".spec.job"),
            Column("STEP", ".spec.step", "integer"),
            Column("SAMPLES", ".spec.samples", "integer"),
            Column("SCORES", ".status.scoresText"),
            Column("BEST", ".status.best", "boolean"),
            Column("STATE", ".status.phase"),
            _AGE,
        ),
        frozen=True,
    ),
)


def generated() -> dict[str, str]:
    """Every generated file: path in the repository to its text."""
    files: dict[str, str] = {}
    for resource in RESOURCES:
        text = HEADER + _yaml(resource.definition())
        files[f"manifests/crds/{resource.plural}.yaml"] = text
        # Byte for byte the same, because a chart cannot reach a file outside itself.
        files[f"charts/sonoforge/files/crds/{resource.plural}.yaml"] = text
    for name, cluster_wide in (("install", False), ("install-cluster", True)):
        objects = [*install(cluster_wide=cluster_wide)]
        files[f"manifests/{name}.yaml"] = HEADER + "---\n".join(_yaml(found) for found in objects)
    files |= {f"charts/sonoforge/{name}": text for name, text in documents().items()}
    files["docs/api.md"] = reference([(r.kind, r.short, r.schema(hints=False)) for r in RESOURCES])
    return files


def write(root: File) -> list[File]:
    """Write the generated files below the root of the repository; the paths of those that changed."""
    changed = []
    for name, text in generated().items():
        file = root / name
        if not file.is_file() or file.read_text() != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            changed.append(file)
    return changed


class _PlainDumper(yaml.SafeDumper):
    """No anchors: a generated file is read by people and by programs that do not know them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_PlainDumper.add_representer(str, _PlainDumper.represent_str)


def _yaml(document: Schema) -> str:
    return yaml.dump(document, Dumper=_PlainDumper, sort_keys=False, width=120, allow_unicode=True)


if __name__ == "__main__":
    write(File.cwd())
