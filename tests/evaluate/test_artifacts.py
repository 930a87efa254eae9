"""What an evaluation leaves for people to look at: right numbers, the same every time, and no identifier."""

import io

import numpy as np
import pytest
import torch
from evaluation_material import request_of
from PIL import Image

from sonoforge_trainer.contract import Evidence, Gallery, SampleConfusions, SegmentOptions
from sonoforge_trainer.evaluate.evidence import MAX_NUMBERS, classified, segmented
from sonoforge_trainer.evaluate.metrics import balanced_accuracy, confusion_matrix
from sonoforge_trainer.evaluate.overlap import foreground_dice
from sonoforge_trainer.evaluate.overlays import COLOURS, extremes, painted
from sonoforge_trainer.evaluate.run import evaluate
from sonoforge_trainer.shards.reader import read_manifest

CPU = torch.device("cpu")


@pytest.fixture
def left(checkpoint, phantoms, storage):
    """(result, evidence, gallery, function that reads a picture) of an evaluation with every kind of artifact."""
    few = SegmentOptions(steps=2, batch=4, validate_every=1, channels=8, backbone="tuned", shots=(2,))
    request = request_of(
        checkpoint, phantoms, "knn", "fewshot", "segment-probe", "segment", segment=few, seeds=1, bootstrap=0
    )
    result = evaluate(request, storage, CPU)
    folder = f"{checkpoint[0]}/eval"
    evidence = Evidence.from_json(storage.read(f"{folder}/{result.artifacts.evidence}"))
    gallery = Gallery.from_json(storage.read(f"{folder}/{result.artifacts.gallery}"))
    return result, evidence, gallery, lambda name: storage.read(f"{folder}/{name}")


def test_the_scores_of_the_result_follow_from_the_outcomes_of_single_samples(left):
    result, evidence, _, _ = left
    assert set(evidence.protocols) == {"knn", "segment-probe", "segment"}, "few-shot has several draws"
    knn = evidence.protocols["knn"]
    confusion = confusion_matrix(np.array(knn.truth), np.array(knn.predicted), len(knn.classes))
    assert float(balanced_accuracy(confusion)) == result.scores["knn/balanced_accuracy"].value
    for protocol in ("segment-probe", "segment"):
        segment = evidence.protocols[protocol]
        counts = np.array(segment.counts).reshape(-1, len(segment.classes), len(segment.classes))
        assert foreground_dice(counts) == pytest.approx(result.scores[f"{protocol}/dice_foreground"].value)
        assert len(knn.truth) == len(segment.counts) == result.counts["test"]


def test_neighbours_are_the_nearest_training_images_in_falling_order(left):
    _, _, gallery, read = left
    sheet = gallery.neighbours
    assert len(sheet.rows) == 6
    for row in sheet.rows:
        found = [near.similarity for near in row.neighbours]
        assert len(found) == 5
        assert found == sorted(found, reverse=True)
        assert all(near.label for near in row.neighbours)
    with Image.open(io.BytesIO(read(sheet.picture))) as picture:
        assert picture.size == (6 * 84 - 4, 6 * 84 - 4)


def test_overlays_are_the_images_with_the_highest_and_the_lowest_dice_of_each_protocol_that_segments(left):
    _, evidence, gallery, read = left
    assert [sheet.protocol for sheet in gallery.overlays] == ["segment-probe", "segment"]
    for sheet in gallery.overlays:
        found = extremes(evidence.protocols[sheet.protocol])
        assert sheet.best == tuple(value for _, value in found.best)
        assert sheet.worst == tuple(value for _, value in found.worst)
        assert min(sheet.best) > max(sheet.worst)
        with Image.open(io.BytesIO(read(sheet.picture))) as picture:
            assert picture.size == (6 * 132 - 4, 2 * 132 - 4)
            pixels = np.asarray(picture).astype(int)
        paint = [int(sheet.colours[0][i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels[:128] - paint).max(-1) < 20).any(), "the true masks are drawn with their colour"


def test_no_artifact_names_a_patient_or_a_sample_and_none_is_large(left, phantoms, storage):
    result, evidence, gallery, read = left
    manifest = read_manifest(phantoms, storage)
    texts = [evidence.to_json(), gallery.to_json(), *(result.artifacts.document().values())]
    names = {n for shard in manifest.shards for n in (*shard.patients, *shard.keys) if n}
    assert len(names) > 100
    assert not [name for name in names for text in texts if name in text]
    sheets = [gallery.neighbours.picture, *(sheet.picture for sheet in gallery.overlays)]
    assert len(sheets) == 3
    assert max(len(read(name)) for name in sheets) < 600_000


def test_the_same_evaluation_leaves_the_same_bytes(left, checkpoint, phantoms, storage):
    result, _, gallery, read = left
    names = [*result.artifacts.document().values(), *(sheet.picture for sheet in gallery.overlays)]
    before = [read(name) for name in names]
    storage.delete(result.request.result_uri)
    again = evaluate(result.request, storage, CPU)
    assert again.scores == result.scores
    assert [read(name) for name in names] == before


def test_patients_are_numbered_by_their_first_image_and_not_by_their_hash():
    found = classified(("a", "b"), np.array([7, 2, 7, 5]), np.array([0, 1, 0, 1]), np.array([0, 0, 0, 1]))
    assert found.groups == (0, 1, 0, 2)


def test_outcomes_that_would_be_too_large_are_left_out():
    samples = MAX_NUMBERS // 3 + 1
    assert classified(("a",), *[np.zeros(samples, np.int64)] * 3) is None
    assert segmented(("a", "b"), np.zeros(2, np.int64), np.zeros((MAX_NUMBERS // 4 + 1, 2, 2), np.int64)) is None


def test_an_image_is_best_or_worst_but_not_both():
    counts = ((5, 0, 0, 5), (9, 0, 1, 0), (5, 0, 3, 2), (8, 2, 0, 0))
    samples = SampleConfusions(classes=("background", "head"), groups=(0, 1, 2, 3), counts=counts)
    found = extremes(samples)
    assert found.best == ((0, 1.0), (2, pytest.approx(4 / 7, abs=1e-4)))
    assert [number for number, _ in found.worst] == [3, 1]
    only = SampleConfusions(classes=("background", "head"), groups=(0,), counts=((9, 0, 0, 0),))
    assert extremes(only) is None, "an image without foreground has no Dice"


def test_paint_fills_a_class_lightly_and_marks_its_edge():
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 2:6] = 1
    picture = painted(np.zeros((8, 8, 3), np.uint8), mask, ["#ff0000"])
    assert picture[0, 0].tolist() == [0, 0, 0]
    assert 60 < picture[3, 3, 0] < 120
    assert picture[2, 2, 0] > 240
    assert all(len(colour) == 7 for colour in COLOURS)


def test_outcomes_that_do_not_fit_each_other_are_refused():
    with pytest.raises(ValueError, match="as many truths"):
        SampleConfusions(classes=("a",), groups=(0, 1), truth=(0,), predicted=(0, 0))
    with pytest.raises(ValueError, match="not below 2"):
        SampleConfusions(classes=("a", "b"), groups=(0,), truth=(2,), predicted=(0,))
    with pytest.raises(ValueError, match="needs 4 numbers"):
        SampleConfusions(classes=("a", "b"), groups=(0,), counts=((1, 2),))
