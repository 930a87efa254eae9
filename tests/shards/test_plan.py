"""Splits are by patient, shards are random and equal, clips are spread, and only the seed decides."""

from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonoforge_trainer.shards.faults import SourceError
from sonoforge_trainer.shards.plan import PlanRule, arrange, parse_splits
from sonoforge_trainer.shards.sources import Row


def _rows(patients: int, clips: int = 1, frames: int = 1) -> list[Row]:
    triples = [(p, c, f) for p in range(patients) for c in range(clips) for f in range(frames)]
    return [
        Row(n, f"{n}", None, patient=f"patient-{p}", clip=f"{c}" if frames > 1 else "")
        for n, (p, c, _) in enumerate(triples, 1)
    ]


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 5), st.integers(1, 17), st.integers(0, 3))
def test_every_sample_is_placed_once_and_shards_are_equally_full(
    patients: int, clips: int, frames: int, shard_samples: int, seed: int
) -> None:
    rows = _rows(patients, clips, frames)
    plan = arrange(rows, PlanRule(shard_samples, seed))
    placed = [p for shard in plan for p in shard]
    assert sorted(p.row.number for p in placed) == [row.number for row in rows]
    assert [p.position for p in placed] == list(range(len(rows)))
    sizes = [len(shard) for shard in plan]
    assert max(sizes) <= shard_samples
    assert max(sizes) - min(sizes) <= 1
    assert len({p.clip for p in placed}) == patients * clips * (1 if frames > 1 else frames)


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(2, 8))
def test_a_clips_frames_lie_in_as_many_shards_as_there_can_be(patients: int, frames: int) -> None:
    plan = arrange(_rows(patients, 2, frames), PlanRule(shard_samples=7, seed=1))
    spread = defaultdict(Counter)
    for index, shard in enumerate(plan):
        for placed in shard:
            spread[placed.clip][index] += 1
    for counts in spread.values():
        assert max(counts.values()) <= -(-frames // len(plan))


def test_the_order_is_the_same_for_ever() -> None:
    """A change here changes every data set that anybody builds again."""
    plan = arrange(_rows(10), PlanRule(shard_samples=4, seed=0))
    assert [[p.row.number for p in shard] for shard in plan] == [[7, 6, 4, 9], [2, 10, 3], [1, 8, 5]]
    assert plan != arrange(_rows(10), PlanRule(shard_samples=4, seed=1))


def test_the_same_clip_name_of_two_patients_is_two_clips() -> None:
    rows = [Row(1, "a", None, patient="p", clip="1"), Row(2, "b", None, patient="q", clip="1")]
    assert sorted(p.clip for shard in arrange(rows, PlanRule()) for p in shard) == [0, 1]


def test_splits_are_drawn_by_patient_in_the_given_fractions() -> None:
    plan = arrange(_rows(20, 1, 3), PlanRule(splits=(0.7, 0.1, 0.2)))
    found = defaultdict(set)
    for placed in plan[0]:
        found[placed.row.split].add(placed.row.patient)
    assert {name: len(patients) for name, patients in found.items()} == {"train": 14, "val": 2, "test": 4}
    assert len(set.union(*found.values())) == 20


def test_every_wanted_split_gets_a_patient() -> None:
    plan = arrange(_rows(3), PlanRule(splits=(0.98, 0.01, 0.01)))
    assert sorted(p.row.split for p in plan[0]) == ["test", "train", "val"]
    with pytest.raises(SourceError, match="2 patients cannot be drawn into 3 splits"):
        arrange(_rows(2), PlanRule(splits=(0.98, 0.01, 0.01)))


def test_frames_of_a_clip_without_a_patient_stay_together() -> None:
    rows = [Row(n, f"{n}", None, clip=f"clip-{n // 5}") for n in range(50)]
    found = defaultdict(set)
    for placed in arrange(rows, PlanRule(splits=(0.6, 0.2, 0.2)))[0]:
        found[placed.row.clip].add(placed.row.split)
    assert all(len(splits) == 1 for splits in found.values())


def test_a_validation_split_is_taken_from_training_patients_only() -> None:
    rows = [Row(n, f"{n}", None, patient=f"p{n // 2}", split="train" if n < 40 else "test") for n in range(50)]
    plan = arrange(rows, PlanRule(validation=0.1))
    assert Counter(p.row.split for p in plan[0]) == {"train": 36, "val": 4, "test": 10}
    assert all(p.row.split == "test" for p in plan[0] if p.row.number >= 40)


def test_a_patient_in_two_splits_is_an_error_that_says_how_many_and_not_who() -> None:
    rows = [Row(n, f"{n}", None, patient=f"DOE^JANE{n % 3}", split="train" if n < 4 else "test") for n in range(6)]
    with pytest.raises(SourceError, match=r"^2 patients are in more than one split; .*--splits") as caught:
        arrange(rows, PlanRule())
    assert "DOE" not in str(caught.value)


def test_a_clip_in_two_splits_is_an_error() -> None:
    rows = [Row(1, "a", None, clip="1", split="train"), Row(2, "b", None, clip="1", split="val")]
    with pytest.raises(SourceError, match="1 clip is in more than one split"):
        arrange(rows, PlanRule())


def test_given_and_drawn_splits_exclude_each_other() -> None:
    with pytest.raises(SourceError, match="the source has splits and --splits draws new ones"):
        arrange([Row(1, "a", None, split="train")], PlanRule(splits=(1.0, 0.0, 0.0)))
    with pytest.raises(SourceError, match="has a val split already"):
        arrange([Row(1, "a", None, split="val")], PlanRule(validation=0.1))


@pytest.mark.parametrize("text", ["", "0.8,0.2", "0.8,0.1,0.2", "0,0.5,0.5", "a,b,c", "-1,1,1"])
def test_fractions_that_do_not_add_up_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="found"):
        parse_splits(text)


def test_fractions_are_read() -> None:
    assert parse_splits("0.8,0.1,0.1") == (0.8, 0.1, 0.1)
