"""Defects of the released code of the paper (arXiv 2506.19552, jakobamb/UltraDINO at bda1b45), each as a test.

Numbers are those of the list that was made by reading that code. What its tables would be without them is not known.
"""

import importlib.util
import re
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from evaluation_material import backbone_of, model_card, request_of
from tuning_material import CPU, SIDE, SIZES, bright_discs, rows_by_split, stripes, tunable

import sonoforge_operator
import sonoforge_trainer
from sonoforge_trainer.cli import main
from sonoforge_trainer.contract import ExecutionConfig, FinetuneOptions, SegmentOptions
from sonoforge_trainer.evaluate.features import BackboneModel
from sonoforge_trainer.evaluate.finetune import Classifier, FinetuneTask, finetune
from sonoforge_trainer.evaluate.metrics import Predictions, confusion_matrix
from sonoforge_trainer.evaluate.overlap import dice, overlap_scores
from sonoforge_trainer.evaluate.run import evaluate
from sonoforge_trainer.evaluate.segmentation import Segmenter, SegmentTask, segment
from sonoforge_trainer.ranks import Ranks
from sonoforge_trainer.shards.reader import read_manifest
from sonoforge_trainer.state import TrainState
from sonoforge_trainer.step import Step

ROOT = Path(__file__).parents[2]
FINETUNE = {"epochs": 4, "batch": 8, "learning_rate": 1e-3, "mixup": 0, "cutmix": 0, "augment": False}
SEGMENT = {"steps": 4, "batch": 4, "validate_every": 1, "channels": 8, "augment": False}


def finetuned(made, *, seed=0, **changes):
    return finetune(*made, FinetuneOptions(**{**FINETUNE, **changes}), resamples=0, seed=seed)


def segmented(made, *, seed=0, **changes):
    return segment(*made, SegmentOptions(**{**SEGMENT, **changes}), draws=2, resamples=0, seed=seed)


def test_defect_1_the_best_epoch_is_the_one_of_the_highest_score_and_not_of_the_lowest():
    """Released: ModelCheckpoint(monitor="val_acc", mode="min")."""
    for finding, scores in (
        (finetuned(stripes()), "validation_balanced_accuracy"),
        (segmented(bright_discs(), learning_rate=0.05), "validation_dice_foreground"),
    ):
        candidates = finding.details[scores]
        assert candidates[finding.chosen] == max(candidates.values()) > min(candidates.values())


def test_defect_2_layer_decay_is_in_the_optimiser_and_moves_lower_blocks_less():
    """Released: groups carry lr_multiplier, which nothing reads, and weight decay is AdamW's own default."""
    source, _ = stripes(depth=4)
    options = FinetuneOptions(**{**FINETUNE, "layer_decay": 0.5, "weight_decay": 0.25, "learning_rate": 1e-2})
    model = Classifier(source, 3, options, 0)
    optimiser = model.optimiser(options)
    rates = {name: (group["lr"], group["weight_decay"]) for group in optimiser.param_groups for name in group["names"]}
    assert rates.keys() == {f"backbone.{n}" for n, _ in model.backbone.named_parameters()} | {
        f"head.{n}" for n, _ in model.head.named_parameters()
    }
    assert rates["head.1.weight"] == (1e-2, 0.25)
    assert rates["backbone.norm.weight"] == (1e-2, 0.0)
    for block in range(4):
        assert rates[f"backbone.blocks.{block}.mlp.fc1.weight"] == (pytest.approx(1e-2 * 0.5 ** (4 - block)), 0.25)
    assert rates["backbone.patch_embed.proj.weight"] == rates["backbone.pos_embed"] == (pytest.approx(1e-2 / 32), 0.25)
    # Adam's first step is the learning rate in every coordinate, whatever the gradient.
    before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
    model(source.normalise(source.pixels(range(8)))).square().sum().backward()
    optimiser.step()
    after = dict(model.backbone.named_parameters())
    moved = [
        (after[name] - before[name]).abs().median().item()
        for name in (f"blocks.{block}.mlp.fc1.bias" for block in range(4))
    ]
    assert moved == pytest.approx([1e-2 * 0.5 ** (4 - block) for block in range(4)], rel=1e-3)


def test_defect_2_layer_decay_of_a_tuned_segmentation_is_in_its_optimiser_too():
    source, _ = bright_discs()
    options = SegmentOptions(**SEGMENT, backbone="tuned", layer_decay=0.5, backbone_learning_rate=1e-2)
    groups = Segmenter(source, 2, options, 0).optimiser(options).param_groups
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert rates["backbone.blocks.1.attn.qkv.weight"] == pytest.approx(5e-3)
    assert rates["backbone.blocks.0.attn.qkv.weight"] == pytest.approx(2.5e-3)
    assert rates["head.classifier.weight"] == pytest.approx(options.learning_rate)


@pytest.mark.parametrize(
    "protocol",
    [
        lambda source, rows, groups: finetune(
            source,
            FinetuneTask(("a", "b"), rows, {s: np.arange(len(r)) % 2 for s, r in rows.items()}, groups),
            FinetuneOptions(**{**FINETUNE, "epochs": 1}),
            resamples=0,
            seed=0,
        ),
        lambda source, rows, groups: segment(
            source,
            SegmentTask(("background", "disc"), rows, bright_discs()[1].masks, groups),
            SegmentOptions(**SEGMENT),
            draws=1,
            resamples=0,
            seed=0,
        ),
    ],
    ids=["finetune", "segment"],
)
def test_defect_3_test_images_are_normalised_as_training_images_and_as_the_card_says(protocol):
    """Released: baselines are trained with ImageNet's statistics and tested with others. All images here are gray 51,
    so whatever reaches a patch embedding has one value."""
    source = tunable(np.full((sum(SIZES.values()), SIDE, SIDE), 51), mean=(0.1,), std=(0.5,))
    seen = []

    def look(module, inputs):
        if isinstance(module, torch.nn.Conv2d) and module.weight.shape[1] == 1:
            seen.append(inputs[0])

    handle = torch.nn.modules.module.register_module_forward_pre_hook(look)
    rows = rows_by_split()
    try:
        protocol(source, rows, {s: np.arange(len(r)) for s, r in rows.items()})
    finally:
        handle.remove()
    assert sum(len(images) for images in seen) >= 24 + 12 + 24
    assert all(torch.allclose(images, torch.tensor((0.2 - 0.1) / 0.5)) for images in seen)


def test_defect_3_frozen_features_have_the_same_normalisation():
    card = model_card(mean=(0.1,), std=(0.5,))
    backbone = backbone_of(card)
    image = torch.full((1, 1, 32, 32), 51, dtype=torch.uint8)
    pooled, _ = BackboneModel(backbone, card, None, CPU)(image)
    assert torch.allclose(pooled["cls"], backbone([torch.full((1, 1, 32, 32), 0.2)])[0].cls, atol=1e-5)


@pytest.mark.parametrize("backbone", ["frozen", "tuned"])
@pytest.mark.parametrize("decoder", ["linear", "upernet"])
def test_defect_4_segmentation_has_the_registers_of_the_checkpoint_and_no_patch_in_their_place(decoder, backbone):
    """Released: the backbone of segmentation is built with num_register_tokens=0."""
    source, _ = bright_discs(registers=4)
    options = SegmentOptions(**SEGMENT, decoder=decoder, backbone=backbone)
    model = Segmenter(source, 2, options, 0).eval()
    assert torch.equal(model.backbone.register_tokens, source.backbone.register_tokens)
    assert model.backbone.state_dict().keys() == source.backbone.state_dict().keys()
    maps = []
    model.decoder.register_forward_pre_hook(lambda module, inputs: maps.extend(inputs[0]))
    images = source.normalise(source.pixels(range(2)))
    with torch.no_grad():
        before = model(images)
        # A map is the patches of the block in rows, so the first token of it is the first patch.
        of_blocks = model.backbone.after_blocks(images, model.blocks)
        assert [m.shape for m in maps] == [(2, 192, 8, 8)] * len(model.blocks)
        assert all(torch.equal(m[:, :, 0, 1], f.patches[:, 1]) for m, f in zip(maps, of_blocks, strict=True))
        model.backbone.register_tokens.add_(1.0)
        assert not torch.allclose(model(images), before, atol=1e-4)


def test_defect_5_a_seed_gives_the_same_numbers_again():
    """Released: "Using a random seed!", with the call that would set one commented out."""
    for protocol, made in ((finetuned, stripes()), (segmented, bright_discs())):
        torch.manual_seed(1)
        first = protocol(made, augment=True, drop_path=0.5)
        torch.manual_seed(2)
        state = torch.get_rng_state()
        assert protocol(made, augment=True, drop_path=0.5) == first
        assert torch.equal(torch.get_rng_state(), state)
        assert protocol(made, augment=True, drop_path=0.5, seed=1) != first


def test_defect_6_dice_divides_by_the_predicted_and_the_true_area():
    """Three of four pixels predicted, one true, one in both: 2 * 1 / (3 + 1). Released: twice the predicted area."""
    confusion = confusion_matrix(np.array([0, 0, 0, 1]), np.array([0, 1, 1, 1]), 2)
    assert dice(confusion)[1] == pytest.approx(0.5)
    assert dice(confusion)[1] != pytest.approx(2 * 1 / (3 + 3))


def test_defect_7_every_micro_batch_of_a_step_changes_the_update():
    """Released: gradients are zeroed and applied at the same micro-step, so each second micro-batch is lost.

    With centres by moving average a micro-batch acts on the step by its own gradient alone.
    """
    spec = importlib.util.spec_from_file_location("step_runs", ROOT / "tests" / "step" / "runs.py")
    runs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runs)
    execution = ExecutionConfig(device="cpu")
    training = runs.config("ema", virtual_ranks=2, global_batch=4, drop_path=0.0)
    numbered = runs.batches(training, 3, range(2))
    other = runs.micro_batch(training, 99, 0)

    def update(*pixels):
        state = TrainState(training)
        work = [batch.__class__(**{**vars(batch), "globals_u8": p}) for batch, p in zip(numbered, pixels, strict=True)]
        Step(training, state, Ranks.from_env(execution), execution)(work, 3).read()
        return torch.cat([p.detach().flatten() for p in state.student.parameters()])

    first, second = (batch.globals_u8 for batch in numbered)
    whole = update(first, second)
    assert torch.equal(whole, update(first, second))
    assert not torch.equal(whole, update(other.globals_u8, second))
    assert not torch.equal(whole, update(first, other.globals_u8))


def test_defect_8_no_debugger_is_left_in_the_code():
    for package in (sonoforge_trainer, sonoforge_operator):
        for path in Path(package.__file__).parent.rglob("*.py"):
            assert not re.search(r"set_trace|\bbreakpoint\(|^import pdb", path.read_text(), re.MULTILINE), path.name


def test_defect_8_the_number_of_classes_is_the_data_sets_own(checkpoint, phantoms, storage):
    """Released: a template says five classes for a set of three, and pairs images and masks of different splits."""
    options = SegmentOptions(**{**SEGMENT, "steps": 1})
    result = evaluate(request_of(checkpoint, phantoms, "segment", segment=options), storage, CPU)
    classes = read_manifest(phantoms, storage).mask_classes
    source, _ = bright_discs()
    assert Segmenter(source, len(classes), options, 0).decoder.classifier.out_channels == len(classes)
    assert set(result.details["segment"]["dice"]) <= set(classes)
    assert result.details["segment"]["images"] == result.counts


def test_defect_9_every_file_and_command_that_the_pages_name_exists():
    """Released: commands of the README name configurations that do not exist."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    named = set(re.findall(r"\b(?:manifests|demo|benchmarks|charts)/[\w./-]+\.(?:yaml|py|md|json)\b", text))
    assert len(named) > 3
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    commands = set(re.findall(r"(?:^|`)(?:\.venv/bin/)?sonoforge ([a-z0-9-]+)", text, re.MULTILINE))
    assert "eval" in commands
    missing = [name for name in sorted(commands) if CliRunner().invoke(main, [name, "--help"]).exit_code]
    assert missing == []


def test_defect_10_nothing_is_written_beside_the_weights_but_results_and_features(checkpoint, phantoms, storage):
    """Released: segmentation writes CHECKPOINT_unwrapped.pth next to its source, and parallel evaluations race."""
    folder = Path(urlparse(checkpoint[0]).path)

    def objects():
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    before = objects()
    request = request_of(
        checkpoint,
        phantoms,
        *("segment", "finetune"),
        segment=SegmentOptions(**{**SEGMENT, "steps": 1, "backbone": "tuned"}),
        finetune=FinetuneOptions(**{**FINETUNE, "epochs": 1}),
    )
    evaluate(request, storage, CPU)
    after = objects()
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0].split("-")[0] for name in after.keys() - before.keys()} == {"eval", "features"}


def test_defect_of_class_indices_scores_of_a_class_follow_its_name_and_not_its_number():
    """Three repositories number the same planes in three orders."""
    random = np.random.default_rng(0)
    names = np.array(["Other", "Fetal brain", "Fetal femur"])
    truth, predicted = random.integers(0, 3, 60), random.integers(0, 3, 60)
    found = []
    for order in ([0, 1, 2], [2, 0, 1]):
        place = np.argsort(order)
        made = Predictions(np.eye(3)[place[predicted]], place[truth], np.arange(60))
        found.append(made.details(tuple(names[order]))["recall"])
    assert found[0] == found[1]
    assert finetuned(stripes(), epochs=1).details["recall"].keys() <= {"across", "down", "plain"}


def test_defect_of_the_background_it_is_in_the_mean_and_never_in_the_foreground():
    """An empty prediction: the background is 15 of 16 pixels right, the disc is missed."""
    confusion = confusion_matrix(np.r_[np.zeros(15, np.int64), 1], np.zeros(16, np.int64), 2)[None]
    scores = overlap_scores(confusion, np.array([0]), resamples=0, seed=0)
    assert scores["dice_foreground"].value == scores["iou_foreground"].value == 0
    assert scores["dice_mean"].value == pytest.approx((30 / 31 + 0) / 2)
