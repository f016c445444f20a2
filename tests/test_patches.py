"""Images <-> patches, masks <-> ids, and fixed positions."""

import pytest
import torch

from mim.patches import (
    blank,
    gather,
    grid_of,
    ids_to_mask,
    mask_to_ids,
    patchify,
    replace,
    sincos_positions,
    unpatchify,
)


def test_patches_are_row_major_and_each_runs_over_row_column_channel():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    for i in range(2):
        for j in range(3):
            square = images[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            assert torch.equal(patches[:, 3 * i + j], square.permute(0, 2, 3, 1).flatten(1))


@pytest.mark.parametrize(("height", "width", "channels"), [(8, 8, 3), (8, 12, 3), (12, 4, 1), (4, 4, 5)])
def test_unpatchify_inverts_patchify(height, width, channels):
    images = torch.rand(2, channels, height, width)
    assert torch.equal(unpatchify(patchify(images, 4), (height // 4, width // 4), channels), images)


def test_an_image_that_does_not_divide_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="image 8x10 does not divide into patches of 4x4 pixels"):
        patchify(torch.zeros(1, 3, 8, 10), 4)


def test_patches_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(ValueError, match="6 patches do not fill a grid of 2x4"):
        unpatchify(torch.zeros(1, 6, 12), (2, 4), 3)


@pytest.fixture
def masks():
    return torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(i)) < 7 for i in range(5)])


def test_a_mask_is_split_into_visible_and_masked_ids_in_grid_order(masks):
    ids_keep, ids_mask, _ = mask_to_ids(masks, 7)
    for row, keep, hidden in zip(masks, ids_keep, ids_mask, strict=True):
        assert keep.tolist() == (~row).nonzero().flatten().tolist()
        assert hidden.tolist() == row.nonzero().flatten().tolist()


def test_ids_restore_puts_kept_and_masked_tokens_back_in_grid_order(masks):
    tokens = torch.rand(5, 20, 3)
    ids_keep, ids_mask, ids_restore = mask_to_ids(masks, 7)
    split = torch.cat([gather(tokens, ids_keep), gather(tokens, ids_mask)], dim=1)
    assert torch.equal(gather(split, ids_restore), tokens)


def test_ids_are_static_in_shape_even_for_empty_sides():
    nothing, everything = torch.zeros(2, 6, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool)
    assert [ids.shape[1] for ids in mask_to_ids(nothing, 0)] == [6, 0, 6]
    assert [ids.shape[1] for ids in mask_to_ids(everything, 6)] == [0, 6, 6]


def test_positions_encode_the_column_first_and_the_row_second():
    table = sincos_positions((3, 5), 16).reshape(3, 5, 16)
    assert all(torch.equal(table[0, :, :8], table[row, :, :8]) for row in range(3))
    assert all(torch.equal(table[:, 0, 8:], table[:, column, 8:]) for column in range(5))
    assert len({tuple(p.tolist()) for p in table[0, :, :8]}) == 5
    assert len({tuple(p.tolist()) for p in table[:, 0, 8:]}) == 3


def test_positions_are_sines_then_cosines_of_falling_frequencies():
    table = sincos_positions((1, 4), 16)
    angles = torch.tensor([3.0, 0.3, 0.03, 0.003])  # column 3, frequencies 10000 ** (-i / 4)
    assert torch.allclose(table[3, :8], torch.cat([angles.sin(), angles.cos()]), atol=1e-6)


def test_a_width_that_positions_cannot_fill_is_refused():
    with pytest.raises(ValueError, match="divides by 4, got 18"):
        sincos_positions((2, 2), 18)


def test_a_grid_has_rows_first_and_must_divide():
    assert grid_of((32, 48), 8) == (4, 6)
    with pytest.raises(ValueError, match="image size 32x44 does not divide by the patch size 8"):
        grid_of((32, 44), 8)


def test_blank_patches_are_zero_and_the_others_stay():
    images = torch.rand(2, 3, 8, 12) + 1
    mask = torch.stack([torch.arange(6) % 2 == i for i in range(2)])
    patches = patchify(blank(images, mask, (2, 3)), 4)
    assert not patches[mask].any()
    assert torch.equal(patches[~mask], patchify(images, 4)[~mask])


def test_masked_tokens_are_replaced_in_a_row_or_on_a_grid():
    tokens, token = torch.rand(2, 6, 4), torch.full((1, 1, 4), 7.0)
    mask = torch.stack([torch.arange(6) % 2 == i for i in range(2)])
    found = replace(tokens, mask, token)
    assert (found[mask] == 7).all()
    assert torch.equal(found[~mask], tokens[~mask])
    assert torch.equal(replace(tokens.view(2, 2, 3, 4), mask, token).flatten(1, 2), found)


def test_ids_to_mask_undoes_mask_to_ids():
    mask = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(i)) < 5 for i in range(3)])
    ids_keep, _, _ = mask_to_ids(mask, 5)
    assert torch.equal(ids_to_mask(ids_keep, 12), mask)
