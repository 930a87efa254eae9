"""The same run at 1, 2 and 3 processes over real gloo; 4 virtual ranks, so 3 processes host 2, 1 and 1."""

import pytest
import torch

VARIANTS = ("sinkhorn", "ema")

LOSS_TOLERANCE = 1e-5
"""Relative difference of a loss between world sizes within these steps, float32."""

NAN = float("nan")
GOLDEN = {  # total, DINO, iBOT, KoLeo, teacher entropy of each step; the fourth is poisoned
    "sinkhorn": [
        [9.51013, 6.22287, 3.26858, 0.18683, 3.61377],
        [9.24073, 6.17154, 3.04331, 0.25876, 3.58693],
        [10.49591, 6.6652, 3.7406, 0.90115, 3.6586],
        [NAN, 5.39609, NAN, 1.31322, 3.7575],
        [8.28225, 5.40337, 2.70232, 1.76555, 3.77663],
        [7.79094, 5.03597, 2.61535, 1.39622, 3.81415],
    ],
    "ema": [
        [4.7439, 2.43876, 2.28646, 0.18683, 0.62257],
        [4.64938, 2.2908, 2.33271, 0.25876, 0.78811],
        [2.97115, 0.38589, 2.48002, 1.05246, 0.28199],
        [NAN, 0.61939, NAN, 0.57306, 0.27787],
        [2.69149, 0.7087, 1.89445, 0.88341, 0.37541],
        [2.70044, 0.8578, 1.73472, 1.07923, 0.66327],
    ],
}
"""Made by this trainer, so they show that it has not changed; `test_step.py` shows that it is right."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_of_the_first_steps_are_these(worlds, variant):
    expected = torch.tensor(GOLDEN[variant], dtype=torch.float64)
    losses = worlds["1"][0][f"{variant}.losses"]
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_process_repeats_a_run_bit_for_bit(worlds, variant):
    first, again = worlds["1"][0], worlds["1b"][0]
    assert first.keys() == again.keys()
    for name in (name for name in first if name.startswith(variant)):
        assert torch.equal(first[name].nan_to_num(), again[name].nan_to_num()), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("world", ["2", "3"])
def test_losses_and_norms_do_not_depend_on_the_number_of_processes(runs, worlds, variant, world):
    alone, together = worlds["1"][0], worlds[world][0]
    steps = [step for step in range(runs.STEPS) if step != runs.POISONED_STEP]
    for kind in ("losses", "norms"):
        ours, expected = together[f"{variant}.{kind}"][steps], alone[f"{variant}.{kind}"][steps]
        assert expected.isfinite().all()
        torch.testing.assert_close(ours, expected, rtol=LOSS_TOLERANCE, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("world", ["2", "3"])
def test_all_processes_hold_the_same_state_and_agree_on_everything(worlds, variant, world):
    first, *others = worlds[world]
    for other in others:
        for name in (name for name in first if name.startswith(variant)):
            assert torch.equal(first[name].nan_to_num(), other[name].nan_to_num()), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("world", ["2", "3"])
def test_the_state_after_the_run_is_near_that_of_one_process(worlds, variant, world):
    alone, together = worlds["1"][0], worlds[world][0]
    for name in (name for name in alone if name.startswith((f"{variant}.state.student", f"{variant}.state.teacher"))):
        torch.testing.assert_close(together[name], alone[name], rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("world", ["1", "2", "3"])
def test_a_poisoned_step_changes_nothing_and_is_counted_once(runs, worlds, variant, world):
    for record in worlds[world]:
        assert record[f"{variant}.unchanged"].all()
        assert record[f"{variant}.flags"][:, :2].tolist() == [[1, 0], [1, 0], [1, 0], [0, 1], [1, 1], [1, 1]]
        assert record[f"{variant}.state.adam.step"] == runs.STEPS - 1
        assert record[f"{variant}.losses"][runs.POISONED_STEP, 0].isnan()


@pytest.mark.parametrize("world", ["1", "2", "3"])
def test_what_one_process_asks_for_all_processes_agree_on(worlds, world):
    for record in worlds[world]:
        assert record["ema.flags"][:, 2].tolist() == [0, 0, 1, 0, 0, 0]
        assert record["ema.flags"][:, 3].tolist() == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("world", "variant", "expected"),
    [("1", "sinkhorn", 0), ("1", "ema", 0), ("2", "ema", 1), ("2", "sinkhorn", 5), ("3", "sinkhorn", 5)],
)
def test_a_step_takes_one_reduction_and_sinkhorn_four_more(worlds, world, variant, expected):
    assert worlds[world][0][f"{variant}.collectives"].tolist() == [expected] * 6
