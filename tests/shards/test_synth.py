"""Phantoms are what they claim: deterministic, labelled, masked, marked, and neither trivial nor impossible."""

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

from sonoforge_trainer.shards.anatomy import MASK_CLASSES, STRUCTURES
from sonoforge_trainer.shards.images import decode
from sonoforge_trainer.shards.phantoms import PhantomRule, Phantoms
from sonoforge_trainer.shards.reader import iterate, read_manifest
from sonoforge_trainer.shards.synth import command
from sonoforge_trainer.storage import Storage

LABELS = ["abdomen", "background", "femur", "head", "heart", "spine"]


def test_the_command_writes_a_labelled_set_that_says_it_is_synthetic(
    tmp_path: Path, call: Callable[..., Result], storage: Storage, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    """Two calls with one seed, other numbers of threads and another hash key give the same bytes."""
    arguments = ("--count", 96, "--size", 32, "--seed", 3, "--shard-samples", 40, "--splits", "0.5,0.25,0.25")
    assert call(command, *arguments, "--output", tmp_path / "a").exit_code == 0
    assert call(command, *arguments, "--output", tmp_path / "b", "--workers", 1).exit_code == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert "finished before" in call(command, *arguments, "--output", tmp_path / "a").output
    uri = (tmp_path / "a").as_uri()
    manifest = read_manifest(f"{uri}/shards.json", storage)
    assert manifest.synthetic
    assert manifest.classes == tuple(LABELS)
    assert manifest.mask_classes == MASK_CLASSES
    assert [shard.samples for shard in manifest.shards] == [32, 32, 32]
    splits: dict[str, Counter[str]] = defaultdict(Counter)
    patients: dict[str, set[str]] = defaultdict(set)
    for sample in iterate(manifest, uri, storage):
        splits[sample.fields["split"]][sample.fields["label"]] += 1
        patients[sample.fields["split"]].add(sample.fields["patient"])
        assert sample.mask is not None
        assert decode(sample.mask).shape == decode(sample.image).shape
        assert min(decode(sample.image).shape) == 32
    # Each of the four patients has each class in one clip of four frames.
    assert splits == {s: Counter(dict.fromkeys(LABELS, n)) for s, n in {"train": 8, "val": 4, "test": 4}.items()}
    assert {name: len(found) for name, found in patients.items()} == {"train": 2, "val": 1, "test": 1}


def test_masks_belong_to_the_class() -> None:
    """A background has no mask; heart shows chambers and nothing else, and so on."""
    phantoms = Phantoms(PhantomRule(120, 64, frames=1))
    found: dict[str, set[int]] = defaultdict(set)
    for index in range(120):
        found[phantoms.identity(index).label] |= set(np.unique(phantoms.draw(index).mask_hw).tolist())
    assert found == {
        "abdomen": {0, 2, 3},
        "background": {0},
        "femur": {0, 4},
        "head": {0, 1},
        "heart": {0, 5},
        "spine": {0, 6},
    }
    assert sorted(STRUCTURES) == LABELS


def test_frames_of_a_clip_are_near_duplicates_and_clips_are_not() -> None:
    phantoms = Phantoms(PhantomRule(48, 64, frames=4))

    def likeness(first: int, second: int) -> float:
        one, two = (phantoms.draw(i).image_hw.ravel().astype(float) for i in (first, second))
        return float(np.corrcoef(one, two)[0, 1])

    same_clip = np.mean([likeness(clip, clip + frame) for clip in range(0, 24, 4) for frame in (1, 2, 3)])
    other_clip = np.mean([likeness(clip, clip + 4) for clip in range(0, 20, 4)])
    assert same_clip > 0.85
    assert other_clip < same_clip - 0.1


def test_uniform_tissue_has_the_statistics_of_fully_developed_speckle() -> None:
    """Amplitude is Rayleigh distributed: its mean is 1.913 times its deviation (sqrt(pi / (4 - pi)))."""
    from sonoforge_trainer.shards.anatomy import Scene
    from sonoforge_trainer.shards.fan import draw_fan
    from sonoforge_trainer.shards.phantoms import _envelope

    fan = draw_fan(0, 128, np.random.default_rng(0))
    scene = Scene(fan, np.zeros_like(fan.x_ra), np.zeros_like(fan.x_ra), np.zeros(fan.x_ra.shape, np.uint8))
    rng = np.random.default_rng(1)
    speckle = rng.standard_normal((2, *fan.x_ra.shape), np.float32)
    amplitude = 10 ** (_envelope(scene, speckle, 0.0, rng) / 20)
    # Over a few depths at a time, because the depth gain is not constant.
    ratios = [band.mean() / band.std() for band in np.array_split(amplitude, 12)]
    assert np.median(ratios) == pytest.approx(1.913, abs=0.2)


def test_pixels_tell_the_class_somewhat_and_brightness_does_not() -> None:
    """Neighbours by raw pixels are right more often than chance and far from always; by brightness they are not."""
    phantoms = Phantoms(PhantomRule(720, 48, frames=1))
    labels = np.array([phantoms.identity(i).label for i in range(720)])
    pixels = np.stack(
        [
            np.asarray(Image.fromarray(phantoms.draw(i).image_hw).resize((32, 32)), np.float32).ravel()
            for i in range(720)
        ]
    )
    statistics = np.stack([pixels.mean(1), pixels.std(1)], 1)
    statistics = (statistics - statistics.mean(0)) / statistics.std(0)
    centred = pixels - pixels.mean(1, keepdims=True)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    by_pixels = (centred[600:] @ centred[:600].T).argmax(1)
    by_brightness = ((statistics[600:, None] - statistics[None, :600]) ** 2).sum(2).argmin(1)
    assert 0.35 < (labels[by_pixels] == labels[600:]).mean() < 0.8
    assert (labels[by_brightness] == labels[600:]).mean() < 0.35
