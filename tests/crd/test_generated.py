"""The generated files are fresh, and what they say is what the types say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sonoforge_operator import api, crd
from sonoforge_operator.limits import narrow
from sonoforge_operator.presets import hint
from sonoforge_operator.resources import CheckpointSpec, PretrainJobStatus
from sonoforge_trainer.contract import CheckpointRef, TrainConfig, load_yaml, load_yaml_documents

ROOT = Path(__file__).parents[2]
SAMPLES = sorted((ROOT / "manifests/samples").glob("*.yaml"))
SCHEMAS = {resource.kind: resource.schema() for resource in crd.RESOURCES}
FILES = crd.generated()
PARSE = {"PretrainJob": api.parse_job, "PretrainRuntime": api.parse_runtime, "EvalSuite": api.parse_suite}


def fields(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema inside a schema, with its path."""
    yield path, schema
    for name, field in schema.get("properties", {}).items():
        yield from fields(field, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield from fields(schema[key], f"{path}[]")


def spec_fields(kind: str) -> list[tuple[str, dict[str, Any]]]:
    return list(fields(SCHEMAS[kind]["properties"]["spec"], "spec"))


def at(kind: str, path: str) -> dict[str, Any]:
    return dict(fields(SCHEMAS[kind]))[path]


def defaulted(schema: dict[str, Any], value: Any) -> Any:
    """What an API server makes of a value: defaults go in from the outside inwards."""
    if isinstance(value, dict) and "properties" in schema:
        given = {n: f["default"] for n, f in schema["properties"].items() if "default" in f} | value
        return {n: defaulted(schema["properties"].get(n, {}), v) for n, v in given.items()}
    if isinstance(value, list):
        return [defaulted(schema.get("items", {}), v) for v in value]
    return value


def samples() -> list[tuple[str, dict[str, Any]]]:
    return [(f.name, d) for f in SAMPLES for d in load_yaml_documents(f.read_text(), where=f.name)]


def test_generated_files_are_what_the_types_say():
    """Run `make generate` and commit, where this fails."""
    folders = ("manifests/crds", "charts/sonoforge/files/crds")
    found = {str(p.relative_to(ROOT)) for folder in folders for p in (ROOT / folder).iterdir()}
    found |= {"docs/api.md", "manifests/install.yaml", "manifests/install-cluster.yaml"}
    chart = ("Chart.yaml", "values.yaml", "values.schema.json", "README.md", "files/dashboard.json")
    found |= {f"charts/sonoforge/{name}" for name in chart}
    assert found == set(FILES)
    assert [name for name, text in FILES.items() if (ROOT / name).read_text() != text] == []


def test_a_generated_file_says_so_and_is_read_again_as_what_it_was():
    for resource in crd.RESOURCES:
        text = FILES[f"manifests/crds/{resource.plural}.yaml"]
        assert text.startswith("# Generated from the types in operator/ by `make generate`. Do not edit.\n")
        assert load_yaml(text, where=resource.plural) == resource.definition()


def test_writing_names_the_files_that_changed_and_leaves_fresh_ones_alone(tmp_path):
    assert {str(p.relative_to(tmp_path)) for p in crd.write(tmp_path)} == set(FILES)
    (tmp_path / "docs/api.md").write_text("edited")
    assert crd.write(tmp_path) == [tmp_path / "docs/api.md"]


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_schema_is_structural(kind):
    for path, field in fields(SCHEMAS[kind]):
        assert "$ref" not in field, path
        assert "type" in field or field.get("x-kubernetes-int-or-string"), path
        if "anyOf" in field:
            assert field["x-kubernetes-int-or-string"], path


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_field_is_described_and_bounded(kind):
    for path, field in spec_fields(kind):
        assert "description" in field or path.endswith("[]"), path
        match field.get("type"):
            case "string":
                assert "maxLength" in field or "enum" in field, path
            case "array":
                assert "maxItems" in field, path
            case "object":
                assert "properties" in field or "maxProperties" in field, path


def test_the_api_server_sets_no_number_that_a_preset_decides():
    assert [p for p, f in spec_fields("PretrainJob") if p.startswith("spec.training") and "default" in f] == []


def test_the_defaults_of_the_api_server_are_those_of_the_types():
    """A job, runtime or suite reads the same whether it went through an API server or not."""
    assert defaulted(at("PretrainJob", ".spec"), {"workers": {"maxNodes": 3}})["workers"] == {
        "minNodes": 1,
        "maxNodes": 3,
        "gpusPerNode": 1,
    }
    for _, document in samples():
        served = {**document, "spec": defaulted(at(document["kind"], ".spec"), document["spec"])}
        assert PARSE[document["kind"]](served) == PARSE[document["kind"]](document)
    empty = {"apiVersion": "sonoforge.dev/v1alpha1", "kind": "PretrainRuntime", "metadata": {"name": "r"}, "spec": {}}
    served = defaulted(SCHEMAS["PretrainRuntime"], empty)
    assert served["spec"]["workers"] == at("PretrainRuntime", ".spec.workers")["default"] == {"sharedMemory": "8Gi"}
    assert served["spec"]["network"] == {"policies": True, "storagePorts": [443], "dnsNamespace": "kube-system"}
    assert api.parse_runtime(served).spec == api.PretrainRuntimeSpec()


def test_a_default_inside_training_is_told_and_not_set():
    assert hint(("recipe", "globalBatch")) == "Default: the preset's (dinov2-short 2048, ultradino 128, tiny 32)."
    assert hint(("recipe", "schedule", "warmupSamples")) == (
        "Default: the preset's (dinov2-short 0.1 x budgetSamples, ultradino 0.1 x budgetSamples, "
        "tiny 0.05 x budgetSamples)."
    )
    assert "tiny 0.01 x budgetSamples" in hint(("recipe", "schedule", "freezeLastLayerSamples"))
    assert hint(("recipe", "augment", "jitter")) == "Default: 0.8."
    assert hint(("recipe", "preset")) == "Default: dinov2-short."
    assert hint(("data", "shards")) == ""
    assert at("PretrainJob", ".spec.training.recipe.globalBatch") == {
        "description": "Images in one optimiser step, whatever the number of processes.\n"
        "Default: the preset's (dinov2-short 2048, ultradino 128, tiny 32).",
        "type": "integer",
        "format": "int64",
        "minimum": 1,
    }


def test_what_a_hint_says_is_what_a_run_gets():
    resolved = TrainConfig.resolve({"data": {"shards": "s3://b/shards.json"}, "recipe": {"preset": "tiny"}})
    assert resolved.recipe.schedule.warmup_samples == 0.05 * resolved.recipe.budget_samples
    assert "tiny vit_tiny" in hint(("model", "arch"))
    assert resolved.model.arch == "vit_tiny"


def test_values_are_checked_in_a_spec_and_only_named_in_a_status():
    assert at("PretrainJob", ".spec.evaluation.bestIs")["enum"] == ["highest", "lowest"]
    assert at("PretrainJob", ".spec.restartPolicy.stallAfter")["pattern"] == "^(auto|([0-9]+(s|m|h|d))+)$"
    assert at("PretrainJob", ".spec.training.recipe.crops.globalScale") | {"description": ""} == {
        "description": "",
        "type": "array",
        "minItems": 2,
        "maxItems": 2,
        "items": {"type": "number", "minimum": 0, "exclusiveMinimum": True, "maximum": 1},
        "x-kubernetes-list-type": "atomic",
    }
    phase = at("PretrainJob", ".status.phase")
    assert "enum" not in phase
    assert "One of Invalid, Pending, Queued, Running, Stalled," in phase["description"]


def test_lists_that_hold_each_name_once_say_so():
    conditions = at("PretrainJob", ".status.conditions")
    assert (conditions["x-kubernetes-list-type"], conditions["x-kubernetes-list-map-keys"]) == ("map", ["type"])
    assert at("EvalSuite", ".spec.evaluations")["x-kubernetes-list-map-keys"] == ["name"]
    assert at("EvalSuite", ".spec.evaluations[].protocols")["x-kubernetes-list-type"] == "set"


@pytest.mark.parametrize("kind", ["PretrainJob", "Checkpoint"])
def test_columns_show_fields_that_exist(kind):
    resource = next(r for r in crd.RESOURCES if r.kind == kind)
    known = {path for path, _ in fields(resource.schema())} | {".metadata.creationTimestamp"}
    assert [c.name for c in resource.columns if c.path not in known] == []
    assert [path for path in (resource.scale or {}).values() if path not in known] == []


def test_a_new_status_fits_its_schema():
    status = PretrainJobStatus().document()
    assert set(status) == set(at("PretrainJob", ".status")["properties"])
    assert status["phase"] == "Pending"


def test_a_checkpoint_object_holds_what_the_run_reported():
    ref = CheckpointRef(
        step=100,
        samples=3200,
        uri="s3://b/run/step-0000000100/attempt-a",
        manifest_digest="sha256:" + "1a" * 32,
        created="2026-01-01T00:00:00Z",
    )
    made = CheckpointSpec.of(ref, job="fetal", job_uid="u1")
    assert made.id == "step-0000000100-1a1a1a1a1a1a"
    assert made.teacher_uri == "s3://b/run/step-0000000100/attempt-a/teacher.safetensors"
    assert made.ref == ref


def test_the_reference_has_a_row_for_a_field_and_the_numbers_of_the_presets():
    page = FILES["docs/api.md"]
    row = "| `maxNodes` | integer, ≥ 1, ≤ 1024 | `1` | Training grows up to this many. May change while the job runs. |"
    assert row in page
    assert "| `recipe.globalBatch` | 2048 | 128 | 32 |" in page
    assert "* training decides the result and cannot change; create another job with the new settings" in page


def test_the_cluster_sample_is_a_job_that_its_runtime_allows():
    file = api.parse_job_file((ROOT / "manifests/samples/cluster.yaml").read_text(), where="cluster.yaml")
    narrow(file.job, file.runtime)
    assert file.job.spec.training.recipe.micro_batch == 32
    assert [e.name for e in file.evaluations] == ["planes", "head"]
