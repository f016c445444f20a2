"""Finite scalar quantization: the grid of levels is the codebook."""

import itertools

import pytest
import torch
from vector_quantize_pytorch import FSQ

from tokenizer import fsq

NOISE = torch.arange(2)


@pytest.mark.parametrize("levels", [[8, 5, 5], [3, 4], [7], [4, 4, 4, 4]])
def test_vectors_are_quantized_as_by_an_independent_implementation(levels):
    grid, oracle = fsq.Grid(levels), FSQ(levels)
    z = 3 * torch.randn(2, 500, len(levels), generator=torch.Generator().manual_seed(0))
    found, ids, _ = grid(z, NOISE)
    expected, expected_ids = oracle(z)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.equal(ids, expected_ids.long())


@pytest.mark.parametrize("levels", [[8, 5, 5], [3, 4]])
def test_codes_and_vectors_are_one_to_one(levels):
    grid = fsq.Grid(levels)
    ids = torch.arange(torch.tensor(levels).prod())[None]
    found = grid.vectors(ids)[0]
    assert len({tuple(row) for row in found.tolist()}) == ids.numel()
    extremes = torch.tensor(list(itertools.product([-30.0, 30.0], repeat=len(levels))))[None]
    rounded, codes, _ = grid(extremes, NOISE[:1])
    assert codes.min() == 0
    assert codes.max() == ids.max()
    assert torch.equal(grid.vectors(codes), rounded)


def test_the_gradient_passes_the_rounding():
    z = torch.randn(1, 4, 2, requires_grad=True)
    fsq.Grid([8, 8])(z, NOISE[:1])[0].sum().backward()
    assert (z.grad > 0).all()


def test_levels_below_three_are_refused():
    with pytest.raises(ValueError, match=r"tokenizer.levels=\[8, 2\] must hold numbers of 3 or more"):
        fsq.build(fsq.Config(levels=[8, 2]))


def mixed(num, seed=0):
    """Values of which the second nearly repeats the first, far from zero."""
    z = torch.randn(4, num, 2, generator=torch.Generator().manual_seed(seed))
    return torch.stack([5 + 3 * z[..., 0], -2 + 0.3 * z[..., 0] + 0.01 * z[..., 1]], dim=-1)


def test_whitened_values_fill_the_grid_where_plain_ones_leave_most_of_it_empty():
    plain, white = fsq.Grid([8, 8]), fsq.Grid([8, 8])
    white.start(mixed(2000).flatten(0, 1), 1)
    used = [len(grid.ids(grid.place(mixed(2000, seed=1))).unique()) for grid in (plain, white)]
    assert used[0] < 16
    assert used[1] == 64


def test_updates_move_the_moments_alike_for_any_split_and_leave_out_what_pads():
    whole, parts, padded = (fsq.Grid([8, 8]).train() for _ in range(3))
    z = mixed(50)
    whole(z, torch.arange(4))
    for i in range(4):
        parts(z[i : i + 1], torch.arange(1))
    padded(torch.cat([z, 9 * z]), torch.arange(8), torch.tensor([1.0] * 4 + [0.0] * 4))
    for grid in (whole, parts, padded):
        grid.update()
    for other in (parts, padded):
        assert torch.allclose(whole.mean, other.mean, atol=1e-5)
        assert torch.allclose(whole.whitening, other.whitening, rtol=1e-4)
    assert torch.allclose(whole.mean, 0.01 * z.flatten(0, 1).mean(dim=0), atol=1e-5)
