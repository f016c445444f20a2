"""Any image that the patch divides: rows unlike columns, patches of 2 to 32 pixels, 1 to 13 channels."""

import importlib

import pytest
import torch

from mim.patches import mask_to_ids

MODELS = {"vit": "vit_tiny_patch16_224", "eva": "eva02_tiny_patch14_224", "beit": "beit_base_patch16_224"}
GEOMETRIES = [
    (2, (6, 8), 1),
    (4, (20, 12), 2),
    (7, (14, 35), 3),
    (8, (24, 40), 13),
    (14, (42, 28), 5),
    (16, (32, 48), 4),
    (32, (64, 96), 3),
]  # patch size, image size, channels


@pytest.fixture(params=MODELS)
def build(request):
    """`build(patch_size, image_size, channels)`: a fresh encoder."""
    module = importlib.import_module(f"mim.encoders.{request.param}")

    def encoder(patch_size, image_size, channels):
        torch.manual_seed(0)
        cfg = module.Config(
            MODELS[request.param], width=32, depth=2, num_heads=2, patch_size=patch_size, layer_scale=0.5
        )
        return module.build(cfg, image_size=image_size, channels=channels)

    return encoder


@pytest.mark.parametrize(("patch_size", "image_size", "channels"), GEOMETRIES)
def test_an_encoder_of_any_geometry_encodes_masks_drops_and_learns(build, patch_size, image_size, channels):
    encoder = build(patch_size, image_size, channels)
    h, w = encoder.grid(image_size)
    assert (h * patch_size, w * patch_size) == image_size
    assert encoder.channels == channels
    images = torch.rand(2, channels, *image_size, generator=torch.Generator().manual_seed(1))
    mask = torch.stack([torch.randperm(h * w, generator=torch.Generator().manual_seed(i)) < 2 for i in range(2)])
    token = torch.randn(1, 1, 32).requires_grad_()
    whole, replaced = encoder(images), encoder(images, mask=mask, mask_token=token)
    assert whole.patches.shape == replaced.patches.shape == (2, h * w, 32)
    assert not torch.equal(whole.patches, replaced.patches)
    outputs = [whole, replaced]
    if encoder.can_drop:
        ids_keep, _, _ = mask_to_ids(mask, 2)
        outputs.append(encoder(images, ids_keep=ids_keep))
        assert outputs[-1].patches.shape == (2, h * w - 2, 32)
    sum(x.square().sum() for features in outputs for x in features).backward()
    for name, parameter in (*encoder.named_parameters(), ("token", token)):
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert token.grad.any()


@torch.no_grad()
def test_rows_and_columns_are_not_confused(build):
    """A patch in row 1, column 2 of 3 x 5 is token 7: the one that changes before the first block sees others."""
    encoder = build(4, (12, 20), 2).eval()
    images = torch.rand(1, 2, 12, 20)
    other = images.clone()
    other[:, :, 4:8, 8:12] += 0.5
    tokens = [encoder.vit.patch_embed(encoder.normalize(x)).reshape(15, 32) for x in (images, other)]
    assert (tokens[0] != tokens[1]).any(dim=1).nonzero().flatten().tolist() == [7]
    mask = torch.arange(15).eq(7).unsqueeze(0)
    hidden = [encoder(x, mask=mask, mask_token=torch.ones(1, 1, 32)).patches for x in (images, other)]
    assert torch.equal(*hidden)
