"""The last block computes no more than is read of it, and that as it would otherwise."""

import pytest
import torch
from conftest import shaken
from torch.utils.flop_counter import FlopCounterMode

from mim.encoders import beit, eva, vit
from mim.patches import gather

SHAPE = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
N, READ = 16, 5
MODELS = {
    "vit": (vit, "vit_tiny_patch16_224", {"num_registers": 2, "layer_scale": 0.1, "drop_path_rate": 0.4}),
    "vit of other blocks": (vit, "vit_small_patch16_36x1_224", {"model": "vit_small_patch16_18x2_224"}),
    "beit": (beit, "beit_base_patch16_224", {"drop_path_rate": 0.4}),
    "beit without layer scale": (beit, "beit_base_patch16_224", {"layer_scale": 0.0}),
    "eva": (eva, "eva02_tiny_patch14_224", {"drop_path_rate": 0.4}),
    "dinov3": (eva, "vit_small_patch16_dinov3", {}),
}


def an_encoder(name):
    module, model, options = MODELS[name]
    torch.manual_seed(0)
    cfg = module.Config(**{"model": model} | SHAPE | options)
    return shaken(module.build(cfg, image_size=(32, 32), channels=3)).train()


@pytest.fixture
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ids():
    draws = [torch.randperm(N, generator=torch.Generator().manual_seed(i))[:READ] for i in range(3)]
    return torch.stack(draws).sort(dim=1).values


@pytest.mark.parametrize("name", MODELS)
def test_what_is_read_has_the_values_and_gradients_of_the_whole_block(name, images, ids):
    encoder, found = an_encoder(name), []
    for ids_read in (None, ids):
        encoder.zero_grad()
        torch.manual_seed(1)  # the draws of drop path
        prefix, patches = encoder(images, ids_read=ids_read)
        patches = gather(patches, ids) if ids_read is None else patches
        (patches.pow(3).sum() + prefix.pow(2).sum()).backward()
        found.append([prefix.detach(), patches.detach(), *(p.grad for p in encoder.parameters())])
    for whole, read in zip(*found, strict=True):
        if whole is not None:
            assert (read - whole).norm() <= 1e-6 * whole.norm()


@pytest.mark.parametrize("name", ["vit", "beit", "eva"])
def test_the_mlp_of_the_last_block_runs_on_what_is_read_alone(name, images, ids):
    encoder, seen = an_encoder(name), []
    for block in encoder.vit.blocks:
        block.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    encoder(images, ids_read=ids)
    assert seen == [encoder.vit.num_prefix_tokens + N, encoder.vit.num_prefix_tokens + READ]


def test_a_read_block_can_be_compiled_in_one_graph(images, ids):
    encoder = an_encoder("beit").eval()
    expected = encoder(images, ids_read=ids).patches
    torch._dynamo.reset()
    last = encoder.vit.blocks[-1]
    last.forward = torch.compile(last.forward, backend="eager", fullgraph=True)
    assert torch.equal(encoder(images, ids_read=ids).patches, expected)


def test_fewer_operations_are_counted(images, ids):
    encoder, counts = an_encoder("vit"), []
    for ids_read in (None, ids):
        with FlopCounterMode(display=False) as counter:
            encoder(images, ids_read=ids_read)
        counts.append(counter.get_total_flops())
    left_out = N - READ
    assert counts[0] - counts[1] == 3 * left_out * 2 * 2 * 32 * 4 * 32  # two products of the MLP
