"""The encoder: timm's own bit for bit, and what is masked or dropped cannot leak."""

import pytest
import torch
from conftest import repainted, shaken
from timm.layers import resample_abs_pos_embed

from mim.encoders import vit
from mim.encoders.vit import Config, build
from mim.patches import gather, mask_to_ids, sincos_positions

SIZE = (32, 48)  # a grid of 4 x 6
N = 24
SMALL = {"width": 32, "depth": 3, "num_heads": 2, "patch_size": 8}
VARIANTS = {
    "plain": {},
    "registers": {"num_registers": 3},
    "layer scale": {"layer_scale": 0.1},
    "sincos": {"positions": "sincos"},
    "pre-norm": {"model": "vit_base_patch16_clip_224"},
    "normed queries and keys": {"qk_norm": True},
    "pixel statistics": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
}


def an_encoder(channels=3, **changes):
    torch.manual_seed(0)
    encoder = build(Config(**{"model": "vit_tiny_patch16_224"} | SMALL | changes), image_size=SIZE, channels=channels)
    return shaken(encoder)


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


# ---- timm's own ----------------------------------------------------------------------------------


@torch.no_grad()
def test_without_a_mask_the_output_is_timm_s_bit_for_bit(encoder, images):
    prefix, patches = encoder(images)
    theirs = encoder.vit.forward_features(encoder.normalize(images))
    assert torch.equal(torch.cat([prefix, patches], dim=1), theirs)


@torch.no_grad()
def test_prefix_and_patches_are_told_apart(images):
    for registers in (0, 3):
        features = an_encoder(num_registers=registers)(images)
        assert features.prefix.shape == (2, 1 + registers, 32)
        assert features.patches.shape == (2, N, 32)


@torch.no_grad()
def test_the_last_layer_with_the_norm_is_the_output(encoder, images):
    (last,) = encoder.layers(images, [-1], norm=True)
    output = encoder(images)
    assert torch.equal(last.patches, output.patches)
    assert torch.equal(last.prefix, output.prefix)


@torch.no_grad()
def test_layers_are_timm_s_block_outputs_in_the_asked_order(encoder, images):
    theirs = encoder.vit.forward_intermediates(
        encoder.normalize(images), output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
    )
    for found, i in zip(encoder.layers(images, [2, 0, -2]), [2, 0, 1], strict=True):
        assert torch.equal(found.patches, theirs[i][0])
        assert torch.equal(found.prefix, theirs[i][1])


@torch.no_grad()
def test_raw_layers_need_only_the_final_norm(encoder, images):
    (last,) = encoder.layers(images, [-1])
    assert torch.equal(encoder.final_norm(last.patches), encoder(images).patches)


def test_pixels_are_normalised_with_the_encoder_s_own_statistics(images):
    encoder = an_encoder(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    expected = (images - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    assert torch.equal(encoder.normalize(images), expected)


# ---- dropping ------------------------------------------------------------------------------------


@torch.no_grad()
def test_dropped_patches_cannot_be_seen(encoder, images, mask):
    ids_keep, _, _ = mask_to_ids(mask, 9)
    before, after = encoder(images, ids_keep=ids_keep), encoder(repainted(images, mask, 8), ids_keep=ids_keep)
    assert before.patches.shape == (2, N - 9, 32)
    assert torch.equal(before.patches, after.patches)
    assert torch.equal(before.prefix, after.prefix)


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
def test_keeping_all_patches_changes_nothing_and_their_order_is_kept(encoder, images):
    everything = torch.arange(N).expand(2, -1)
    whole = encoder(images)
    assert torch.allclose(encoder(images, ids_keep=everything).patches, whole.patches, atol=1e-6)
    reverse = encoder(images, ids_keep=everything.flip(1))
    assert torch.allclose(gather(reverse.patches, everything.flip(1)), whole.patches, atol=1e-5)


@torch.no_grad()
def test_kept_patches_keep_their_own_positions(images):
    """The same pixels everywhere: features differ only by position."""
    encoder = an_encoder(depth=1, positions="sincos")
    flat = torch.full_like(images, 0.3)
    ids_keep = torch.tensor([[0, 5, 11], [2, 5, 23]])
    (kept,) = encoder.layers(flat, [0], ids_keep=ids_keep)
    assert not torch.allclose(kept.patches[0, 0], kept.patches[1, 0], atol=1e-3)
    embedded = encoder._embed(flat, None, None, ids_keep)[:, 1:]
    offsets = embedded - embedded[:, :1]
    table = sincos_positions((4, 6), 32)
    assert torch.allclose(offsets, table[ids_keep] - table[ids_keep[:, :1]], atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_registers": 2, "positions": "sincos"}, {"model": "vit_base_patch16_clip_224", "num_heads": 4}],
    ids=["learned positions", "registers, fixed positions", "norms before the blocks"],
)
def test_patches_embedded_alone_are_those_of_timm_s_stem_and_so_are_their_gradients(options, images, mask):
    encoder = shaken(an_encoder(**options))
    ids_keep, _, _ = mask_to_ids(mask, 9)
    found = []
    for alone in (True, False):  # without, timm embeds all patches and some are dropped
        encoder.stem_is_linear = alone
        encoder.zero_grad()
        tokens = encoder._embed(images, None, None, ids_keep)
        tokens.pow(3).sum().backward()
        found.append([tokens.detach(), *(p.grad for p in encoder.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 3
    for ours, timm_s in zip(*found, strict=True):
        assert (ours - timm_s).norm() <= 1e-6 * timm_s.norm()


# ---- replacing -----------------------------------------------------------------------------------


@torch.no_grad()
def test_replaced_patches_cannot_be_seen(encoder, images, mask, token):
    before = encoder(images, mask=mask, mask_token=token)
    after = encoder(repainted(images, mask, 8), mask=mask, mask_token=token)
    assert before.patches.shape == (2, N, 32)
    assert torch.equal(before.patches, after.patches)
    assert torch.equal(before.prefix, after.prefix)


@torch.no_grad()
def test_visible_patches_and_the_mask_token_are_seen(images, mask, token):
    encoder = an_encoder()
    before = encoder(images, mask=mask, mask_token=token)
    repaint = repainted(images, ~mask, 8)
    assert (encoder(repaint, mask=mask, mask_token=token).patches != before.patches).all(dim=2).all()
    assert (encoder(images, mask=mask, mask_token=token + 1).patches != before.patches).any(dim=2).all()


@torch.no_grad()
def test_masked_patches_are_told_apart_by_their_positions(images, token):
    encoder = an_encoder()
    everything = torch.ones(2, N, dtype=torch.bool)
    patches = encoder(images, mask=everything, mask_token=token).patches
    assert torch.equal(patches[0], patches[1])
    assert torch.cdist(patches[0], patches[0]).add(torch.eye(N)).min() > 1e-3


@torch.no_grad()
def test_an_empty_mask_changes_nothing(encoder, images, token):
    nothing = torch.zeros(2, N, dtype=torch.bool)
    assert torch.equal(encoder(images, mask=nothing, mask_token=token).patches, encoder(images).patches)


@torch.no_grad()
def test_layers_mask_and_drop_like_the_output_does(encoder, images, mask, token):
    ids_keep, _, _ = mask_to_ids(mask, 9)
    for options in ({"mask": mask, "mask_token": token}, {"ids_keep": ids_keep}):
        (last,) = encoder.layers(images, [-1], norm=True, **options)
        assert torch.equal(last.patches, encoder(images, **options).patches)


# ---- images of other sizes -----------------------------------------------------------------------


@torch.no_grad()
def test_images_of_another_size_get_resampled_positions(images):
    encoder = an_encoder(num_registers=2)
    features = encoder(images[:, :, :16, :24])
    assert features.patches.shape == (2, 6, 32)
    assert encoder.grid((16, 24)) == (2, 3)
    smaller = build(Config("vit_tiny_patch16_224", num_registers=2, **SMALL), image_size=(16, 24), channels=3).eval()
    state = encoder.vit.state_dict()
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [2, 3], [4, 6], num_prefix_tokens=3)
    smaller.vit.load_state_dict(state)
    assert torch.equal(smaller(images[:, :, :16, :24]).patches, features.patches)


# ---- a convolutional stem ------------------------------------------------------------------------

HYBRID = {"model": "vit_tiny_r_s16_p8_224", "patch_size": None}  # a stem of stride 4, then patches of 8: 32 pixels
WIDE = (64, 96)  # a grid of 2 x 3


def a_hybrid(**changes):
    torch.manual_seed(0)
    options = {"width": 32, "depth": 2, "num_heads": 2} | HYBRID | changes
    return shaken(build(Config(**options), image_size=WIDE, channels=3))


@pytest.fixture
def wide():
    return torch.rand(2, 3, *WIDE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_hybrid_without_a_mask_is_timm_s_bit_for_bit(wide):
    encoder = a_hybrid(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    assert (encoder.patch_size, encoder.grid(WIDE)) == (32, (2, 3))
    theirs = encoder.vit.forward_features(encoder.normalize(wide))
    assert torch.equal(torch.cat(encoder(wide), dim=1), theirs)


@torch.no_grad()
def test_the_stem_of_a_hybrid_sees_beyond_a_patch(wide):
    """Otherwise the next tests would hold without blanks."""
    encoder = a_hybrid()
    one = torch.tensor([[True, False, False, False, False, False]] * 2)
    tokens = [encoder.vit.patch_embed(encoder.normalize(x))[:, 0, 1] for x in (wide, repainted(wide, one, 32))]
    assert not torch.equal(*tokens)


@torch.no_grad()
def test_the_masked_pixels_of_a_hybrid_cannot_be_seen(wide, token):
    encoder = a_hybrid(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    mask = torch.tensor([[True, False, False, True, True, False], [False, True, True, False, False, True]])
    ids_keep, _, _ = mask_to_ids(mask, 3)
    for options in ({"mask": mask, "mask_token": token}, {"ids_keep": ids_keep}):
        before, after = (encoder(x, **options) for x in (wide, repainted(wide, mask, 32)))
        assert torch.equal(before.patches, after.patches)
        assert torch.equal(before.prefix, after.prefix)
        seen = encoder(repainted(wide, ~mask, 32), **options)
        assert (seen.patches != before.patches).any(dim=2).all()
    assert encoder(wide, ids_keep=ids_keep).patches.shape == (2, 3, 32)


@torch.no_grad()
def test_the_blanks_of_a_hybrid_are_the_mean(wide, token):
    encoder = a_hybrid(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    mask = torch.tensor([[True, False, False, False, False, False]] * 2)
    gray = wide.clone()
    gray[:, :, :32, :32] = torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    found = encoder(wide, mask=mask, mask_token=token)
    other = encoder.vit.patch_embed(encoder.normalize(gray))  # (B, 2, 3, D)
    other[:, 0, 0] = token[0]
    x = encoder.vit._pos_embed(other)
    for block in encoder.vit.blocks:
        x = block(x)
    assert torch.allclose(torch.cat(found, dim=1), encoder.vit.norm(x), atol=1e-5)


# ---- more blocks ---------------------------------------------------------------------------------


@torch.no_grad()
def test_more_blocks_go_on_from_raw_features_as_a_deeper_encoder_would(images):
    encoder, deeper = an_encoder(), an_encoder(depth=5)
    more = encoder.more_blocks(2, 3).eval()
    more.blocks.load_state_dict(deeper.vit.blocks[3:].state_dict())
    (early, late) = deeper.layers(images, [2, -1])
    found = more(early, encoder.grid(SIZE))
    assert torch.equal(found.patches, late.patches)
    assert torch.equal(found.prefix, late.prefix)


def test_more_blocks_drop_paths_as_the_blocks_that_they_stand_beside():
    def rates(blocks):
        return [getattr(block.drop_path2, "drop_prob", 0.0) for block in blocks]

    encoder = an_encoder(drop_path_rate=0.2)
    assert rates(encoder.more_blocks(1, 1).blocks) == pytest.approx([0.1])
    assert rates(encoder.more_blocks(2, 3).blocks) == pytest.approx([0.15, 0.2])  # of a depth of 5


def test_more_blocks_are_trained_and_start_on_their_own():
    encoder = build(Config("vit_tiny_patch16_224", layer_scale=0.1, **SMALL), image_size=SIZE, channels=3)
    more = encoder.more_blocks(2, 1)
    assert all(p.requires_grad for p in more.parameters())
    assert not torch.equal(more.blocks[0].mlp.fc1.weight, encoder.vit.blocks[1].mlp.fc1.weight)
    assert {p.data_ptr() for p in more.parameters()}.isdisjoint(p.data_ptr() for p in encoder.parameters())
    assert (more.blocks[1].ls1.gamma == 0.1).all()


# ---- parts ---------------------------------------------------------------------------------------


def test_sincos_positions_are_fixed_and_the_class_token_has_none():
    encoder = an_encoder(positions="sincos", num_registers=2)
    table = encoder.vit.pos_embed
    prefix = table.shape[1] - N
    assert not table.requires_grad
    assert torch.equal(table[0, prefix:], sincos_positions((4, 6), 32))
    assert not table[0, :prefix].any()


def test_depths_cover_the_stem_each_block_and_the_norm():
    encoder = an_encoder(num_registers=2, layer_scale=0.1)
    depths = {name: encoder.depth_of(name) for name, _ in encoder.named_parameters()}
    assert set(depths.values()) == set(range(encoder.depth + 2))
    assert {depths[f"vit.{name}"] for name in ("cls_token", "reg_token", "pos_embed", "patch_embed.proj.bias")} == {0}
    assert all(depths[name] == int(name.split(".")[2]) + 1 for name in depths if name.startswith("vit.blocks."))
    last = {name for name, depth in depths.items() if depth == encoder.depth + 1}
    assert last == {"vit.norm.weight", "vit.norm.bias"}


def test_layer_scale_starts_where_the_recipe_says():
    encoder = build(Config("vit_tiny_patch16_224", layer_scale=0.1, **SMALL), image_size=SIZE, channels=3)
    gammas = [p for name, p in encoder.named_parameters() if name.endswith("gamma")]
    assert len(gammas) == 2 * encoder.depth
    assert all((gamma == 0.1).all() for gamma in gammas)


def test_weights_start_as_the_recipe_says():
    """Xavier uniform weights of a narrow network are wider than a normal of 0.02."""
    plain, jax = (
        build(Config("vit_tiny_patch16_224", weight_init=name, **SMALL), image_size=SIZE, channels=3)
        for name in ("", "jax")
    )
    assert plain.vit.blocks[0].mlp.fc1.weight.std() < 0.03
    assert jax.vit.blocks[0].mlp.fc1.weight.std() > 0.08


def test_drop_path_rises_linearly_to_its_rate():
    encoder = an_encoder(drop_path_rate=0.2)
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in encoder.vit.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


@torch.no_grad()
def test_drop_path_acts_in_training_only(images):
    encoder = an_encoder(drop_path_rate=0.5)
    assert torch.equal(encoder(images).patches, an_encoder()(images).patches)
    encoder.train()
    torch.manual_seed(0)
    draws = [encoder(images).patches for _ in range(4)]
    assert any(not torch.equal(draws[0], other) for other in draws[1:])


def test_images_of_any_number_of_channels_are_encoded():
    assert an_encoder(channels=1)(torch.rand(2, 1, *SIZE)).patches.shape == (2, N, 32)


def test_the_grid_has_rows_first():
    assert an_encoder().grid((32, 48)) == (4, 6)


def test_registers_are_the_model_s_own_unless_the_recipe_gives_a_number():
    model = "vit_base_patch14_reg4_dinov2"
    assert an_encoder(model=model).num_prefix == 1 + 4
    assert an_encoder(model=model, num_registers=0).num_prefix == 1
    assert an_encoder().num_prefix == 1


def test_a_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="image size 30x48 does not divide by the patch size 8"):
        an_encoder().grid((30, 48))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 50, "num_heads": 3}, "encoder.width=50 with encoder.num_heads=3: "),
        ({"positions": "cosine"}, "encoder.positions='cosine' is unknown; choose learn or sincos"),
        ({"weight_init": "xavier"}, "encoder.weight_init='xavier' is unknown; choose beit, mae, jax, moco or ''"),
        ({"model": "vit_tny"}, "encoder.model='vit_tny' is not a timm model; some that are: "),
        ({"model": "beit_base_patch16_224"}, "encoder.model='beit_base_patch16_224' is not timm's VisionTransformer"),
        ({"model": "resnet18"}, "encoder.model='resnet18' is not timm's VisionTransformer"),
        ({"model": "vit_little_patch16_reg4_gap_256"}, "norms after pooling; choose one that norms its tokens"),
        (
            {"model": "vit_base_patch16_siglip_224"},
            "ends in an attention pool, which pretraining would leave untrained",
        ),
        ({**HYBRID, "patch_size": 32}, "has the stride of its stem; leave encoder.patch_size out"),
        ({**HYBRID, "model": "vit_small_r26_s32_224"}, "image size 32x48 does not divide by the stride of the stem"),
        ({**HYBRID, "model": "vit_base_resnet26d_224"}, "has BatchNorm in its stem, so the loss would depend on how"),
        ({"patch_size": 5}, "image size 32x48 does not divide by the patch size 5"),
        ({"mean": [0.5], "std": [0.5]}, "encoder.mean has 1 values for images of 3 channels"),
        ({"std": [0.5, 0.0, 0.5]}, "encoder.std=[0.5, 0.0, 0.5] must be above 0: pixels are divided by it"),
        ({"depth": 0}, "encoder.depth=0 must be at least 1, or null: the model's own"),
        ({"num_heads": 0}, "encoder.num_heads=0 must be at least 1"),
        ({"patch_size": -4}, "encoder.patch_size=-4 must be at least 1"),
        ({"num_registers": -1}, "encoder.num_registers=-1 must be at least 0"),
        ({"drop_path_rate": 1.5}, "encoder.drop_path_rate=1.5 must be at least 0 and below 1"),
    ],
)
def test_what_makes_no_encoder_is_refused(changes, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        build(Config(**{"model": "vit_tiny_patch16_224"} | SMALL | changes), image_size=SIZE, channels=3)
    assert message in str(error.value)


def test_both_kinds_of_masking_at_once_are_a_mistake(images, mask, token):
    with pytest.raises(AssertionError, match="not both"):
        an_encoder()(images, mask=mask, mask_token=token, ids_keep=torch.zeros(2, 1, dtype=torch.int64))


def test_statistics_are_no_weights():
    assert not {"mean", "std"} & an_encoder().state_dict().keys()
    assert vit.ViT.can_drop
