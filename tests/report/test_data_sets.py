"""The data card and the confusion matrices of the page."""

from __future__ import annotations

import json

import pytest

from sonoforge_trainer.contract import (
    CheckpointRef,
    CheckpointSummary,
    Evaluation,
    EvaluationRequest,
    EvaluationResult,
)
from sonoforge_trainer.report.confusion import confusions_of
from sonoforge_trainer.report.data_sets import data_sets
from sonoforge_trainer.report.runs import Evaluated
from sonoforge_trainer.shards.phantoms import PhantomRule
from sonoforge_trainer.shards.plan import PlanRule
from sonoforge_trainer.shards.reader import read_manifest
from sonoforge_trainer.shards.synth import build_phantoms
from sonoforge_trainer.storage import Storage

SHA = "sha256:" + "cd" * 32


@pytest.fixture
def made(tmp_path) -> EvaluationResult:
    """The result of an evaluation on a real set of 24 phantoms."""
    build_phantoms(tmp_path.as_uri(), PhantomRule(24, size=32, frames=1), PlanRule(24, 0, (0.5, 0.25, 0.25)), Storage())
    uri = f"{tmp_path.as_uri()}/shards.json"
    return result_of(uri, read_manifest(uri, Storage()).dataset_digest)


def result_of(shards: str, digest: str, **changes: object) -> EvaluationResult:
    evaluation = Evaluation(name="phantoms", shards=shards, protocols=("knn",))
    request = EvaluationRequest(checkpoint_uri="file:///c", checkpoint_digest=SHA, evaluation=evaluation)
    values = {"request": request, "step": 1, "samples": 1, "counts": {"train": 12, "val": 6, "test": 6}, "scores": {}}
    return EvaluationResult(**{**values, "dataset_digest": digest, **changes})


def card(digest: str, **changes: object) -> str:
    document = {
        "format": "sonoforge.datacard/v1",
        "name": "phantoms",
        "importer": "folders",
        "maskClasses": [],
        "title": "Phantoms of a test",
        "licence": "CC-BY-4.0",
        "citation": "Somebody, 2026",
        "source": "https://example.org",
        "datasetDigest": digest,
        "splitRule": "by patient",
        "splits": {
            "test": {"samples": 6, "patients": 3, "clips": 0, "masks": 0, "labels": {"head": 4, "femur": 2}},
            "val": {"samples": 99, "patients": 9, "clips": 0, "masks": 0, "labels": {}},
        },
        "findings": [
            {"code": "duplicates", "state": "warning", "count": 2, "text": "images occur twice"},
            {"code": "rgba", "state": "ok", "count": 0, "text": "images have an alpha channel"},
        ],
    }
    return json.dumps(document | changes)


def test_a_set_without_a_card_is_described_by_its_manifest_and_the_results(made):
    (found,) = data_sets([made, made], Storage())
    assert found.synthetic
    assert found.licence == "Apache-2.0"
    assert {split: counts.images for split, counts in found.splits.items()} == {"train": 12, "val": 6, "test": 6}
    assert found.looked_for is None


def test_a_card_adds_counts_findings_and_the_rule_of_the_splits(made, tmp_path):
    (tmp_path / "card.json").write_text(card(made.dataset_digest))
    (found,) = data_sets([made], Storage())
    assert (found.name, found.licence, found.split_rule) == ("Phantoms of a test", "CC-BY-4.0", "by patient")
    assert (found.splits["test"].patients, found.splits["test"].labels) == (3, {"head": 4, "femur": 2})
    assert found.splits["val"].patients is None, "the card counts other images than were used"
    assert found.findings == (("warning", 2, "images occur twice"),)
    assert found.looked_for == 2


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        card(SHA),
        card("{digest}", format="another/v1"),
        card("{digest}", splits=7, findings=[3, "x"], title=["x"]),
        card("{digest}", splits={"test": {"samples": "6"}, "val": None}, findings=None),
    ],
)
def test_a_card_of_another_set_or_of_another_form_hurts_nobody(made, tmp_path, text):
    (tmp_path / "card.json").write_text(text.replace("{digest}", made.dataset_digest))
    (found,) = data_sets([made], Storage())
    assert found.splits["test"].images == 6
    assert found.splits["test"].patients is None


def test_a_set_that_is_gone_or_was_replaced_says_nothing_of_its_licence(made):
    gone = result_of("file:///nothing/shards.json", SHA)
    replaced = made.model_copy(update={"dataset_digest": SHA})
    for result in (gone, replaced):
        (found,) = data_sets([result], Storage())
        assert (found.name, found.licence, found.synthetic) == ("", "", False)


def evaluated(details: dict[str, object]) -> dict[str, Evaluated]:
    ref = CheckpointRef(step=1, samples=1, uri="file:///c", manifest_digest=SHA, created="")
    result = result_of("file:///s/shards.json", SHA, details=details, chosen={"knn": "k=10"})
    return {"phantoms": Evaluated(result, "file:///c/eval", CheckpointSummary(ref=ref))}


def test_a_matrix_is_shaded_by_the_share_of_its_row():
    (found,) = confusions_of(evaluated({"knn": {"confusion": {"b": [1, 3], "a": [4, 0]}}}))
    assert (found.classes, found.counts, found.chosen, found.total) == (("a", "b"), ((4, 0), (1, 3)), "k=10", 8)
    assert [found.heat(r, c) for r in (0, 1) for c in (0, 1)] == [10, 0, 2, 8]
    assert (found.recall(0), found.recall(1)) == (1.0, 0.75)


def test_a_class_without_test_images_has_no_recall():
    (found,) = confusions_of(evaluated({"knn": {"confusion": {"a": [4, 0], "b": [0, 0]}}}))
    assert (found.recall(1), found.heat(1, 0)) == (None, 0)


@pytest.mark.parametrize("matrix", [None, {}, [[1]], {"a": [1, 2]}, {"a": ["1"]}, {"a": 1}])
def test_details_of_another_form_are_passed_over(matrix):
    assert confusions_of(evaluated({"knn": {"confusion": matrix}, "health": {}, "x": 3})) == []
