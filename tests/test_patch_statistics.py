"""Mean and variance of masked patches, from the visible ones alone."""

import torch

from mim.patch_statistics import from_visible, statistics
from mim.patches import patchify

GRID = (8, 8)


def a_mask(num_masked):
    order = torch.rand(1, 64, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    return order < num_masked


def test_a_smooth_image_is_found_again_and_visible_patches_keep_their_own():
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    patches = patchify((0.3 + 0.4 * rows + 0.2 * columns)[None, None], 8)  # (1, 64, 64)
    mask, (own_mean, own_variance) = a_mask(40), statistics(patches)
    mean, variance = from_visible(patches, mask, GRID)
    assert (mean - own_mean).abs().max() < 0.1  # the image goes from 0.3 to 0.9
    assert (own_mean[~mask].mean() - own_mean).abs().max() > 0.25  # what one mean for all would be off by
    assert torch.allclose(variance, own_variance, rtol=1e-3)  # a slope has the same everywhere
    assert torch.equal(mean[~mask], own_mean[~mask])


def test_masked_pixels_change_nothing_and_the_nearest_count_most():
    patches, mask = torch.rand(1, 64, 12), a_mask(63)
    other = torch.where(mask[..., None], torch.full_like(patches, torch.nan), patches)
    for ours, theirs in zip(from_visible(patches, mask, GRID), from_visible(other, mask, GRID), strict=True):
        assert torch.equal(ours, theirs)
        assert (ours == ours[~mask]).all()  # of a single one
    line = torch.tensor([0.0, 9.0, 9.0, 9.0, 1.0]).view(1, 5, 1).expand(1, 5, 4)
    mean, _ = from_visible(line, torch.tensor([[False, True, True, True, False]]), (1, 5))
    expected = [0, 1 / 82, 0.5, 81 / 82, 1]  # 1 / distance ** 4
    assert torch.allclose(mean.flatten(), torch.tensor(expected), atol=1e-6)
