"""Which samples an evaluation uses, and which sets it refuses."""

import hashlib

import pytest

from sonoforge_trainer.contract import Evaluation
from sonoforge_trainer.evaluate.dataset import Record, Selection, Table, refuse_leaks, select
from sonoforge_trainer.evaluate.errors import EvaluationConfigError, EvaluationDataError
from sonoforge_trainer.shards.reader import read_manifest


def record(split, *, patient="", clip=0, image="", mask=None, **fields):
    return Record(split, fields, patient, clip, hashlib.sha256(f"{image}{clip}".encode()).digest(), mask)


@pytest.fixture
def manifest(phantoms, storage):
    return read_manifest(phantoms, storage)


def evaluation(**changes):
    return Evaluation(name="set", shards="file:///set/shards.json", protocols=("knn",), **changes)


def test_a_patient_in_two_splits_is_refused_with_counts_and_without_a_name():
    records = [
        record("train", patient="0a1b2c", clip=1),
        record("test", patient="0a1b2c", clip=2),
        record("val", patient="ffffff", clip=3),
    ]
    with pytest.raises(EvaluationDataError) as caught:
        refuse_leaks(records)
    assert str(caught.value).startswith(
        "1 patient is in more than one split (0 in train and val, 1 in train and test, 0 in val and test)"
    )
    assert "0a1b2c" not in str(caught.value)


def test_unknown_patients_are_not_one_patient():
    refuse_leaks([record("train", clip=1), record("test", clip=2)])


def test_frames_of_a_clip_in_two_splits_are_refused():
    with pytest.raises(EvaluationDataError, match="1 clip is in more than one split"):
        refuse_leaks([record("train", clip=7, image="a"), record("val", clip=7, image="b")])


def test_the_same_bytes_in_two_splits_are_refused_and_counted():
    same = hashlib.sha256(b"image").digest()
    records = [Record(split, {}, "", clip, same, None) for clip, split in enumerate(["train", "test", "train"])]
    with pytest.raises(EvaluationDataError, match=r"1 image file is in more than one split \(.*1 in train and test"):
        refuse_leaks(records)


def test_where_keeps_the_samples_with_these_texts_and_leaks_outside_of_it_do_not_matter(manifest):
    records = [
        record("train", clip=1, one_scanner="1", label="a"),
        record("test", clip=2, one_scanner="1", label="b"),
        record("test", clip=1, one_scanner="0", label="b"),
    ]
    chosen = select(Table(manifest, tuple(records)), evaluation(where={"one_scanner": "1"}))
    assert chosen.counts == {"train": 1, "val": 0, "test": 1}


def test_a_field_that_no_sample_has_is_a_mistake_in_the_request(manifest):
    table = Table(manifest, (record("train", label="a", scanner="x"),))
    with pytest.raises(EvaluationConfigError, match=r"where\.scaner: no sample has it; fields: label, scanner"):
        select(table, evaluation(where={"scaner": "x"}))
    with pytest.raises(EvaluationDataError, match="no sample passes `where`"):
        select(table, evaluation(where={"scanner": "y"}))


def test_classes_are_label_texts_in_sorted_order_whatever_numbers_a_repository_gave_them(manifest):
    records = (
        record("train", clip=1, label="10"),
        record("train", clip=2, label="9"),
        record("test", clip=3, label="10"),
    )
    classes, targets = select(Table(manifest, records), evaluation()).labels("label")
    assert classes == ("10", "9")
    assert targets["train"].tolist() == [0, 1]
    assert targets["test"].tolist() == [0]


def test_a_missing_split_is_named(manifest):
    chosen = select(Table(manifest, (record("train", clip=1), record("test", clip=2))), evaluation())
    with pytest.raises(EvaluationDataError, match="no usable sample in val"):
        chosen.require_splits(("train", "val", "test"), "knn")


def test_groups_are_patients_and_clips_where_the_patient_is_not_known(manifest):
    records = (
        record("test", patient="aa", clip=1),
        record("test", patient="aa", clip=2),
        record("test", clip=3),
        record("test", clip=4),
    )
    chosen = select(Table(manifest, records), evaluation())
    assert isinstance(chosen, Selection)
    first, second, third, fourth = chosen.groups()["test"]
    assert first == second
    assert len({first, third, fourth}) == 3
