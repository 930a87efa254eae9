"""The `finetune` protocol on images with planted stripes."""

import numpy as np
import pytest
import torch
from tuning_material import stripes

from sonoforge_trainer.contract import FinetuneOptions
from sonoforge_trainer.evaluate import finetune as module
from sonoforge_trainer.evaluate.finetune import Classifier, finetune
from sonoforge_trainer.evaluate.problem import best

SMALL = {"epochs": 8, "batch": 8, "learning_rate": 1e-3, "mixup": 0, "cutmix": 0, "augment": False}


def options(**changes):
    return FinetuneOptions(**{**SMALL, **changes})


def found(made, *, seed=0, **changes):
    return finetune(*made, options(**changes), resamples=20, seed=seed)


@pytest.mark.parametrize("source", ["teacher", "scratch"])
def test_planted_stripes_are_found(source):
    """A bar is as wide as a patch, so which way it runs is only in the positions, and 24 images do not teach that. That
    there are bars is found in every image: 2/3, where chance is 1/3 with a standard deviation of 0.1."""
    finding = found(stripes(), source=source, layer_decay=1.0)
    assert finding.scores["balanced_accuracy"].value > 0.6
    assert finding.scores["auroc_macro"].value > 0.7
    assert set(finding.details["recall"]) == {"across", "down", "plain"}


def test_planted_stripes_are_found_with_mixed_and_augmented_images():
    finding = found(stripes(), mixup=0.8, cutmix=1.0, augment=True, epochs=16, layer_decay=1.0)
    assert finding.scores["balanced_accuracy"].value > 0.6


def test_nothing_is_found_where_labels_are_shuffled():
    """Chance is 1/3; 24 fair guesses have a standard deviation of 0.1."""
    values = [found(stripes(seed=s, shuffled=True), epochs=4).scores["balanced_accuracy"].value for s in range(3)]
    assert np.mean(values) < 1 / 3 + 0.17


def test_the_numbers_are_the_same_each_time_and_others_with_another_seed():
    made = stripes()
    kind = {"epochs": 2, "mixup": 0.8, "cutmix": 1.0, "augment": True, "drop_path": 0.3}
    first = found(made, **kind)
    assert first == found(made, **kind)
    assert first.scores["auroc_macro"] != found(made, seed=1, **kind).scores["auroc_macro"]


def test_the_best_epoch_on_validation_is_kept_and_the_test_split_is_looked_at_once(monkeypatch):
    source, task = stripes()
    looked_at = []
    of_real = module.probabilities

    def counted(model, source, rows):
        looked_at.append("test" if rows is task.rows["test"] else "val")
        return of_real(model, source, rows)

    monkeypatch.setattr(module, "probabilities", counted)
    finding = found((source, task), epochs=5, warmup=0.9)
    candidates = finding.details["validation_balanced_accuracy"]
    assert list(candidates) == [f"epoch {n}" for n in range(1, 6)]
    assert finding.chosen == best(candidates)
    assert finding.scores["val_balanced_accuracy"].value == max(candidates.values()) > min(candidates.values())
    assert looked_at == ["val"] * 5 + ["test"]


def test_several_runs_are_reported_by_mean_and_deviation():
    finding = found(stripes(), runs=3, epochs=2)
    alone = found(stripes(), runs=1, epochs=2)
    assert finding.scores["auroc_macro"].deviation > 0
    assert alone.scores["auroc_macro"].deviation is None
    assert finding.scores["auroc_macro"].low <= finding.scores["auroc_macro"].value
    assert len(finding.details["chosen_of_each_run"]) == 3
    assert finding.samples is None, "outcomes of several trainings are not those of one model"
    right = np.mean([t == p for t, p in zip(alone.samples.truth, alone.samples.predicted, strict=True)])
    assert right == alone.scores["accuracy"].value


def test_from_scratch_takes_nothing_of_the_teacher_but_its_architecture():
    made, other = (stripes(), stripes())
    other = (type(other[0])(_noised(other[0].backbone), *_rest(other[0])), other[1])
    assert found(made, source="scratch", epochs=2) == found(other, source="scratch", epochs=2)
    assert found(made, epochs=2).scores != found(other, epochs=2).scores


def test_the_evaluated_backbone_is_left_alone():
    source, task = stripes()
    before = {name: value.clone() for name, value in source.backbone.state_dict().items()}
    found((source, task), epochs=1)
    assert all(torch.equal(value, source.backbone.state_dict()[name]) for name, value in before.items())
    assert not source.backbone.training
    assert source.backbone.config.drop_path == 0


def test_drop_path_is_applied_in_training_and_not_in_evaluation():
    source, _ = stripes()
    model = Classifier(source, 3, options(drop_path=0.5), 0)
    images = source.normalise(source.pixels(range(8)))
    backbone = model.backbone
    draws = [backbone([images], generator=torch.Generator().manual_seed(s))[0].cls for s in (0, 1)]
    assert not torch.equal(*draws)
    model.eval()
    assert torch.equal(backbone([images])[0].cls, source.backbone([images])[0].cls)


def _noised(backbone):
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1)
    return backbone


def _rest(source):
    return source.card, source.resolution, source.images, source.device
