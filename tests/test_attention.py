"""Attention in three steps is the fused one, and taken only where it is faster."""

import pytest
import torch
from torch import nn

from mim.attention import unfuse
from mim.encoders import beit, eva, vit
from mim.objectives import mae

CPU = torch.device("cpu")
SHAPE = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8}


def encoder(name, **options):
    module, model = {
        "vit": (vit, "vit_tiny_patch16_224"),
        "eva": (eva, "eva02_tiny_patch14_224"),
        "beit": (beit, "beit_base_patch16_224"),
    }[name]
    torch.manual_seed(0)
    built = module.build(module.Config(model, **SHAPE, **options), image_size=(32, 32), channels=3)
    for parameter in built.parameters():  # gammas, biases and tables start at zero
        nn.init.normal_(parameter, std=0.2)
    return built


@pytest.mark.parametrize("name", ["vit", "eva", "beit"])
def test_three_steps_give_the_features_and_gradients_of_the_fused_kernel(name):
    network, images = encoder(name), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for changed in (0, 2):
        assert unfuse(network, CPU, "bf16" if changed else "no") == changed
        network.zero_grad()
        features = network(images).patches
        features.square().mean().backward()
        gradients = {key: p.grad for key, p in network.named_parameters() if p.grad is not None}
        found.append((features.detach(), gradients))
    (fused, expected), (explicit, gradients) = found
    assert torch.allclose(explicit, fused, atol=1e-5)
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        assert (gradient - expected[key]).norm() <= 1e-5 * expected[key].norm() + 1e-7, key


def test_only_bf16_on_a_cpu_takes_three_steps_in_encoder_and_decoder():
    objective = mae.build(encoder("vit"), mae.Config(decoder_width=16, decoder_depth=1, decoder_num_heads=2))
    assert unfuse(objective, CPU, "no") == 0
    assert unfuse(objective, torch.device("cuda"), "bf16") == 0
    assert unfuse(objective, CPU, "bf16") == 3
    assert unfuse(objective, CPU, "bf16") == 0  # done


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "eva", "beit"])
def test_in_bf16_three_steps_are_as_close_to_float32_as_the_fused_kernel(name):
    network, images = encoder(name), torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = network(images).patches
    errors = []
    for precision in ("no", "bf16"):
        unfuse(network, CPU, precision)
        with torch.autocast("cpu", torch.bfloat16):
            errors.append((network(images).patches - exact).norm() / exact.norm())
    assert 0 < errors[1] < 1.5 * errors[0]
