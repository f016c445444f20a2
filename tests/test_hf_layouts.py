"""Conversions to transformers' names: a way back exists, and every part that has no equal is refused by its name."""

import pytest
import timm
import torch
from timm.layers import QuickGELU
from torch import nn

from mim.handover import hf_layouts
from mim.handover.hf_layouts import Unfit
from mim.pretrained import layouts

SHAPE = {"img_size": 16, "patch_size": 8, "num_classes": 0}
TINY = {**SHAPE, "embed_dim": 24, "depth": 2, "num_heads": 2}


def a_vit(model="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    found = timm.create_model(model, **{**TINY, **options}).eval()
    for parameter in found.parameters():
        nn.init.normal_(parameter)
    return found


BACK = [
    ("dinov2", a_vit, {"init_values": 0.1}),
    ("dinov2_with_registers", a_vit, {"init_values": 0.1, "reg_tokens": 2, "no_embed_class": True}),
    ("vit", a_vit, {}),
    ("beit", a_vit, {"model": "beit_base_patch16_224", "use_fc_norm": False}),
    ("beit", a_vit, {"model": "beit_base_patch16_224", "use_fc_norm": False, "use_rel_pos_bias": False,
                     "use_shared_rel_pos_bias": True, "init_values": None}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "make", "options"), BACK)
def test_the_reader_of_released_weights_finds_every_tensor_again(kind, make, options):
    model = make(**options)
    layout = layouts.recognise(hf_layouts.convert(kind, model).tensors)
    found, _ = layouts.adapt(layout.encoder, model.state_dict())
    for name, tensor in model.state_dict().items():
        if name == "pos_embed" and options.get("no_embed_class"):
            assert torch.equal(found[name][:, 1:], tensor)  # the class gives the class token a position: zeros
            assert not found[name][:, 0].any()
        else:
            assert torch.equal(found[name], tensor), name


def test_queries_keys_and_values_are_the_thirds_of_the_joined_matrix():
    weight = torch.arange(24.0).reshape(6, 4)
    found = hf_layouts.split_qkv({"blocks.0.attn.qkv.weight": weight})
    assert {name.split(".")[3]: t[0, 0].item() for name, t in found.items()} == {"query": 0, "key": 8, "value": 16}


def test_positions_of_registers_are_added_to_them():
    tensors = {"pos_embed": torch.arange(6.0).reshape(1, 6, 1), "reg_token": torch.full((1, 2, 1), 10.0)}
    found = hf_layouts.prefix_positions(tensors, num_patches=3)
    assert found["reg_token"].flatten().tolist() == [11, 12]
    assert found["pos_embed"].flatten().tolist() == [0, 3, 4, 5]


def test_the_gated_width_is_that_of_dinov2_giant():
    assert hf_layouts.gated_width(1536 * 4) == 4096


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_pytorch_tanh"),
        (QuickGELU(), "quick_gelu"),
        (nn.SiLU(), "silu"),
    ],
)
def test_an_activation_has_the_name_under_which_transformers_computes_the_same(act, name):
    from transformers.activations import ACT2FN

    x = torch.linspace(-4, 4, 101)
    assert hf_layouts.activation_of(act) == name
    assert torch.allclose(ACT2FN[name](x), act(x), atol=1e-6)


def other_epsilon(model):
    model.blocks[1].norm2.eps = 1e-3


def other_activation(model):
    model.blocks[0].mlp.act = nn.Softplus()


def other_attention(model):
    model.blocks[1].attn.norm = nn.LayerNorm(24)


def other_block(model):
    model.blocks[1] = nn.Identity()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_epsilon, "not LayerNorms with one epsilon"),
        (other_activation, "no name for its activation Softplus"),
        (other_attention, "norms inside attention or MLP"),
        (other_block, "blocks are of the kind Identity"),
    ],
)
@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_a_part_that_the_classes_lack_is_named(kind, change, reason):
    model = a_vit()
    change(model)
    with pytest.raises(Unfit, match=reason):
        hf_layouts.convert(kind, model)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"class_token": False, "global_pool": "avg"}, "has no class token"),
        ({"pos_embed": "none"}, "has no table of positions"),
        ({"scale_mlp_norm": True}, "norms inside attention or MLP"),
        ({"model": "deit_tiny_distilled_patch16_224"}, "VisionTransformerDistilled, not a plain"),
    ],
)
def test_a_variant_that_the_classes_lack_is_named(options, reason):
    with pytest.raises(Unfit, match=reason):
        hf_layouts.convert("vit", a_vit(**options))


def test_no_whole_ratio_of_the_mlp_is_refused_by_dinov2_alone():
    model = a_vit(mlp_ratio=2.5)
    with pytest.raises(Unfit, match="60 wide inside, is no whole multiple of the width 24"):
        hf_layouts.convert("dinov2", model)
    assert hf_layouts.convert("vit", model).config["intermediate_size"] == 60


def test_the_conversion_leaves_the_encoder_as_it_is():
    model = a_vit(init_values=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hf_layouts.convert("vit", model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
