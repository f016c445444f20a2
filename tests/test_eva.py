"""Rotary positions: timm's Eva bit for bit, and each kept patch is turned by its own place."""

import pytest
import torch
from conftest import repainted, shaken

from mim.encoders.eva import Config, build
from mim.patches import gather, mask_to_ids

SIZE = (32, 48)  # a grid of 4 x 6
N = 24
SMALL = {"width": 32, "depth": 3, "num_heads": 2, "patch_size": 8}
VARIANTS = {
    "eva02": {},
    "eva02 base": {"model": "eva02_base_patch14_224"},  # SwiGLU with a norm inside
    "eva": {"model": "eva_giant_patch14_224"},  # no rotary positions
    "registers": {"num_registers": 3},
    "layer scale and normed keys": {"layer_scale": 0.1, "qk_norm": True},
    "rotary vit": {"model": "vit_small_patch16_rope_224"},  # no table of positions beside
    "both positions": {"model": "vit_small_patch16_rope_ape_224"},
    "learned frequencies": {"model": "vit_small_patch16_rope_mixed_224"},  # of each block
    "no class token": {"model": "vit_mediumd_patch16_rope_reg1_gap_256"},
    "no norm of its own": {"model": "vit_pe_spatial_tiny_patch16_512"},
    "dinov3": {"model": "vit_small_patch16_dinov3"},
    "pixel statistics": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
}


def an_encoder(size=SIZE, channels=3, **changes):
    torch.manual_seed(0)
    cfg = Config(**{"model": "eva02_tiny_patch14_224"} | SMALL | changes)
    return shaken(build(cfg, image_size=size, channels=channels))


@pytest.fixture(params=VARIANTS)
def encoder(request):
    return an_encoder(**VARIANTS[request.param])


@pytest.fixture
def images():
    return torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask():
    return torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(i)) < 9 for i in range(2)])


@pytest.fixture
def token():
    return torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_without_a_mask_the_output_is_timm_s_bit_for_bit(encoder, images):
    theirs = encoder.vit.forward_features(encoder.normalize(images))
    assert torch.equal(torch.cat(encoder(images), dim=1), theirs)


@torch.no_grad()
def test_layers_are_timm_s_block_outputs_in_the_asked_order(encoder, images):
    theirs = encoder.vit.forward_intermediates(
        encoder.normalize(images), output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
    )
    for found, i in zip(encoder.layers(images, [2, 0, -2]), [2, 0, 1], strict=True):
        assert torch.equal(found.patches, theirs[i][0])
        assert torch.equal(found.prefix, theirs[i][1])


@torch.no_grad()
def test_masked_patches_cannot_be_seen(encoder, images, mask, token):
    ids_keep, _, _ = mask_to_ids(mask, 9)
    for options in ({"mask": mask, "mask_token": token}, {"ids_keep": ids_keep}):
        before, after = (encoder(x, **options) for x in (images, repainted(images, mask, 8)))
        assert torch.equal(before.patches, after.patches)
        assert torch.equal(before.prefix, after.prefix)
        seen = encoder(repainted(images, ~mask, 8), **options)
        assert (seen.patches != before.patches).any(dim=2).all()


@torch.no_grad()
def test_every_kept_patch_is_seen(images, mask):
    encoder = an_encoder()
    ids_keep, _, _ = mask_to_ids(mask, 9)
    before = encoder(images, ids_keep=ids_keep).prefix
    for place in range(N - 9):
        one = torch.zeros_like(mask).scatter_(1, ids_keep[:, place : place + 1], True)
        changed = (before != encoder(repainted(images, one, 8), ids_keep=ids_keep).prefix).flatten(1).any(dim=1)
        assert changed.all()


@torch.no_grad()
def test_keeping_all_patches_changes_nothing_and_their_order_does_not_matter(encoder, images):
    everything = torch.arange(N).expand(2, -1)
    whole = encoder(images).patches
    assert torch.allclose(encoder(images, ids_keep=everything).patches, whole, atol=1e-5)
    shuffled = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    found = encoder(images, ids_keep=shuffled).patches
    assert torch.allclose(found, gather(whole, shuffled), atol=1e-4)


@torch.no_grad()
def test_what_is_kept_is_turned_as_timm_turns_the_whole_grid(encoder, images):
    """Attention to dropped patches forbidden, timm's own forward gives the same to those that are kept."""
    row = torch.tensor([0, 3, 8, 9, 17, 23])
    kept = encoder(images, ids_keep=row.expand(2, -1))
    visible = torch.cat([torch.arange(encoder.num_prefix), encoder.num_prefix + row])
    allowed = torch.zeros(encoder.num_prefix + N, dtype=torch.bool).index_fill_(0, visible, True)
    theirs = encoder.vit.forward_features(encoder.normalize(images), attn_mask=allowed.expand(len(allowed), -1))
    assert torch.allclose(torch.cat(kept, dim=1), theirs[:, visible], atol=1e-4)


@torch.no_grad()
def test_only_the_difference_of_two_places_counts_for_attention(images):
    """Kept patches moved together by one row and column give the same features: there is no other sense of place."""
    encoder = an_encoder(model="vit_mediumd_patch16_rope_reg1_gap_256", num_registers=0)  # no token is without a place
    assert encoder(images).prefix.shape == (2, 0, 32)
    ids = torch.tensor([0, 2, 7, 9])
    flat = torch.zeros_like(images)
    flat[:, :, :8, :8] = 0.7  # patch 0
    moved = torch.zeros_like(images)
    moved[:, :, 8:16, 8:16] = 0.7  # patch 7
    here, there = (encoder(x, ids_keep=k.expand(2, -1)) for x, k in ((flat, ids), (moved, ids + 7)))
    assert torch.allclose(here.patches, there.patches, atol=1e-4)
    elsewhere = encoder(moved, ids_keep=torch.tensor([7, 10, 13, 16]).expand(2, -1))
    assert not torch.allclose(here.patches, elsewhere.patches, atol=1e-2)


@torch.no_grad()
def test_masked_patches_are_told_apart_by_their_places(encoder, images, mask, token):
    masked = encoder(images, mask=mask, mask_token=token).patches[0, mask[0]]
    assert torch.cdist(masked, masked).add(torch.eye(9)).min() > 1e-3


@torch.no_grad()
def test_images_of_another_size_are_those_of_an_encoder_built_for_it(images):
    encoder = an_encoder(model="vit_small_patch16_rope_224", num_registers=2)
    smaller = an_encoder((16, 24), model="vit_small_patch16_rope_224", num_registers=2)
    smaller.vit.load_state_dict(encoder.vit.state_dict())
    crop = images[:, :, :16, :24]
    assert torch.equal(encoder(crop).patches, smaller(crop).patches)
    ids_keep = torch.tensor([[0, 4], [1, 5]])
    assert torch.equal(encoder(crop, ids_keep=ids_keep).patches, smaller(crop, ids_keep=ids_keep).patches)


@torch.no_grad()
def test_more_blocks_go_on_as_a_deeper_encoder_would_with_its_rotary_table(images):
    for variant in ("eva02", "eva", "registers", "rotary vit", "dinov3"):
        encoder, deeper = an_encoder(**VARIANTS[variant]), an_encoder(**VARIANTS[variant] | {"depth": 5})
        more = encoder.more_blocks(2, 3).eval()
        more.blocks.load_state_dict(deeper.vit.blocks[3:].state_dict())
        early, late = deeper.layers(images, [2, -1])
        found = more(early, encoder.grid(SIZE))
        assert torch.equal(found.patches, late.patches)
        assert torch.equal(found.prefix, late.prefix)
        assert not [name for name, _ in more.named_buffers() if "rope" in name]


@torch.no_grad()
def test_more_blocks_take_the_learned_frequencies_of_the_blocks_beside_them(images):
    encoder = an_encoder(**VARIANTS["learned frequencies"])
    more = encoder.more_blocks(2, 1).eval()
    more.blocks.load_state_dict(encoder.vit.blocks[1:].state_dict())
    early, late = encoder.layers(images, [0, 2])
    assert torch.equal(more(early, encoder.grid(SIZE)).patches, late.patches)
    with pytest.raises(ValueError, match="2 more on top of block 2 need those of 4 blocks, not 3"):
        encoder.more_blocks(2, 2)


def test_more_blocks_drop_paths_and_start_as_the_blocks_that_they_stand_beside():
    cfg = Config("eva02_tiny_patch14_224", drop_path_rate=0.2, layer_scale=0.1, weight_init="beit", **SMALL)
    more = build(cfg, image_size=SIZE, channels=3).more_blocks(2, 3)
    assert [block.drop_path2.drop_prob for block in more.blocks] == pytest.approx([0.15, 0.2])  # of a depth of 5
    spread = [block.mlp.fc2.weight.std().item() for block in more.blocks]
    assert spread == pytest.approx([0.0108 / 8**0.5, 0.0108 / 10**0.5], rel=0.05)
    assert (more.blocks[1].gamma_2 == 0.1).all()


def test_depths_cover_the_stem_each_block_and_the_norm(encoder):
    depths = {name: encoder.depth_of(name) for name, _ in encoder.named_parameters()}
    assert set(depths.values()) == set(range(encoder.depth + 2))
    assert all(depths[name] == int(name.split(".")[2]) + 1 for name in depths if name.startswith("vit.blocks."))
    assert {name for name, depth in depths.items() if depth == encoder.depth + 1} <= {
        "vit.norm.weight",
        "vit.norm.bias",
    }


def test_tokens_and_learned_frequencies_are_not_decayed():
    encoder = an_encoder(model="vit_small_patch16_rope_mixed_ape_224", num_registers=2)
    assert {"vit.cls_token", "vit.reg_token", "vit.pos_embed", "vit.rope.freqs"} <= encoder.no_weight_decay()
    assert encoder.no_weight_decay() <= {name for name, _ in encoder.named_parameters()}


def test_layer_scale_is_the_recipe_s():
    def gammas(**changes):
        cfg = Config(**{"model": "vit_small_patch16_dinov3"} | SMALL | changes)
        encoder = build(cfg, image_size=SIZE, channels=3)
        return torch.cat([p for name, p in encoder.named_parameters() if "gamma" in name] or [torch.zeros(0)]).tolist()

    assert gammas(layer_scale=0.25) == [0.25] * 2 * 3 * 32
    assert gammas(model="eva02_tiny_patch14_224") == []
    assert gammas() == pytest.approx([1e-5] * 2 * 3 * 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "vit_tiny_patch16_224"}, "encoder.model='vit_tiny_patch16_224' is not timm's Eva"),
        ({"model": "resnet18"}, "encoder.model='resnet18' is not timm's Eva"),
        ({"model": "eva03"}, "encoder.model='eva03' is not a timm model; some that are: "),
        ({"model": "vit_pe_core_tiny_patch16_384"}, "ends in an attention pool"),
        ({"weight_init": "jax"}, "encoder.weight_init='jax' is unknown; choose beit, mae or '' (timm's default)"),
        ({"layer_scale": 0.0}, "encoder.layer_scale=0 would silence all blocks; leave it out"),
        ({"patch_size": 5}, "image size 32x48 does not divide by the patch size 5"),
        ({"std": [0.5]}, "encoder.std has 1 values for images of 3 channels"),
    ],
)
def test_what_makes_no_encoder_is_refused(changes, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        an_encoder(**changes)
    assert message in str(error.value)
