import numpy as np

from sonoforge_trainer.draws import permutation, raw, uniforms

KEY = 0xA38D207B7126A9F3D74948E1190A0CF9
"""blake2b-128 of the integers 7 and 3 (64-bit, little-endian), personalised with "block"."""


def test_the_numbers_are_philox_of_the_hashed_key():
    assert raw(3, 7, "block", 3).tolist() == [190716017011981170, 8097796078662756732, 18132809681756614012]
    assert raw(3, 7, "block", 3).tolist() == np.random.Philox(key=KEY).random_raw(3).tolist()


def test_a_longer_draw_begins_with_the_shorter_one():
    assert uniforms(9, 1, "augment", 5)[:4].tolist() == uniforms(4, 1, "augment", 5).tolist()


def test_every_part_of_the_key_matters():
    draws = [
        uniforms(1, *key)[0] for key in ((1, "a", 2, 3), (2, "a", 2, 3), (1, "b", 2, 3), (1, "a", 3, 2), (1, "a", 2))
    ]
    assert len(set(draws)) == 5


def test_uniforms_are_uniform_in_zero_to_one():
    draws = uniforms(100_000, 3, "augment", 1)
    assert 0 <= draws.min() < 0.001
    assert 0.999 < draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.003
    assert abs(draws.var() - 1 / 12) < 0.001


def test_a_permutation_holds_everything_once():
    assert sorted(permutation(1000, 0, "block", 4).tolist()) == list(range(1000))
    assert permutation(1000, 0, "block", 4).tolist() != list(range(1000))
    assert permutation(0, 0, "block", 4).tolist() == []
