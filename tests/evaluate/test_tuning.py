"""What the protocols that train share: copies, batches, groups, schedules, the best moment."""

from itertools import islice

import numpy as np
import pytest
import torch
from tuning_material import SIDE, bright_discs

from sonoforge_trainer.evaluate.decoders import POOL_SCALES, LinearDecoder, UperNet, decoder_blocks
from sonoforge_trainer.evaluate.tuning import (
    BestState,
    batches,
    endless_order,
    seed_of,
    seeded,
    warm_cosine,
    warm_poly,
)
from sonoforge_trainer.model import Backbone, initialise


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [(12, (3, 5, 7, 11)), (24, (7, 11, 15, 23)), (40, (12, 19, 26, 39)), (4, (0, 1, 2, 3)), (1, (0, 0, 0, 0))],
)
def test_a_decoder_looks_at_a_third_half_two_thirds_and_all_of_the_depth(depth, blocks):
    assert decoder_blocks(depth) == blocks


def test_decoders_give_logits_of_every_class_on_the_grid_or_on_four_times_the_grid():
    maps = [torch.randn(2, 32, 6, 5) for _ in range(4)]
    assert LinearDecoder(32, 3)(maps).shape == (2, 3, 6, 5)
    assert UperNet(32, 3, 16)(maps).shape == (2, 3, 24, 20)
    assert UperNet(32, 3, 16)([m[..., :1, :1] for m in maps]).shape == (2, 3, 4, 4)
    assert POOL_SCALES == (1, 2, 3, 6)


def test_every_map_reaches_the_logits_of_upernet():
    decoder = UperNet(8, 2, 8).eval()
    maps = [torch.randn(1, 8, 4, 4, requires_grad=True) for _ in range(4)]
    decoder(maps).square().sum().backward()
    assert all(m.grad.abs().sum() > 0 for m in maps)


def test_features_after_blocks_are_those_of_a_pass_that_ends_there():
    source, _ = bright_discs(depth=3)
    backbone: Backbone = source.backbone
    images = source.normalise(source.pixels(range(2)))
    found = backbone.after_blocks(images, (0, 2, 0))
    for features, reference in zip(found, (0, 2, 0), strict=True):
        expected = backbone.intermediate(images, 3)[reference]
        assert torch.equal(features.patches, expected.patches)
        assert torch.equal(features.cls, expected.cls)


def test_drop_path_of_intermediate_features_asks_for_its_generator():
    source, _ = bright_discs()
    backbone = source.teacher(0.5)
    images = source.normalise(source.pixels(range(4)))
    with pytest.raises(ValueError, match="drop path in training mode draws from a generator"):
        backbone.after_blocks(images, (1,))
    first, second = (backbone.after_blocks(images, (1,), generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert not torch.equal(first[0].patches, second[0].patches)


def test_a_start_from_scratch_is_that_of_pretraining_but_for_layerscale():
    """The card of a checkpoint does not tell the LayerScale that its run started with; here it is 1e-5."""
    source, _ = bright_discs()
    pretraining = Backbone(source.backbone.config, SIDE)
    initialise(pretraining, 3)
    start = source.scratch(0.25, 3)
    assert start.training
    assert start.config.drop_path == 0.25
    gammas = {name for name, _ in start.named_parameters() if name.endswith("gamma")}
    assert len(gammas) == 2 * start.depth
    for name, value in start.state_dict().items():
        expected = torch.ones_like(value) if name in gammas else pretraining.state_dict()[name]
        assert torch.equal(value, expected), name
    assert pretraining.blocks[0].ls1.gamma.unique().item() == pytest.approx(1e-5)


def test_an_order_passes_over_everything_before_it_repeats_and_follows_from_the_seed():
    order = list(islice(endless_order(5, 3), 15))
    assert all(sorted(order[start : start + 5]) == [0, 1, 2, 3, 4] for start in (0, 5, 10))
    assert order == list(islice(endless_order(5, 3), 15)) != list(islice(endless_order(5, 4), 15))


def test_batches_that_are_not_augmented_are_the_normalised_images_with_their_masks():
    source, task = bright_discs()
    rows = task.rows["train"]
    masks = task.training_masks(np.arange(len(rows)), 32)
    (first, _) = batches(source, rows, masks, batch=6, steps=2, augment=False, seed=0)
    assert torch.equal(first.images, source.normalise(source.pixels(rows[first.places])))
    assert torch.equal(first.masks, masks[torch.from_numpy(first.places)].long())


def test_the_warm_up_rises_to_the_peak_and_both_schedules_fall_to_nothing():
    for schedule in (warm_cosine, warm_poly):
        values = [schedule(step, 0.1, 100) for step in range(100)]
        assert values[0] == 0
        assert values[9] == values[10] == 1
        assert values[10:] == sorted(values[10:], reverse=True)
        assert 0 < values[99] < 0.02
        assert schedule(0, 0.0, 1) == 1
    assert warm_cosine(55, 0.1, 100) == pytest.approx(0.5)
    assert warm_poly(55, 0.1, 100) == pytest.approx(0.5**0.9)


def test_the_best_moment_is_the_first_of_the_highest_and_its_weights_come_back():
    layer = torch.nn.Linear(1, 1)
    kept = BestState(layer)
    for epoch, score in enumerate((float("nan"), 0.25, 0.75, 0.5, 0.75)):
        torch.nn.init.constant_(layer.weight, epoch)
        kept.offer(f"epoch {epoch}", score)
    assert kept.restore() == "epoch 2"
    assert layer.weight.item() == 2


def test_initial_weights_follow_from_the_seed_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (seeded(seed, lambda: torch.nn.Linear(3, 3)).weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({seed_of(seed, draw) for seed in (0, 2**32 - 1) for draw in range(5)}) == 10
