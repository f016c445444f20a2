"""Trivial predictions of masked patches, by hand."""

import math

import pytest
import torch

from mim.health import baselines
from mim.patches import mask_to_ids


def test_the_nearest_visible_patch_is_that_of_a_search_by_hand():
    grid = (4, 5)
    places = [(row, column) for row in range(4) for column in range(5)]
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 20, generator=generator) < 0.7
    mask[:, 13] = False  # at least one is visible
    nearest = baselines.nearest_visible(mask, grid)
    for row, hidden in zip(nearest.tolist(), mask.tolist(), strict=True):
        visible = [i for i in range(20) if not hidden[i]]
        assert row == [min(visible, key=lambda j: (math.dist(places[i], places[j]), j)) for i in range(20)]


@pytest.mark.parametrize(("error", "mean", "copy"), [("squared", (9 + 16) / 2, (1 + 4) / 2), ("absolute", 3.5, 1.5)])
def test_pixels_are_predicted_by_the_mean_and_by_a_copy(error, mean, copy):
    """Four patches in a row: the first and the last are visible."""
    mask = torch.tensor([[False, True, True, False]])
    _, ids_mask, _ = mask_to_ids(mask, 2)
    nearest = baselines.nearest_visible(mask, (1, 4))
    target = torch.tensor([[[2.0], [3.0], [4.0], [6.0]]])
    found = baselines.of_pixels(target, ids_mask, nearest, error)
    assert found["baseline_mean_patch"].tolist() == [mean]
    assert found["baseline_copy"].tolist() == [copy]


def test_codes_are_predicted_by_a_copy_and_by_their_frequency():
    mask = torch.tensor([[False, True, True, False], [True, False, False, True]])
    _, ids_mask, _ = mask_to_ids(mask, 2)
    codes = torch.tensor([[5, 5, 1, 7], [3, 3, 2, 2]])
    assert baselines.copied_codes(codes, ids_mask, baselines.nearest_visible(mask, (1, 4))).tolist() == [0.5, 1.0]
    assert baselines.entropy(torch.tensor([0, 8, 8, 8, 8])) == pytest.approx(math.log(4))
    assert baselines.entropy(torch.tensor([0, 3])) == 0
