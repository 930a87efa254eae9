"""Local binary patterns against a plain count, and HOG and LBP as one floor."""

import numpy as np
import torch

from sonoforge_trainer.evaluate.hog import PATTERNS, HogLbpModel, pattern_counts


def plain_patterns(picture):
    """Uniform LBP(8, 1) pixel by pixel, as the paper words it; bins in the order of the patterns' numbers."""
    around = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]
    ring = [[code >> bit & 1 for bit in range(8)] for code in range(256)]
    uniform = [c for c, bits in enumerate(ring) if sum(bits[i] != bits[i - 1] for i in range(8)) <= 2]
    padded = np.pad(picture.astype(int), 1, mode="edge")
    found = np.zeros(picture.shape, int)
    for row, column in np.ndindex(*picture.shape):
        centre = padded[row + 1, column + 1]
        code = sum((padded[row + 1 + dy, column + 1 + dx] >= centre) << bit for bit, (dy, dx) in enumerate(around))
        found[row, column] = uniform.index(code) if code in uniform else len(uniform)
    return found


def test_there_are_58_uniform_patterns_and_the_rest():
    assert PATTERNS == 59


def test_patterns_are_counted_cell_by_cell_as_a_loop_over_pixels_counts_them():
    picture = np.random.default_rng(0).integers(0, 256, (16, 24), dtype=np.uint8)
    expected = plain_patterns(picture)
    counts = pattern_counts(torch.from_numpy(picture).view(1, 1, 16, 24), 8)
    assert counts.shape == (1, 59, 2, 3)
    for row, column in np.ndindex(2, 3):
        cell = expected[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        np.testing.assert_allclose(
            counts[0, :, row, column].numpy(), np.bincount(cell.ravel(), minlength=59), atol=1e-3
        )


def test_brightness_and_contrast_leave_patterns_as_they_are():
    """What makes them texture: only the order of neighbours counts."""
    picture = torch.randint(0, 100, (1, 1, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pattern_counts(picture, 8), pattern_counts(picture * 2 + 20, 8))


def test_the_floor_joins_shape_and_texture():
    picture = torch.randint(0, 256, (2, 1, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pooled, patches = HogLbpModel()(picture)
    assert pooled["hog"].shape == (2, 15 * 15 * 36)
    assert pooled["lbp"].shape == (2, 8 * 8 * 59)
    assert patches.shape == (2, 256, 9 + 59)
    torch.testing.assert_close(pooled["lbp"].view(2, 64, 59).norm(dim=2), torch.ones(2, 64))
