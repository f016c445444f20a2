"""Masks: exact counts on every grid, a function of the generator alone, and as blocky as they claim."""

import math
from random import Random

import numpy as np
import pytest

from mim import masking
from mim.masking import block, cells, random

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


@pytest.mark.parametrize("mask", [random, block, cells])
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


# ---- the published generator ---------------------------------------------------------------------


def published_block(mask, rng, limit, min_patches=16):
    """One block as BEiT's program draws it, from Python's generator; returns what it added, 0 after ten tries."""
    h, w = mask.shape
    for _ in range(10):
        area = rng.uniform(min_patches, limit)
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < h and width < w:
            top, left = rng.randint(0, h - height), rng.randint(0, w - width)
            region = mask[top : top + height, left : left + width]
            added = region.size - int(region.sum())
            if 0 < added <= limit:
                region[:] = True
                return added
    return 0


def kolmogorov_smirnov(a, b):
    """Largest distance of two empirical distribution functions."""
    points = np.union1d(a, b)
    cumulative = [np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (a, b)]
    return float(np.abs(cumulative[0] - cumulative[1]).max())


def rectangle(mask):
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.ptp(rows) + 1, np.ptp(columns) + 1


BOUND = 1.95 * math.sqrt(2 / 2000)  # two samples of 2000 from one distribution exceed it once in a thousand times


@pytest.mark.parametrize("limit", [75, 20])
def test_area_aspect_and_place_of_a_block_are_distributed_as_published(limit):
    """On an empty grid of 14 x 14, where the block can be read off."""
    found = [[], []]
    rng = Random(0)
    for i in range(2000):
        for blocks, add in (
            (found[0], lambda mask: masking._add_block(mask, np.random.default_rng(i), limit, 16, 0.3)),  # noqa: B023
            (found[1], lambda mask: published_block(mask, rng, limit)),
        ):
            mask = np.zeros((14, 14), dtype=bool)
            assert add(mask) == mask.sum()
            height, width = rectangle(mask)
            blocks.append((height * width, height / width, mask.any(axis=1).argmax(), mask.any(axis=0).argmax()))
    ours, theirs = (np.array(blocks).T for blocks in found)
    for mine, reference in zip(ours, theirs, strict=True):
        assert kolmogorov_smirnov(mine, reference) < BOUND


@pytest.mark.parametrize("limit", [12, 4])
def test_the_last_blocks_where_less_than_the_smallest_area_remains_are_distributed_as_published(limit):
    added = [[], []]
    rng = Random(0)
    for i in range(2000):
        start = np.zeros((14, 14), dtype=bool)
        start[2 : 2 + i % 8, 3:10] = True
        added[0].append(masking._add_block(start.copy(), np.random.default_rng(i), limit, 16, 0.3))
        added[1].append(published_block(start.copy(), rng, limit))
    assert kolmogorov_smirnov(*map(np.array, added)) < BOUND


def test_whole_masks_hang_together_as_published_and_have_the_exact_count_that_those_only_approach():
    rng, theirs = Random(0), []
    for _ in range(2000):
        mask, added = np.zeros((14, 14), dtype=bool), 1
        while added and mask.sum() < 75:
            added = published_block(mask, rng, 75 - int(mask.sum()))
        theirs.append(mask)
    ours = draws(block, (14, 14), 2000, count=75)
    assert set(ours.sum(axis=1)) == {75}
    counts = np.array([mask.sum() for mask in theirs])
    assert counts.max() == 75
    assert 0.5 < (counts == 75).mean() < 0.8  # v1 gives up early in a third of the masks
    full = [neighbours(mask, (14, 14)) for mask in theirs if mask.sum() == 75]
    alike = [neighbours(mask, (14, 14)) for mask in ours]
    assert np.mean(alike) == pytest.approx(np.mean(full), rel=0.02)
    coverage = [np.mean(masks, axis=0).reshape(14, 14) for masks in (ours, theirs)]
    assert np.abs(coverage[0] - coverage[1]).max() < 0.06  # probability of each patch


# ---- cells ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "cell", "ratio", "masked"),
    [
        ((14, 14), 2, 0.6, 30),  # ViT-B/16 at 224: 49 units of 32 pixels
        ((6, 6), 1, 0.6, 22),  # Swin at 192: 36 units
        ((48, 48), 8, 0.6, 22),  # the same on its patches of 4
        ((4, 6), 2, 0.5, 3),
        ((10, 10), 1, 0.55, 55),  # 0.55 * 100 is a little more than 55
    ],
)
def test_cells_masks_whole_squares_and_rounds_their_number_up(grid, cell, ratio, masked):
    h, w = grid
    for row in draws(cells, grid, 20, ratio=ratio, cell=cell):
        squares = row.reshape(h // cell, cell, w // cell, cell)
        assert (squares.all(axis=(1, 3)) == squares.any(axis=(1, 3))).all()
        assert squares.any(axis=(1, 3)).sum() == masked


def test_every_cell_is_masked_as_often_as_any_other():
    frequency = draws(cells, (14, 14), 1000, ratio=0.6, cell=2).mean(axis=0)
    assert abs(frequency - 30 / 49).max() < 0.07


@pytest.mark.parametrize("cell", [0, 3, 14])
def test_a_cell_that_does_not_divide_the_grid_is_refused(cell):
    with pytest.raises(ValueError, match=f"mask.cell={cell} does not divide the grid of 14x10 patches"):
        cells((14, 10), np.random.default_rng(0), cell=cell)


def test_a_ratio_that_leaves_no_cell_visible_is_refused():
    with pytest.raises(ValueError, match=r"mask.ratio=0.9 masks all 4 cells of 7x7 patches; one must stay visible"):
        cells((14, 14), np.random.default_rng(0), ratio=0.9, cell=7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_patches": 0}, "mask.min_patches=0 must be at least 1"),
        ({"min_aspect": 0.0}, "mask.min_aspect=0.0 must be above 0 and at most 1"),
        ({"min_aspect": 3.0}, "mask.min_aspect=3.0 must be above 0 and at most 1"),
    ],
)
def test_blocks_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        masking.block((14, 14), np.random.default_rng(0), **options)


@pytest.mark.parametrize("grid", [(4, 40), (40, 4)])
def test_a_block_reaches_from_no_edge_of_the_grid_to_the_other(grid):
    """As published: its height stays below the grid's, and its width."""
    highest = [0, 0]
    for i in range(300):
        mask = np.zeros(grid, dtype=bool)
        masking._add_block(mask, np.random.default_rng(i), 60, 16, 0.3)
        highest = [max(most, int(mask.any(axis=axis).sum())) for most, axis in zip(highest, (1, 0), strict=True)]
    assert highest[grid.index(4)] == 3


def test_a_block_adds_no_more_than_remains():
    for i in range(100):
        mask = np.random.default_rng(1000 + i).random((8, 8)) < 0.5
        before = mask.copy()
        added = masking._add_block(mask, np.random.default_rng(i), 5, 16, 0.3)
        assert 0 <= added <= 5
        assert mask.sum() - before.sum() == added
        assert mask[before].all()


@pytest.mark.parametrize("mask", [random, block, cells])
@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 75])
def test_a_ratio_outside_zero_and_one_is_refused(mask, ratio):
    with pytest.raises(ValueError, match=f"mask.ratio={ratio} must lie between 0 and 1"):
        mask((4, 4), np.random.default_rng(0), ratio=ratio)


@pytest.mark.parametrize("count", [0, 16, 20])
def test_a_count_that_leaves_nothing_masked_or_nothing_visible_is_refused(count):
    with pytest.raises(ValueError, match=f"mask: {count} of 16 patches cannot be masked"):
        block((4, 4), np.random.default_rng(0), count=count)
