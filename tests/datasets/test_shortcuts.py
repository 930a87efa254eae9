"""A set whose labels follow the size of the image is told: the scanner may be what a model learns."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layouts import png, speckle

from sonoforge_trainer.datasets.shortcuts import guessed_from

WIDE, TALL, OTHER = (600, 800), (800, 600), (480, 640)


def test_the_guess_is_worked_by_hand() -> None:
    """Of four a three are wide; of two b one is. A wide a: 2 of 3 other a against 1 of 2 b. A wide b: 0 against 3/4."""
    pairs = [(WIDE, "a")] * 3 + [(TALL, "a")] + [(WIDE, "b"), (TALL, "b")]
    # Wide a are right (2/3 > 1/2); the tall a is not (0 < 1/2); no b is.
    assert guessed_from(pairs) == pytest.approx((3 / 4 + 0) / 2)


def test_sizes_that_occur_once_tell_nothing() -> None:
    assert guessed_from([((n, n), "ab"[n % 2]) for n in range(20)]) == 0.0
    assert guessed_from([(WIDE, "a")] * 9 + [(TALL, "b")] * 9) == 1.0


def test_equal_sizes_for_all_tell_no_more_than_chance() -> None:
    assert guessed_from([(WIDE, "ab"[n % 2]) for n in range(40)]) <= 0.5


def test_the_liver_classes_can_be_guessed_from_the_scanner(real: Path) -> None:
    """The description of these images says so: the class follows the scanner. Chance is 1/3."""
    file = real / "classification" / "aul_liver.csv"
    if not file.is_file():
        pytest.skip("the real liver images are not there")
    with file.open() as stream:
        rows = list(csv.DictReader(stream))
    sizes = [(tuple(map(int, row["orig_size"].split("x"))), row) for row in rows]
    assert guessed_from([(size, row["label_name"]) for size, row in sizes]) == pytest.approx(0.606, abs=0.001)
    one = [(size, row["label_name"]) for size, row in sizes if row["one_scanner"] == "1"]
    assert len(one) == 232
    assert guessed_from(one) < 1 / 3 + 0.1


@pytest.mark.parametrize(("second", "found"), [((24, 40), {"size-tells-label": 100}), ((24, 32), {})])
def test_the_report_warns_of_a_set_of_two_scanners(
    tmp_path: Path, imported: Callable[..., Any], second: tuple[int, int], found: dict[str, int]
) -> None:
    for number in range(60):
        shape = second if number % 2 else (24, 32)
        png(tmp_path / "set" / "ab"[number % 2] / f"P{number}.png", speckle(number, *shape))
    options = ("--patient-pattern", r"/(P\d+)", "--splits", "0.6,0.2,0.2")
    assert imported("folders", tmp_path / "set", *options).found == found
