"""Pictures that look alike: found in every split and between splits, told, and all of them kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import png
from PIL import Image

from sonoforge_trainer.datasets import dhash as module
from sonoforge_trainer.datasets.dhash import DISTANCE, alike, dhash

Import = Callable[..., Any]


def scene(seed: int, side: int = 64) -> np.ndarray:
    """A smooth picture that is different for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 12), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def darker(pixels: np.ndarray, by: float = 0.8) -> np.ndarray:
    """The same picture with other pixels."""
    return (pixels * by + 10).round().astype(np.uint8)


def bits_apart(first: bytes, second: bytes) -> int:
    return (int.from_bytes(first) ^ int.from_bytes(second)).bit_count()


def hashes_of(*distances: int) -> list[bytes]:
    """A random hash, and for each distance one that differs from it in so many of the lowest bits."""
    base = int.from_bytes(np.random.default_rng(0).bytes(32))
    return [(base ^ ((1 << distance) - 1)).to_bytes(32) for distance in (0, *distances)]


def pairs_of(hashes: list[bytes]) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for first, second in alike(hashes) for a, b in zip(first, second, strict=True)]


def test_a_hash_says_where_pictures_become_brighter_to_the_right() -> None:
    rising = np.tile(np.arange(34, dtype=np.uint8) * 7, (32, 1))
    assert dhash(rising) == b"\xff" * 32
    assert dhash(rising[:, ::-1].copy()) == dhash(np.zeros((8, 9), np.uint8)) == b"\x00" * 32
    assert dhash(np.dstack([rising] * 3)) == b"\xff" * 32


def test_the_same_picture_in_another_size_and_brightness_looks_alike_and_another_picture_does_not() -> None:
    picture = scene(1)
    larger = np.asarray(Image.fromarray(picture).resize((150, 111), Image.Resampling.BICUBIC))
    assert bits_apart(dhash(picture), dhash(darker(larger))) <= DISTANCE
    assert bits_apart(dhash(picture), dhash(scene(2))) > 80


def test_pairs_of_up_to_ten_different_bits_are_found_and_no_others() -> None:
    """And the opposite of a picture, with all 256 bits different, does not look like it."""
    assert pairs_of(hashes_of(10, 11, 256)) == [(0, 1), (1, 2)]
    assert pairs_of([]) == []


@pytest.mark.parametrize("pairs", [1, 100, 2**20])
def test_all_pairs_are_found_once_however_many_are_compared_at_a_time(
    monkeypatch: pytest.MonkeyPatch, pairs: int
) -> None:
    monkeypatch.setattr(module, "_PAIRS", pairs)
    random = np.random.default_rng(1)
    hashes = [random.bytes(32) for _ in range(40)]
    for copy, of in ((7, 3), (31, 3), (39, 38)):
        hashes[copy] = (int.from_bytes(hashes[of]) ^ 0b1011 << copy).to_bytes(32)
    assert sorted(pairs_of(hashes)) == [(3, 7), (3, 31), (7, 31), (38, 39)]


def test_near_duplicates_are_counted_in_and_between_splits_and_all_are_kept(tmp_path: Path, imported: Import) -> None:
    """Pictures 0 to 5 have nothing to do with each other. Copies of equal pixels are duplicates and not these. Of two
    splits, the images of the one that matters less are counted: 1.png, 1-darkest.png and 2.png."""
    pictures = {
        "train/a/0.png": scene(0),
        "train/a/0-darker.png": darker(scene(0)),
        "train/b/0-copy.png": scene(0),
        "train/b/1.png": scene(1),
        "train/b/1-darkest.png": darker(scene(1), 0.7),
        "val/a/1-darker.png": darker(scene(1)),
        "val/b/2.png": scene(2),
        "test/a/2-darker.png": darker(scene(2)),
        "test/a/3.png": scene(3),
        "test/b/4.png": scene(4),
        "test/b/4-copy.png": scene(4),
        "train/b/5.png": scene(5),
    }
    for name, pixels in pictures.items():
        png(tmp_path / "set" / name, pixels)
    private = tmp_path / "private.csv"
    found = imported("folders", tmp_path / "set", "--findings", private)
    assert found.found == {
        "no-patient": 12,
        "duplicates": 2,
        "duplicate-labels": 1,
        "near-duplicates": 3,
        "near-duplicate-splits": 3,
    }
    assert Counter(sample.fields["split"] for sample in found.samples) == {"train": 6, "val": 2, "test": 4}
    told = [line for line in private.read_text().splitlines() if line.startswith("near-duplicate-splits,")]
    names = ("test/a/2-darker.png", "train/b/1-darkest.png", "train/b/1.png", "val/a/1-darker.png", "val/b/2.png")
    assert told == [f"near-duplicate-splits,{name}" for name in names]
    states = {finding["code"]: finding["state"] for finding in found.card["findings"]}
    assert (states["near-duplicates"], states["near-duplicate-splits"]) == ("note", "warning")
