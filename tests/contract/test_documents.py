"""Manifests, requests and results hold what they promise."""

from __future__ import annotations

import pytest

from sonoforge_trainer.contract import (
    CheckpointRef,
    ContractError,
    Evaluation,
    EvaluationRequest,
    Progress,
    Shard,
    ShardManifest,
    checkpoint_prefix,
    dataset_digest,
    is_validation_score,
    parse_prefix,
    selection_score,
    split_score,
)

SHA = "sha256:" + "ab" * 32


def shard(**changes: object) -> Shard:
    fields = {
        "name": "a-000000.tar",
        "bytes": 4096,
        "sha256": SHA,
        "keys": ("Jane Doe", "b"),
        "offsets": (512, 2048),
        "lengths": (100, 100),
        "clips": (0, 1),
        "patients": ("", ""),
    }
    return Shard.parse(fields | changes, show_values=False)


def manifest(*shards: Shard, **changes: object) -> dict[str, object]:
    return {
        "name": "set",
        "samples": sum(s.samples for s in shards),
        "bytes": sum(s.bytes for s in shards),
        "datasetDigest": dataset_digest(shards),
        "shards": [s.document() for s in shards],
    } | changes


def test_a_manifest_with_right_totals_and_digest_is_accepted():
    assert ShardManifest.parse(manifest(shard())).samples == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 3}, "samples is 3, but the shards add up to 2"),
        ({"datasetDigest": SHA}, "datasetDigest does not match the shards"),
    ],
)
def test_a_manifest_that_was_edited_is_refused(changes, message):
    with pytest.raises(ContractError, match=message):
        ShardManifest.parse(manifest(shard(), **changes), show_values=False)


def test_an_edited_key_changes_the_dataset_digest():
    """Keys, clips and patients decide the sample order, so they are part of what a data set is."""
    assert dataset_digest((shard(),)) != dataset_digest((shard(keys=("a", "c")),))
    assert dataset_digest((shard(),)) != dataset_digest((shard(clips=(0, 2)),))


def test_errors_about_shards_do_not_show_keys():
    with pytest.raises(ContractError) as error:
        shard(clips=("Jane Doe", 1))
    assert "Jane" not in str(error.value)
    assert "clips.0: found a value that is not shown here. Allowed: a whole number" in str(error.value)


def test_a_checkpoint_prefix_is_read_back_from_any_object_below_it():
    prefix = checkpoint_prefix("s3://b/run/", 12345, "01ab")
    assert prefix == "s3://b/run/step-0000012345/attempt-01ab"
    assert parse_prefix(f"{prefix}/COMMIT") == (12345, "01ab")
    assert parse_prefix("s3://b/run/other") is None


def test_a_request_has_one_identity_for_one_checkpoint_and_one_evaluation():
    def request(**changes: object) -> EvaluationRequest:
        evaluation = Evaluation(name="planes", shards="s3://b/e/shards.json", protocols=("knn",))
        return EvaluationRequest(
            checkpoint_uri="s3://b/run/step-1/attempt-a",
            checkpoint_digest=SHA,
            evaluation=evaluation.model_copy(update=changes),
        )

    assert request().id == request().id
    assert request().id != request(seed=1).id
    assert request().result_uri == f"s3://b/run/step-1/attempt-a/eval/planes-{request().id}.json"


def test_the_id_of_a_checkpoint_sorts_by_step():
    ids = [CheckpointRef(step=s, samples=s, uri="s3://b/r", manifest_digest=SHA, created="").id for s in (9, 10, 100)]
    assert ids == sorted(ids)


def test_a_score_name_is_split_at_its_protocol():
    assert split_score("hc18-head-segment-probe/dice") == ("hc18-head", "segment-probe", "dice")
    assert split_score("hc18-head-segment/5shot_dice") == ("hc18-head", "segment", "5shot_dice")
    with pytest.raises(ValueError, match="is not a score"):
        split_score("planes/f1")


@pytest.mark.parametrize(
    ("score", "decides"),
    [
        ("planes-knn/f1_macro", "planes-knn/val_f1_macro"),
        ("knn/f1_macro", "knn/val_f1_macro"),
        ("hc18-head-segment-probe/dice_mean", "hc18-head-segment-probe/val_dice_mean"),
        ("hc18-segment/5shot_dice_mean", "hc18-segment/val_5shot_dice_mean"),
        ("planes-finetune/f1_macro", "planes-finetune/val_f1_macro"),
        ("planes-health/rankme", "planes-health/rankme"),
        ("health/teacher_entropy", "health/teacher_entropy"),
        ("ward-health-knn/f1_macro", "ward-health-knn/val_f1_macro"),
    ],
)
def test_a_score_is_selected_by_its_counterpart_on_validation_unless_it_needs_no_labels(score, decides):
    assert selection_score(score) == decides
    assert is_validation_score(decides) is (decides != score)
    assert not is_validation_score(score)


def test_progress_survives_json():
    progress = Progress(step=3, losses={"dino": 1.5}, quarantined=("s3://b/r",))
    assert Progress.from_json(progress.to_json()) == progress
