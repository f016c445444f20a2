"""Blocks are found in every network, and recomputing or compiling them changes neither gradients nor names."""

import pytest
import timm
import torch
from test_contracts import KNOWN, OBJECTIVES, a_batch, a_tokenizer, an_encoder, an_objective
from torch import nn

from mim.blocks import blocks, compile_each, recompute

HALF = torch.tensor(0.5)
CASES = [*((name, "vit") for name in OBJECTIVES), *(("simmim", name) for name in ("eva", "beit", "dense"))]
ENCODERS = {
    "vit": ["vit.blocks.0", "vit.blocks.1"],
    "eva": ["vit.blocks.0", "vit.blocks.1"],
    "beit": ["vit.blocks.0", "vit.blocks.1"],
    "dense": ["model.layers.0.blocks.0", "model.layers.1.blocks.0"],
}
FURTHER = {"mae": ["decoder_blocks.0"], "beit2": ["extra_blocks.blocks.1", "extra_blocks.blocks.2"]}
FAMILIES = {  # of timm: how many blocks, and the least share of the parameters that stands in them
    "xcit_nano_12_p8_224": (14, 0.9),
    "cait_xxs24_224": (26, 0.9),
    "crossvit_tiny_240": (21, 0.8),
    "mixer_s32_224": (8, 0.8),
    "convnext_atto": (12, 0.8),
    "hiera_tiny_224": (12, 0.9),
    "swinv2_tiny_window8_256": (12, 0.9),
    "mobilevit_xxs": (16, 0.4),
}


def gradients(objective):
    """What one micro-batch gives, with draws seeded as the loop seeds them."""
    objective.zero_grad()
    torch.manual_seed(0)
    objective(a_batch(), HALF)["loss"].sum().backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", KNOWN["mim.encoders"])
def test_the_blocks_of_an_encoder_are_its_transformer_blocks(name):
    assert list(blocks(an_encoder(name))) == ENCODERS[name]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_has_the_blocks_of_its_encoder_and_those_that_it_adds(name):
    found = list(blocks(an_objective(name)))
    if name == "tokenize":
        assert found
        assert all(".blocks.group_" in block for block in found)
    else:
        assert found == [f"encoder.{block}" for block in ENCODERS["vit"]] + FURTHER.get(name, [])


@pytest.mark.parametrize("name", KNOWN["tokenizer"])
def test_most_of_a_tokenizer_stands_in_blocks(name):
    tokenizer = a_tokenizer(name)
    found = blocks(tokenizer)
    assert len(found) >= 4
    assert len({id(p) for block in found.values() for p in block.parameters()}) > 0.5 * len(
        list(tokenizer.parameters())
    )


@pytest.mark.parametrize("model", FAMILIES)
def test_the_blocks_of_other_families_hold_most_of_their_parameters_once(model):
    with torch.device("meta"):
        network = timm.create_model(model)
    inside = [p for block in blocks(network).values() for p in block.parameters()]
    assert len({id(p) for p in inside}) == len(inside)
    number, share = FAMILIES[model]
    assert len(blocks(network)) == number
    assert sum(p.numel() for p in inside) >= share * sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("name", "encoder"), CASES)
def test_recomputed_blocks_give_the_same_gradients_bit_for_bit_with_drop_path(name, encoder):
    objective = an_objective(name, encoder).train()
    for block in blocks(objective).values():
        if hasattr(block, "drop_path1"):
            block.drop_path1, block.drop_path2 = timm.layers.DropPath(0.5), timm.layers.DropPath(0.5)
    wanted = gradients(objective)
    assert recompute(objective) == len(blocks(objective))
    found = gradients(objective)
    assert found.keys() == wanted.keys()
    assert all(found[key].equal(value) for key, value in wanted.items())


def test_a_recomputed_block_runs_once_more_in_the_backward():
    objective = an_objective("mae").train()
    ran = []
    for name, block in blocks(objective).items():
        block.norm1.register_forward_hook(lambda *_, name=name: ran.append(name))
    recompute(objective)
    loss = objective(a_batch(), HALF)["loss"].sum()
    assert ran == list(blocks(objective))
    loss.backward()
    assert ran == [*blocks(objective), *reversed(blocks(objective))]


def test_a_block_with_a_batch_norm_is_not_recomputed():
    def block(norm):
        return nn.ModuleDict({"a": nn.Linear(2, 2), "b": norm})

    network = nn.Sequential(block(nn.BatchNorm1d(2)), block(nn.LayerNorm(2)))
    assert len(blocks(network)) == 2
    assert recompute(network) == 1


@pytest.mark.parametrize("prepare", [recompute, lambda network: compile_each(network, backend="eager")])
def test_blocks_that_run_otherwise_keep_the_names_of_their_tensors(prepare):
    objective = an_objective("mae")
    names = list(objective.state_dict())
    prepare(objective)
    assert list(objective.state_dict()) == names
    assert list(dict(objective.named_modules())) == list(dict(an_objective("mae").named_modules()))
