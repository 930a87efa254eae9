"""The `finetune` protocol on images with planted stripes."""

import numpy as np
import pytest
import torch
from tuning_material import SIDE, SIZES, rows_by_split, stripes, tunable

from sonoforge_trainer.contract import FinetuneOptions
from sonoforge_trainer.evaluate import finetune as module
from sonoforge_trainer.evaluate.finetune import Classifier, FinetuneTask, finetune
from sonoforge_trainer.evaluate.problem import best

SMALL = {"epochs": 8, "batch": 8, "learning_rate": 1e-3, "mixup": 0, "cutmix": 0, "augment": False}
LEVELS = ("0.2", "0.4", "0.8")
MIXED = {"mixup": 0.8, "cutmix": 1.0, "augment": True, "epochs": 16}
KINDS = {
    "from the teacher": {"label_smoothing": 0.0},
    "from scratch": {"source": "scratch", "label_smoothing": 0.0},
    "with layer decay": {"layer_decay": 0.65},
    "with mixed and augmented images": MIXED,
    "from scratch, with mixed and augmented images": {"source": "scratch", **MIXED},
}
OTHERS = {
    "source": "scratch",
    "epochs": 3,
    "batch": 6,
    "learning_rate": 2e-3,
    "layer_decay": 0.5,
    "weight_decay": 1.0,
    "warmup": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.3,
    "drop_path": 0.5,
    "augment": True,
}
"""A value of each option other than that of a plain training."""


def options(**changes):
    return FinetuneOptions(**{**SMALL, **changes})


def found(made, *, seed=0, **changes):
    return finetune(*made, options(**changes), resamples=20, seed=seed)


@pytest.mark.parametrize("kind", KINDS)
def test_planted_stripes_are_found(kind):
    """A bar is as wide as a patch, so which way it runs is only in the positions, and 24 images do not teach that. That
    there are bars is found in every image: 2/3. Of 24 guesses at 1/3, 15 or more are right in 0.3 % of all cases."""
    finding = found(stripes(), **{"layer_decay": 1.0, **KINDS[kind]})
    assert finding.scores["balanced_accuracy"].value >= 15 / 24
    assert finding.scores["auroc_macro"].value > 0.7
    assert set(finding.details["recall"]) == {"across", "down", "plain"}


@pytest.mark.parametrize("source", ["teacher", "scratch"])
def test_nothing_is_found_where_labels_are_shuffled(source):
    """The splits keep their classes, eight images of each in test. Of 72 guesses at 1/3, 37 or more are right in 0.1 %
    of all cases."""
    kind = {"source": source, "layer_decay": 1.0}
    right = [24 * found(stripes(seed=s, shuffled=True), **kind).scores["accuracy"].value for s in range(3)]
    assert sum(right) < 37


@pytest.fixture(scope="module")
def plain_outcome():
    return outcome()


def outcome(**changes):
    """Class probabilities [n, K] of the test images after one training."""
    source, task = stripes()
    return module.train(source, task, options(**{"epochs": 2, **changes}), seed=0).test.probabilities_nk


@pytest.mark.parametrize(("option", "value"), OTHERS.items())
def test_every_option_changes_what_is_learned(plain_outcome, option, value):
    """The numbers are the same each time, so any difference comes from the option."""
    assert OTHERS.keys() | {"runs"} == FinetuneOptions.model_fields.keys()
    assert not np.array_equal(outcome(**{option: value}), plain_outcome)


@pytest.fixture
def training_batches(monkeypatch):
    """A function that trains on images of one gray level for each class and gives (images, targets) of every step.

    The model sees 0.2, 0.4 and 0.8, so that pixels tell which classes are in an image, and in which shares."""

    def seen(**changes):
        rows = rows_by_split()
        truth = np.arange(sum(SIZES.values())) % 3
        levels = np.array([51, 102, 204])[truth]
        source = tunable(np.broadcast_to(levels[:, None, None], (len(truth), SIDE, SIDE)), mean=(0.0,), std=(1.0,))
        task = FinetuneTask(LEVELS, rows, {s: truth[r] for s, r in rows.items()}, rows)
        images, targets = [], []
        into_backbone, loss = Classifier.forward, module.functional.cross_entropy

        def forward(self, images_nchw, *rest):
            if self.training:
                images.append(images_nchw)
            return into_backbone(self, images_nchw, *rest)

        def cross_entropy(logits, wanted):
            targets.append(wanted)
            return loss(logits, wanted)

        monkeypatch.setattr(Classifier, "forward", forward)
        monkeypatch.setattr(module.functional, "cross_entropy", cross_entropy)
        module.train(source, task, options(epochs=2, **changes), seed=0)
        assert len(images) == len(targets) == 6
        return torch.cat(images), torch.cat(targets)

    return seen


def test_the_loss_sees_smoothed_targets(training_batches):
    """A share of 0.3 over three classes: 0.1 each, and 0.7 more for the true one."""
    images, targets = training_batches(label_smoothing=0.3)
    assert targets.sort(1).values.tolist() == [pytest.approx([0.1, 0.1, 0.8])] * 48
    assert [LEVELS[k] for k in targets.argmax(1)] == [f"{level:.1f}" for level in images[:, 0, 0, 0].tolist()]


@pytest.mark.parametrize("option", ["mixup", "cutmix"])
def test_mixed_images_are_trained_on_with_targets_in_the_same_shares(training_batches, option):
    """Mixup changes all pixels alike; CutMix leaves each pixel with the level of one of two classes."""
    images, targets = training_batches(label_smoothing=0.0, **{option: 1.0})
    levels = torch.tensor([float(level) for level in LEVELS])
    assert torch.allclose(images.mean((1, 2, 3)), targets @ levels, atol=1e-4)
    mixed = (targets > 0).sum(1) == 2
    assert mixed.sum() > 12
    of_image = [{f"{level:.3f}" for level in image.unique().tolist()} for image in images[mixed]]
    if option == "mixup":
        assert all(len(found) == 1 for found in of_image)
    else:
        assert all(len(found) == 2 and found <= {f"{level:.3f}" for level in levels.tolist()} for found in of_image)


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
