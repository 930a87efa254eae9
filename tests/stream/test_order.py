import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonoforge_trainer.order import Order


@st.composite
def data_sets(draw, max_frames=6):
    """The clips of each shard: 1 to 8 shards of 1 to 40 samples, frames of a clip side by side or scattered."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    total = sum(sizes)
    frames = np.random.default_rng(draw(st.integers(0, 999))).integers(1, max_frames + 1, total)
    clips = np.repeat(np.arange(total), frames)[:total]
    if draw(st.booleans()):
        clips = np.random.default_rng(draw(st.integers(0, 999))).permutation(clips)
    return [part.tolist() for part in np.split(clips, np.cumsum(sizes)[:-1])]


@st.composite
def settings_of_orders(draw):
    """A data set, and the arguments of an order that it is large enough for."""
    shards = draw(data_sets())
    clips = len({clip for shard in shards for clip in shard})
    return shards, {
        "seed": draw(st.integers(0, 2**32 - 1)),
        "virtual_ranks": draw(st.integers(1, 5)),
        "micro_batch": draw(st.integers(1, min(clips, 9))),
        "block_shards": draw(st.integers(1, 3)),
        "clip_aware": draw(st.booleans()),
    }


def seen_in(order, epoch):
    """Every ordinal that any virtual rank sees in an epoch, with repeats."""
    seen = []
    for rank in range(order.virtual_ranks):
        start, end = order.segment(epoch, rank)
        for step in range(start // order.micro_batch_size, -(-end // order.micro_batch_size)):
            ordinals, epochs = order.micro_batch(step, rank)
            seen += ordinals[epochs == epoch].tolist()
    return seen


@given(settings_of_orders())
@settings(max_examples=60, deadline=None)
def test_no_clip_and_no_sample_comes_twice_in_a_micro_batch(make_manifest, given_order):
    shards, arguments = given_order
    order = Order(make_manifest(shards), **arguments)
    clips = np.concatenate(shards)
    for rank in range(order.virtual_ranks):
        for step in range(10):
            ordinals, epochs = order.micro_batch(step, rank)
            assert len(set(ordinals.tolist())) == len(epochs) == arguments["micro_batch"]
            if arguments["clip_aware"]:
                assert len(set(clips[ordinals].tolist())) == arguments["micro_batch"]


@given(settings_of_orders())
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_one_place_for_each_sample_and_counts_those_it_leaves_out(make_manifest, given_order):
    shards, arguments = given_order
    order = Order(make_manifest(shards), **arguments)
    samples = sum(map(len, shards))
    for epoch in range(4):
        seen = seen_in(order, epoch)
        assert len(seen) == samples
        assert samples - len(set(seen)) <= order.substitutions(epoch)


@given(settings_of_orders(), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_a_micro_batch_does_not_depend_on_what_was_asked_before(make_manifest, given_order, random):
    shards, arguments = given_order
    manifest = make_manifest(shards)
    in_turn = Order(manifest, **arguments)
    places = [(step, rank) for step in range(12) for rank in range(arguments["virtual_ranks"])]
    expected = {place: in_turn.micro_batch(*place) for place in places}
    random.shuffle(places)
    shuffled = Order(manifest, **arguments)
    for place in places[:8]:
        for order in (shuffled, Order(manifest, **arguments)):
            for got, want in zip(order.micro_batch(*place), expected[place], strict=True):
                assert got.tolist() == want.tolist()


@pytest.mark.parametrize("epochs", [8])
@pytest.mark.parametrize(("shards", "virtual_ranks", "micro_batch"), [(5, 1, 16), (8, 4, 8), (7, 3, 16), (3, 4, 8)])
def test_each_sample_comes_exactly_once_an_epoch(make_manifest, shards, virtual_ranks, micro_batch, epochs):
    """64 samples a shard, four frames a clip, scattered: the rule always has room, and nothing may be left out."""
    clips = np.random.default_rng(1).permutation(np.repeat(np.arange(shards * 16), 4))
    order = Order(make_manifest(clips.reshape(shards, 64).tolist()), 7, virtual_ranks, micro_batch, 2)
    for epoch in range(epochs):
        assert sorted(seen_in(order, epoch)) == list(range(shards * 64))
        assert order.substitutions(epoch) == 0


def test_a_clip_with_as_many_frames_as_micro_batches_still_comes_whole(make_manifest):
    """One clip in every micro-batch of the epoch: found only by looking ahead."""
    clips = [0] * 10 + list(range(1, 31))
    order = Order(make_manifest([clips]), 3, 1, 4, 1)
    for epoch in range(6):
        assert sorted(seen_in(order, epoch)) == list(range(40))


def test_frames_beyond_one_a_micro_batch_are_left_out_and_counted(make_manifest):
    """40 samples in 10 micro-batches of 4; of the clip's 16 frames 10 fit, and others take the places of 6."""
    clips = [0] * 16 + list(range(1, 25))
    order = Order(make_manifest([clips]), 3, 1, 4, 1)
    seen = seen_in(order, 0)
    assert len(seen) == 40
    assert len([ordinal for ordinal in seen if ordinal < 16]) == 10
    assert set(range(16, 40)) <= set(seen)
    assert order.substitutions(0) == 6


def test_a_segment_with_few_clips_borrows_from_the_rest_of_the_data_set(make_manifest):
    """Every shard is one clip: a block can fill one place of a micro-batch, and the rule still holds."""
    order = Order(make_manifest([[shard] * 12 for shard in range(6)]), 0, 6, 3, 1)
    for step in range(8):
        ordinals, _ = order.micro_batch(step, 2)
        assert len(set(order.clips(ordinals).tolist())) == 3
    assert order.substitutions(0) == 6 * 8


def test_epochs_order_the_samples_differently_and_so_do_seeds(make_manifest):
    manifest = make_manifest([list(range(50)), list(range(50, 100))])
    first = Order(manifest, 1, 1, 10, 2)
    other = Order(manifest, 2, 1, 10, 2)
    runs = [[first.micro_batch(step, 0)[0].tolist() for step in steps] for steps in (range(10), range(10, 20))]
    runs.append([other.micro_batch(step, 0)[0].tolist() for step in range(10)])
    assert len({str(run) for run in runs}) == 3


def test_the_order_is_this_one(make_manifest):
    """A changed order would make a resumed run repeat and lose samples."""
    clips = np.repeat(np.arange(20), 2).reshape(4, 10).tolist()
    order = Order(make_manifest(clips), 11, 2, 5, 1)
    assert [order.micro_batch(step, 1)[0].tolist() for step in range(5)] == [
        [9, 4, 2, 7, 1],
        [8, 3, 5, 6, 0],
        [18, 10, 14, 17, 12],
        [19, 11, 15, 16, 13],
        [25, 26, 28, 23, 20],
    ]
    assert order.micro_batch(4, 1)[1].tolist() == [1, 1, 1, 1, 1]


def test_with_fewer_shards_than_virtual_ranks_epochs_go_round_the_ranks(make_manifest):
    order = Order(make_manifest([list(range(8))]), 0, 3, 4, 1)
    assert [order.segment(epoch, rank)[1] for epoch in range(4) for rank in range(3)] == [
        *(8, 0, 0),
        *(8, 8, 0),
        *(8, 8, 8),
        *(16, 8, 8),
    ]
    assert order.micro_batch(0, 2)[1].tolist() == [2, 2, 2, 2]


def test_far_positions_are_arithmetic(make_manifest):
    """A step of epoch 20,000 is found without going through the samples before it."""
    order = Order(make_manifest([list(range(8)), list(range(8, 16))]), 5, 2, 8, 2)
    ordinals, epochs = order.micro_batch(20_000, 1)
    assert epochs.tolist() == [20_000] * 8
    assert sorted(ordinals.tolist()) in ([*range(8)], [*range(8, 16)])


def test_a_pickled_order_is_the_same_order(make_manifest):
    order = Order(make_manifest([list(range(40))]), 5, 2, 8, 1)
    order.micro_batch(3, 1)
    copied = pickle.loads(pickle.dumps(order))
    assert copied.micro_batch(9, 1)[0].tolist() == order.micro_batch(9, 1)[0].tolist()


def test_too_few_clips_for_a_micro_batch_is_refused_with_a_way_out(make_manifest):
    with pytest.raises(ValueError, match=r"has 3 clips, but a micro-batch of 4.*data.clipAware: false"):
        Order(make_manifest([[0, 0, 1, 2]]), 0, 1, 4, 1)
    with pytest.raises(ValueError, match="has 4 samples, but a micro-batch of 5"):
        Order(make_manifest([[0, 0, 1, 2]]), 0, 1, 5, 1, clip_aware=False)


def test_the_shards_of_the_next_blocks_are_known_ahead(make_manifest):
    order = Order(make_manifest([list(range(i * 8, i * 8 + 8)) for i in range(6)]), 4, 2, 8, 2)
    now, ahead, *_ = order.upcoming_shards(0, 0, 3)
    assert len(now) == 2
    assert len(ahead) == 1
    for step in range(2):
        assert set(order.shard_of(order.micro_batch(step, 0)[0]).tolist()) <= set(now.tolist())
    assert set(order.shard_of(order.micro_batch(2, 0)[0]).tolist()) == set(ahead.tolist())
    assert order.upcoming_shards(2, 0, 1)[0].tolist() == ahead.tolist()
    assert list(order.shard_ordinals(1)) == [8, 9, 10, 11, 12, 13, 14, 15]


def test_a_large_segment_of_long_clips_is_spread_in_seconds(make_manifest):
    """25,000 frames of 250 clips in one segment; a quadratic search would take minutes."""
    clips = np.repeat(np.arange(250), 100).reshape(10, 2500).tolist()
    order = Order(make_manifest(clips), 1, 1, 64, 10)
    ordinals, _ = order.micro_batch(380, 0)
    assert len(set(order.clips(ordinals).tolist())) == 64
    assert order.substitutions(0) == 0
