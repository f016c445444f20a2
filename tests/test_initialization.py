"""How weights start: as published where a recipe says so, and an initialisation of our own."""

import pytest
import timm
import torch
from timm.layers import Attention
from torch import nn

from mim.initialization import PUBLISHED, tie_keys_to_queries

MODELS = {
    "vit": ("vit_tiny_patch16_224", {"reg_tokens": 2}),
    "hybrid": ("vit_tiny_r_s16_p8_224", {"patch_size": 8}),
    "eva": ("eva02_base_patch14_224", {}),  # SwiGLU
    "beit": ("beit_base_patch16_224", {}),
}
SHAPE = {"embed_dim": 128, "depth": 3, "num_heads": 4, "img_size": 64, "init_values": 0.1, "num_classes": 0}


def started(name, kind):
    model, options = MODELS[kind]
    torch.manual_seed(0)
    found = timm.create_model(model, **{"patch_size": 8} | SHAPE | options)
    PUBLISHED[name](found)
    return found


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


# ---- BEiT ----------------------------------------------------------------------------------------


def test_beit_starts_from_a_normal_cut_at_one_standard_deviation(kind):
    """std 0.02 cut at 0.02 leaves 0.02 * sqrt(1 - 2 phi(1) / (2 Phi(1) - 1)) = 0.0108."""
    model = started("beit", kind)
    weights = [model.patch_embed.proj.weight, model.cls_token]
    inner = [(name, p) for name, p in model.blocks.named_parameters() if p.ndim == 2 and "relative" not in name]
    weights += [p for name, p in inner if not name.endswith(("attn.proj.weight", "mlp.fc2.weight"))]
    assert len(weights) > 2 * 3
    for weight in weights:
        assert weight.abs().max() <= 0.02
        assert weight.std().item() == pytest.approx(0.0108, rel=0.15 if weight.numel() < 1000 else 0.03)


def test_beit_divides_the_last_linear_of_both_branches_by_the_depth(kind):
    for i, block in enumerate(started("beit", kind).blocks, start=1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(0.0108 / (2 * i) ** 0.5, rel=0.03)
            assert weight.abs().max().item() == pytest.approx(0.02 / (2 * i) ** 0.5, rel=0.01)


def test_beit_starts_biases_at_zero_and_leaves_norms_and_gammas(kind):
    model = started("beit", kind)
    for name, parameter in model.blocks.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        if "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        if "gamma" in name:
            assert (parameter == 0.1).all(), name
    assert not model.patch_embed.proj.bias.any()
    assert all(m.eps == 1e-6 for m in model.modules() if isinstance(m, nn.LayerNorm))


def test_beit_starts_the_relative_positions_at_zero():
    model = timm.create_model("beit_base_patch16_224", **SHAPE)
    PUBLISHED["beit"](model)
    assert not model.blocks[0].attn.relative_position_bias_table.any()


def test_the_published_rescaling_is_timm_s():
    """timm's Beit rescales alike, from a normal that is as good as not cut."""
    theirs = timm.create_model("beit_base_patch16_224", patch_size=8, **SHAPE)
    ours = started("beit", "beit")
    for a, b in zip(ours.blocks, theirs.blocks, strict=True):
        assert (b.mlp.fc2.weight.std() / a.mlp.fc2.weight.std()).item() == pytest.approx(0.02 / 0.0108, rel=0.03)


def test_beit_refuses_blocks_of_another_kind():
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=1, block_fn=timm.models.vision_transformer.ParallelScalingBlock
    )
    with pytest.raises(ValueError, match=r"encoder\.weight_init=beit is for blocks with attn and mlp; timm's Parallel"):
        PUBLISHED["beit"](model)


def test_the_stem_of_a_hybrid_stays_as_it_was_drawn():
    torch.manual_seed(0)
    model, options = MODELS["hybrid"]
    theirs = timm.create_model(model, **SHAPE | options).patch_embed.backbone.state_dict()
    for name in PUBLISHED:
        found = started(name, "hybrid").patch_embed.backbone.state_dict()
        assert all(torch.equal(found[key], value) for key, value in theirs.items())


# ---- MAE -----------------------------------------------------------------------------------------


def bound_of(weight):
    """Of Xavier uniform: sqrt(6 / (fan in + fan out)), the patch embedding as a Linear."""
    return (6 / sum(weight.flatten(1).shape)) ** 0.5


def test_mae_starts_from_xavier_uniform(kind):
    model = started("mae", kind)
    weights = [m.weight for m in model.blocks.modules() if isinstance(m, nn.Linear)] + [model.patch_embed.proj.weight]
    for weight in weights:
        bound = bound_of(weight)
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)


def test_mae_starts_tokens_normal_and_biases_of_the_blocks_at_zero():
    model = started("mae", "vit")
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.reg_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert not any(p.any() for name, p in model.blocks.named_parameters() if name.endswith("bias"))
    assert model.patch_embed.proj.bias.any()  # torch's own, as published


def test_jax_is_not_mae():
    jax = timm.create_model("vit_tiny_patch16_224", weight_init="jax", **SHAPE, patch_size=8)
    assert jax.cls_token.abs().max() < 1e-4
    assert jax.patch_embed.proj.weight.abs().max() > 1.1 * bound_of(jax.patch_embed.proj.weight)


# ---- our own -------------------------------------------------------------------------------------


def test_a_token_attends_most_to_tokens_like_itself_and_values_stay():
    torch.manual_seed(0)
    block = nn.Module()
    block.attn = Attention(32, num_heads=1)
    before = block.attn.qkv.weight.detach().clone()
    tie_keys_to_queries([block], 2.0)
    queries, keys, values = block.attn.qkv.weight.detach().chunk(3)
    assert torch.equal(keys, queries)
    assert torch.equal(queries, 2 * before[:32])
    assert torch.equal(values, before[64:])
    tokens = torch.nn.functional.normalize(torch.randn(16, 32), dim=1)
    scores = (tokens @ queries.T) @ (tokens @ keys.T).T  # (16, 16)
    assert torch.equal(scores.argmax(dim=1), torch.arange(16))
