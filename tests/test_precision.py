"""Under autocast to bfloat16 losses, targets and quantizers are computed in float32."""

import pytest
import torch
from test_contracts import KNOWN, OBJECTIVES, a_batch, a_tokenizer, an_objective

from mim.objectives import tokenize
from tokenizer.codebook import Codebook, nearest
from tokenizer.fsq import Grid

KINDS = [*(name for name in OBJECTIVES if name != "tokenize"), *KNOWN["tokenizer"]]


def an_objective_or_tokenizer(kind):
    if kind in OBJECTIVES:
        return an_objective(kind)
    return tokenize.build(a_tokenizer(kind), tokenize.Config())


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def terms(kind, *, mixed):
    objective = an_objective_or_tokenizer(kind).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        return objective(a_batch(), torch.tensor(0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_an_objective_returns_is_float32_and_close_to_a_run_without_autocast(kind):
    mixed, exact = terms(kind, mixed=True), terms(kind, mixed=False)
    assert {name: value.dtype for name, value in mixed.items()} == dict.fromkeys(mixed, torch.float32)
    assert not mixed["loss"].equal(exact["loss"])  # autocast was on
    torch.testing.assert_close(mixed["loss"], exact["loss"], rtol=0.02, atol=0.01)


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_targets_are_those_without_autocast(name):
    objective, images = an_objective(name), a_batch()["images"]
    exact = objective.target(images)
    with bfloat16():
        mixed = objective.target(images)
    torch.testing.assert_close(mixed, exact, rtol=0, atol=0)


@pytest.mark.parametrize("quantizer", [Codebook(16, 4, num_revived=0), Grid([5, 4, 3, 4])])
def test_a_quantizer_and_what_it_collects_are_those_without_autocast(quantizer):
    vectors, noise = torch.randn(3, 16, 4, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    found = []
    for mixed in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            out = quantizer.train()(vectors, noise)
            ids = quantizer.ids(quantizer.place(vectors))
            before = {name: value.clone() for name, value in quantizer.named_buffers()}
            quantizer.update()
        found.append((*out, ids, *(value.clone() for value in quantizer.buffers())))
        quantizer.load_state_dict(before, strict=False)
    for exact, mixed in zip(*found, strict=True):
        assert mixed.dtype == exact.dtype
        assert mixed.equal(exact)


def test_the_nearest_code_is_found_in_float32():
    """Codes closer to each other than bfloat16 tells apart."""
    codes = torch.stack([torch.full((8,), 1 + i * 1e-3) for i in range(16)])
    with bfloat16():
        assert nearest(codes + 1e-5, codes).tolist() == list(range(16))
