"""Masks: exact counts on every grid, a function of the generator alone, and as blocky as they claim."""

import numpy as np
import pytest

from mim import masking
from mim.masking import block, random

GRIDS = [(14, 14), (8, 12), (12, 5), (3, 3), (2, 2), (1, 6)]


def draws(mask, grid, num, **options):
    return np.stack([mask(grid, np.random.default_rng(i), **options) for i in range(num)])


def neighbours(mask, grid):
    """Number of adjacent pairs that are both masked."""
    square = mask.reshape(grid)
    return int((square[1:] & square[:-1]).sum() + (square[:, 1:] & square[:, :-1]).sum())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75, 0.9])
def test_random_leaves_the_share_of_one_minus_ratio_visible_rounded_down(grid, ratio):
    n = grid[0] * grid[1]
    found = draws(random, grid, 20, ratio=ratio)
    assert found.shape == (20, n)
    assert (~found).sum(axis=1).tolist() == [int(n * (1 - ratio))] * 20


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [0.3, 0.4, 0.75])
def test_block_masks_exactly_the_share_rounded_down(grid, ratio):
    n = grid[0] * grid[1]
    found = draws(block, grid, 20, ratio=ratio)
    assert found.sum(axis=1).tolist() == [int(ratio * n)] * 20


@pytest.mark.parametrize("count", [1, 15, 75, 195])
def test_block_masks_exactly_an_asked_count(count):
    assert draws(block, (14, 14), 20, count=count).sum(axis=1).tolist() == [count] * 20


@pytest.mark.parametrize("mask", [random, block])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_mask_is_a_function_of_the_generator_alone(mask, grid):
    """Also where no rectangle fits and single patches fill the count."""
    np.random.seed(0)
    first = draws(mask, grid, 20, ratio=0.5)
    np.random.seed(1)
    assert np.array_equal(first, draws(mask, grid, 20, ratio=0.5))
    assert len({row.tobytes() for row in first}) > 1


@pytest.mark.parametrize(("mask", "spread"), [(random, 0.1), (block, 0.45)])
def test_every_patch_is_masked_sometimes_and_visible_sometimes(mask, spread):
    frequency = draws(mask, (8, 12), 600, ratio=0.5).mean(axis=0)
    assert abs(frequency - 0.5).max() < spread


def test_random_shows_no_preference_for_neighbours():
    found = draws(random, (14, 14), 200, ratio=0.4)
    pairs = 2 * 14 * 13
    masked = int(found[0].sum())
    expected = pairs * masked * (masked - 1) / (196 * 195)
    assert np.mean([neighbours(row, (14, 14)) for row in found]) == pytest.approx(expected, rel=0.05)


def test_block_masks_hang_together():
    blocks, scattered = (draws(mask, (14, 14), 50, ratio=0.4) for mask in (block, random))
    connected, by_chance = (np.mean([neighbours(row, (14, 14)) for row in rows]) for rows in (blocks, scattered))
    assert connected > 1.7 * by_chance


def test_one_block_is_a_full_rectangle_of_an_allowed_aspect_and_area():
    for i in range(200):
        mask = np.zeros((20, 20), dtype=bool)
        added = masking._add_block(mask, np.random.default_rng(i), 60, 16, 0.5)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert mask.sum() == added == height * width
        assert 12 <= added <= 60  # sides are rounded, so an area of 16 can become one of 12
        assert (height + 0.5) / (width - 0.5) > 0.5
        assert (height - 0.5) / (width + 0.5) < 2


def test_a_block_adds_no_more_than_remains():
    for i in range(100):
        mask = np.random.default_rng(1000 + i).random((8, 8)) < 0.5
        before = mask.copy()
        added = masking._add_block(mask, np.random.default_rng(i), 5, 16, 0.3)
        assert 0 <= added <= 5
        assert mask.sum() - before.sum() == added
        assert mask[before].all()


@pytest.mark.parametrize("mask", [random, block])
@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 75])
def test_a_ratio_outside_zero_and_one_is_refused(mask, ratio):
    with pytest.raises(ValueError, match=f"mask.ratio={ratio} must lie between 0 and 1"):
        mask((4, 4), np.random.default_rng(0), ratio=ratio)


@pytest.mark.parametrize("count", [0, 16, 20])
def test_a_count_that_leaves_nothing_masked_or_nothing_visible_is_refused(count):
    with pytest.raises(ValueError, match=f"mask: {count} of 16 patches cannot be masked"):
        block((4, 4), np.random.default_rng(0), count=count)
