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
