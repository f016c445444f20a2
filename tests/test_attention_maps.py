"""Attention maps: they are the softmax that the blocks compute, and looking changes nothing."""

import math

import pytest
import torch
from conftest import shaken

from mim import blocks
from mim.config import ConfigError
from mim.encoders import beit, dense, eva, vit
from mim.health.attention_maps import attention_maps, kept_mass, mean_distance, rollout

SIZE = (16, 24)
SMALL = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
ROTARY = "vit_small_patch16_rope_224"


def encoder_of(kind, size=SIZE):
    torch.manual_seed(0)
    options = {"image_size": size, "channels": 3}
    build = {
        "vit": lambda: vit.build(vit.Config(model="vit_tiny_patch16_224", **SMALL), **options),
        "registers and normed queries": lambda: vit.build(
            vit.Config(model="vit_tiny_patch16_224", num_registers=3, qk_norm=True, **SMALL), **options
        ),
        "eva": lambda: eva.build(eva.Config(model="eva02_tiny_patch14_224", **SMALL), **options),
        "rope": lambda: eva.build(eva.Config(model=ROTARY, num_registers=2, qk_norm=True, **SMALL), **options),
        "shared bias": lambda: beit.build(beit.Config(positions="shared_relative", **SMALL), **options),
        "own bias": lambda: beit.build(beit.Config(positions="relative", **SMALL), **options),
        "absolute": lambda: beit.build(beit.Config(positions="absolute", **SMALL), **options),
        "swin": lambda: dense.build(
            dense.Config(options={"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}), **options
        ),
    }[kind]
    return shaken(build()).requires_grad_(False)


def turned(x, angles):
    """Pairs of x (B, heads, N, d) turned in their planes by angles (N, d / 2): rotary positions as complex numbers."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * angles).flatten(-2)


def by_hand(encoder, module, tokens):
    """softmax(Q K' / sqrt(d) + bias) from the weights of a module and the tokens that went in."""
    bias = getattr(module, "q_bias", None)
    if bias is not None:
        bias = torch.cat([module.q_bias, torch.zeros_like(module.q_bias), module.v_bias])
    else:
        bias = module.qkv.bias
    b, n, _ = tokens.shape
    qkv = (tokens @ module.qkv.weight.T + (0 if bias is None else bias)).view(b, n, 3, 2, -1)
    q, k = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)  # (B, heads, N, d)
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    grid, scores = encoder.grid(SIZE), 0
    if getattr(encoder.vit, "rope", None) is not None:
        sin, cos = encoder.rotary(grid).chunk(2, dim=-1)
        angles = torch.complex(cos[:, ::2], sin[:, ::2])  # (N, d / 2)
        r = encoder.num_prefix
        q, k = (torch.cat([x[:, :, :r], turned(x[:, :, r:], angles)], dim=2) for x in (q, k))
    owner = getattr(encoder.vit, "rel_pos_bias", None) or module  # one for all blocks, or the block's own
    table = getattr(owner, "relative_position_bias_table", None)
    if table is not None:
        h, w = grid
        scores = torch.zeros(2, n, n)
        for i in range(h * w):
            for j in range(h * w):
                row, column = i // w - j // w + h - 1, i % w - j % w + w - 1
                scores[:, 1 + i, 1 + j] = table[row * (2 * w - 1) + column]
        scores[:, 0, :], scores[:, :, 0] = table[-3][:, None], table[-2][:, None]
        scores[:, 0, 0] = table[-1]
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + scores).softmax(dim=-1)


KINDS = ["vit", "registers and normed queries", "eva", "rope", "shared bias", "own bias", "absolute"]


@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_the_softmax_computed_by_hand(kind):
    encoder = encoder_of(kind)
    modules, seen = [block.attn for block in encoder.vit.blocks], []
    hooks = [m.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])) for m in modules]
    maps = attention_maps(encoder, torch.rand(2, 3, *SIZE), [0, -1])
    for hook in hooks:
        hook.remove()
    tokens = encoder.grid(SIZE)[0] * encoder.grid(SIZE)[1] + getattr(encoder, "num_prefix", 1)
    for found, module, inputs in zip(maps, modules, seen, strict=True):
        assert found.shape == (2, 2, tokens, tokens)
        assert (found - by_hand(encoder, module, inputs)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["vit", "rope", "shared bias"])
def test_looking_leaves_the_encoder_as_it_was_also_after_an_error(kind, monkeypatch):
    encoder, images = encoder_of(kind), torch.rand(1, 3, *SIZE)
    modules = [block.attn for block in encoder.vit.blocks]
    for fused, module in zip((True, False), modules, strict=True):  # restored to what it was, not switched on
        module.fused_attn = fused
    before = encoder(images)
    attention_maps(encoder, images, [0, 1])
    with pytest.raises(ZeroDivisionError):
        attention_maps(encoder, images, [0, 1], reduce=lambda weights: 1 / 0)
    assert [module.fused_attn for module in modules] == [True, False]
    assert not any(module.attn_drop._forward_pre_hooks for module in modules)
    assert all(torch.equal(a, b) for a, b in zip(encoder(images), before, strict=True))


def test_a_compiled_encoder_shows_the_same_maps():
    encoder, images = encoder_of("vit"), torch.rand(1, 3, *SIZE)
    plain = attention_maps(encoder, images, [1])
    blocks.compile_each(encoder, backend="eager")
    encoder(images)
    assert torch.equal(attention_maps(encoder, images, [1])[0], plain[0])


def test_maps_of_another_image_size_have_its_grid():
    found = attention_maps(encoder_of("eva"), torch.rand(1, 3, 40, 16), [-1], reduce=lambda weights: weights.mean(1))
    assert found[0].shape == (1, 11, 11)


@pytest.mark.parametrize(
    ("kind", "layer", "sentence"),
    [("swin", 0, "has no attention of all patches"), ("vit", 2, "block 3 does not exist: the encoder has 2")],
)
def test_what_has_no_such_map_is_one_sentence(kind, layer, sentence):
    with pytest.raises(ConfigError, match=sentence):
        attention_maps(encoder_of(kind, (16, 16)), torch.rand(1, 3, 16, 16), [layer])


def test_rollout_of_attention_that_stays_is_the_identity_and_of_uniform_attention_mixes():
    eye, uniform = torch.eye(4).expand(1, 4, 4), torch.full((1, 4, 4), 0.25)
    assert torch.equal(rollout([eye, eye]), eye)
    assert torch.allclose(rollout([uniform, uniform]), 0.25 * eye + 0.75 * uniform)
    first, second = (torch.rand(1, 4, 4).softmax(-1) for _ in "ab")
    expected = (second + torch.eye(4)) / 2 @ ((first + torch.eye(4)) / 2)
    assert torch.allclose(rollout([first, second]), expected, atol=1e-6)


def test_distance_is_that_of_the_patch_looked_at():
    weights = torch.zeros(1, 2, 7, 7)
    weights[:, :, :, 0] = 0.5  # the prefix token has no place
    weights[0, 0, range(1, 7), range(1, 7)] = 0.5  # every patch looks at itself
    weights[0, 1, range(1, 7), [2, 1, 2, 5, 4, 5]] = 0.5  # its neighbour in the row
    assert torch.allclose(mean_distance(weights, (2, 3), 16), torch.tensor([[0.0, 16.0]]), atol=1e-4)


def test_the_mass_that_is_kept_is_that_of_the_largest_weights():
    assert kept_mass(torch.tensor([0.1, 0.5, 0.1, 0.3]), 0.6).tolist() == [False, True, False, True]
    assert kept_mass(torch.full((4,), 3.0), 1.0).all()
