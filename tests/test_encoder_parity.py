"""transformers' models with the same weights give the same features, to 1e-5 of the largest entry."""

import re

import pytest
import torch
from conftest import shaken

from mim.encoders import beit, eva, vit

transformers = pytest.importorskip("transformers")

SIZE = (32, 32)
SMALL = {"width": 32, "depth": 3, "num_heads": 2, "patch_size": 8}
THEIRS = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    "layer_norm_eps": 1e-6,
}  # fmt: skip
MLP = {"intermediate_size": 128}
BEIT = THEIRS | MLP | {"layer_scale_init_value": 0.1, "use_mean_pooling": False}
BARE = {"add_pooling_layer": False}
DINO3 = THEIRS | MLP | {"num_register_tokens": 4, "layer_norm_eps": 1e-5}
TINY, REG4 = {"model": "vit_tiny_patch16_224"}, {"model": "vit_base_patch14_reg4_dinov2"}
PEERS = {  # our encoder and what to change, their model, its configuration and other arguments
    "ViT": ("vit", TINY, "ViTModel", THEIRS | MLP, BARE),
    "DINOv2": ("vit", TINY | {"layer_scale": 0.1}, "Dinov2Model", THEIRS, {}),
    "DINOv2, registers": ("vit", REG4, "Dinov2WithRegistersModel", THEIRS | {"num_register_tokens": 4}, {}),
    "BEiT": ("beit", {"positions": "relative"}, "BeitModel", BEIT | {"use_relative_position_bias": True}, BARE),
    "BEiT, shared bias": ("beit", {}, "BeitModel", BEIT | {"use_shared_relative_position_bias": True}, BARE),
    "BEiT, absolute positions": (
        "beit", {"positions": "absolute"}, "BeitModel", BEIT | {"use_absolute_position_embeddings": True}, BARE,
    ),
    "DINOv3": ("eva", {"model": "vit_small_patch16_dinov3_qkvb"}, "DINOv3ViTModel", DINO3, {}),
}  # fmt: skip
NAMES = [  # transformers' in memory -> timm's
    (r"embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.cls_token", "cls_token"),
    (r"shared_position_bias\.", "rel_pos_bias."),
    (r"^((encoder|model)\.)?layers?\.", "blocks."),
    (r"relative_position_bias\.relative", "attn.relative"),
    (r"attention\.o_proj", "attn.proj"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"mlp\.up_proj", "mlp.fc1"),
    (r"mlp\.down_proj", "mlp.fc2"),
    (r"lambda_", "gamma_"),
    (r"^layernorm\.", "norm."),
]


def renamed(state, ours):
    """transformers' weights under the names that `ours` has, with query, key and value as one matrix."""
    state, found = dict(state), {}
    if "pos_embed" in ours and "embeddings.register_tokens" in state:  # timm's registers: positions of patches only
        positions = state["embeddings.position_embeddings"]
        state["embeddings.cls_token"] = state["embeddings.cls_token"] + positions[:, :1]
        state["embeddings.position_embeddings"] = positions[:, 1:]
    for name, value in state.items():
        if "mask_token" in name:
            continue
        for old, new in NAMES:
            name = re.sub(old, new, name)
        found[name] = value
    for i in range(3):
        block = f"blocks.{i}"
        parts = [found.pop(f"{block}.attention.{part}_proj.weight") for part in "qkv"]
        found[f"{block}.attn.qkv.weight"] = torch.cat(parts)
        q, k, v = (found.pop(f"{block}.attention.{part}_proj.bias", None) for part in "qkv")
        biases = {"qkv.bias": torch.cat([q, k, v])} if k is not None else {"q_bias": q, "v_bias": v}
        found |= {f"{block}.attn.{name}": bias for name, bias in biases.items()}
        for j in (1, 2):
            lambdas = found.pop(f"{block}.layer_scale{j}.lambda1", None)
            if lambdas is not None:
                found[f"{block}.ls{j}.gamma" if f"{block}.ls{j}.gamma" in ours else f"{block}.gamma_{j}"] = lambdas
    return found


@pytest.fixture(params=PEERS)
def pair(request):
    """Our encoder and transformers' model with the same random weights."""
    name, changes, model, options, arguments = PEERS[request.param]
    torch.manual_seed(0)
    kind = getattr(transformers, model)
    theirs = shaken(kind(kind.config_class(**options), **arguments))
    module = {"vit": vit, "eva": eva, "beit": beit}[name]
    ours = module.build(module.Config(**SMALL | changes), image_size=SIZE, channels=3).eval()
    ours.vit.load_state_dict(renamed(theirs.state_dict(), ours.vit.state_dict()))
    return ours, theirs


def closeness(ours, theirs):
    """The largest difference in units of the largest entry."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.no_grad()
def test_features_are_those_of_transformers(pair):
    ours, theirs = pair
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    expected = theirs(ours.normalize(images)).last_hidden_state
    assert closeness(torch.cat(ours(images), dim=1), expected) < 1e-5


def test_gradients_are_those_of_transformers(pair):
    ours, theirs = (model.double() for model in pair)  # in single precision the order of sums shows
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1)).double()
    theirs(ours.normalize(images)).last_hidden_state.square().sum().backward()
    torch.cat(ours(images), dim=1).square().sum().backward()
    given = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    expected = renamed(given, ours.vit.state_dict())
    for name, parameter in ours.vit.named_parameters():
        if name in ("cls_token", "pos_embed"):  # of the registers' layout theirs are sums
            continue
        assert closeness(parameter.grad, expected[name]) < 1e-5, name
