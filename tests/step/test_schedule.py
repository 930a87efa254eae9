"""Schedules over samples against an independent construction of the reference's per-iteration arrays."""

import math

import numpy as np
import pytest

from sonoforge_trainer.contract.config import TrainConfig
from sonoforge_trainer.schedule import Schedules

SHARDS = {"shards": "file:///data/shards.json"}
DINOV2_SHORT = TrainConfig.resolve({"data": SHARDS, "recipe": {"preset": "dinov2-short"}})


def cosine_array(base, final, total, warmup=0, start=0.0):
    """One array entry per iteration: a line that includes both ends, then a cosine that stops short of its end."""
    k = np.arange(total - warmup)
    return np.concatenate(
        [np.linspace(start, base, warmup), final + 0.5 * (base - final) * (1 + np.cos(np.pi * k / len(k)))]
    )


@pytest.mark.parametrize("step", [0, 1, 1249, 1250, 12_499, 12_500, 37_499, 37_500, 62_500, 124_999])
def test_dinov2_short_equals_the_reference_arrays(step):
    epoch = 1250
    lr = cosine_array(0.004 * math.sqrt(2048 / 1024), 1e-6, 100 * epoch, warmup=10 * epoch)
    last_layer_lr = lr.copy()
    last_layer_lr[:epoch] = 0
    temperature = np.concatenate([np.linspace(0.04, 0.07, 30 * epoch), np.full(70 * epoch, 0.07)])

    values = Schedules(DINOV2_SHORT).at(step)

    assert values.lr == pytest.approx(lr[step], rel=1e-12, abs=1e-18)
    assert values.last_layer_lr == pytest.approx(last_layer_lr[step], rel=1e-12, abs=1e-18)
    assert values.weight_decay == pytest.approx(cosine_array(0.04, 0.4, 100 * epoch)[step], rel=1e-12)
    assert values.teacher_momentum == pytest.approx(cosine_array(0.992, 1.0, 100 * epoch)[step], rel=1e-12)
    assert values.teacher_temperature == pytest.approx(temperature[step], rel=1e-12)


def test_dinov2_short_has_the_published_end_points():
    schedules = Schedules(DINOV2_SHORT)
    first, peak, after = schedules.at(0), schedules.at(12_499), schedules.at(125_000)
    assert (first.lr, first.teacher_momentum, first.teacher_temperature) == (0, 0.992, 0.04)
    assert first.weight_decay == pytest.approx(0.04, rel=1e-14)
    assert peak.lr == pytest.approx(5.656854e-3, rel=1e-6)
    assert (after.lr, after.weight_decay, after.teacher_momentum, after.teacher_temperature) == (1e-6, 0.4, 1.0, 0.07)


def test_a_frozen_last_layer_learns_from_the_first_step_after_the_freeze():
    schedules = Schedules(DINOV2_SHORT)
    assert schedules.at(1249).last_layer_lr == 0
    assert schedules.at(1250).last_layer_lr == schedules.at(1250).lr > 0


def test_a_changed_batch_keeps_the_curves_over_samples_and_scales_the_rate_by_its_root():
    half = TrainConfig.resolve({"data": SHARDS, "recipe": {"preset": "dinov2-short", "globalBatch": 1024}})
    full_values, half_values = Schedules(DINOV2_SHORT).at(60_000), Schedules(half).at(120_000)
    assert half_values.weight_decay == full_values.weight_decay
    assert half_values.teacher_momentum == full_values.teacher_momentum
    assert half_values.lr - 1e-6 == pytest.approx((full_values.lr - 1e-6) / math.sqrt(2), rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"warmupSamples": 0}, 0.004 * math.sqrt(1 / 32)),
        ({"warmupSamples": 32}, 0.0),  # linspace(0, peak, 1) is [0]
        ({"warmupSamples": 100}, 0.0),
    ],
)
def test_short_warm_ups_start_like_the_reference(schedule, expected):
    training = TrainConfig.resolve({"data": SHARDS, "recipe": {"preset": "tiny", "schedule": schedule}})
    assert Schedules(training).at(0).lr == pytest.approx(expected)


def test_a_length_that_is_no_multiple_of_the_batch_never_passes_the_peak():
    training = TrainConfig.resolve({"data": SHARDS, "recipe": {"preset": "tiny", "schedule": {"warmupSamples": 111}}})
    rates = [Schedules(training).at(step).lr for step in range(8)]
    peak = 0.004 * math.sqrt(1 / 32)
    assert max(rates) <= peak
    assert rates[:4] == sorted(rates[:4])
    assert rates[3] == peak


def test_without_weights_to_start_from_the_backbone_learns_from_the_first_step():
    schedules = Schedules(DINOV2_SHORT)
    assert all(schedules.at(step).backbone_lr == schedules.at(step).lr for step in (0, 1, 1250, 62_500))


@pytest.mark.parametrize(
    ("given", "frozen", "ramp"),
    [({}, 12_500, 2_500), ({"freezeBackboneSamples": 0, "rampBackboneSamples": 0}, 0, 0)],
)
def test_in_continued_pretraining_the_heads_learn_first_and_the_backbone_then_ramps_up(given, frozen, ramp):
    """Steps of 2048 images: a tenth of 125,000 steps frozen, then a fiftieth of growing."""
    init = {"uri": "file:///data/weights.safetensors", **given}
    schedules = Schedules(TrainConfig.resolve({"data": SHARDS, "recipe": {"preset": "dinov2-short"}, "init": init}))
    factors = {}
    for step in (frozen - 1, frozen, frozen + ramp // 2, frozen + ramp, 100_000):
        values = schedules.at(max(step, 1))
        assert values.lr > 0
        factors[step] = values.backbone_lr / values.lr
    if frozen:
        assert factors[frozen - 1] == factors[frozen] == 0
        assert factors[frozen + ramp // 2] == pytest.approx(0.5)
    assert factors[frozen + ramp] == factors[100_000] == 1
