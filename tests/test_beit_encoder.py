"""BEiT's transformer: timm's bit for bit; replaced before positions; nothing can be dropped."""

import copy

import pytest
import torch
from conftest import repainted, shaken
from torch import nn

from mim.encoders.beit import Config, build

SIZE = (32, 48)  # a grid of 4 x 6
N = 24
SMALL = {"width": 32, "depth": 3, "num_heads": 2, "patch_size": 8}
VARIANTS = {
    "absolute": {"positions": "absolute"},
    "relative": {"positions": "relative"},
    "shared": {"positions": "shared_relative"},
    "no layer scale": {"layer_scale": 0.0},
    "pixel statistics": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
}


def fresh(size=SIZE, channels=3, **changes):
    torch.manual_seed(0)
    return build(Config(**SMALL | changes), image_size=size, channels=channels)


def an_encoder(**changes):
    return shaken(fresh(**changes))


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
def test_replaced_patches_cannot_be_seen_and_visible_ones_can(encoder, images, mask, token):
    before, after, seen = (
        encoder(x, mask=mask, mask_token=token)
        for x in (images, repainted(images, mask, 8), repainted(images, ~mask, 8))
    )
    assert torch.equal(before.patches, after.patches)
    assert torch.equal(before.prefix, after.prefix)
    assert (seen.patches != before.patches).any(dim=2).all()


@torch.no_grad()
def test_masked_patches_keep_their_positions(encoder, images, mask, token):
    """The token replaces the embedding before absolute positions are added; relative ones act in every block."""
    masked = encoder(images, mask=mask, mask_token=token).patches[0, mask[0]]
    assert torch.cdist(masked, masked).add(torch.eye(9)).min() > 1e-3


@torch.no_grad()
def test_the_bias_depends_on_the_difference_of_two_places_alone():
    encoder = an_encoder()
    bias = encoder.position_bias()  # (heads, 1 + N, 1 + N)
    assert bias.shape == (2, 1 + N, 1 + N)
    grid = bias[:, 1:, 1:].view(2, 4, 6, 4, 6)
    assert torch.equal(grid[:, :3, :5, :3, :5], grid[:, 1:, 1:, 1:, 1:])
    assert len(grid[0].unique()) == 7 * 11


def test_patches_cannot_be_dropped(images):
    encoder = an_encoder()
    assert not encoder.can_drop
    with pytest.raises(ValueError, match=r"encoder\.name=beit cannot drop patches: its position bias covers"):
        encoder(images, ids_keep=torch.zeros(2, 4, dtype=torch.int64))


def test_images_of_another_size_are_refused(images):
    with pytest.raises(ValueError, match=r"images of 16x48, but the positions of encoder\.name=beit are for 32x48"):
        an_encoder()(images[:, :, :16])


def test_keys_have_no_bias():
    encoder = an_encoder()
    assert not [name for name, _ in encoder.named_parameters() if "k_bias" in name or "qkv.bias" in name]
    assert not encoder.vit.blocks[0].attn.k_bias.any()
    assert encoder.vit.blocks[0].attn.v_bias.any()


def test_the_tables_are_where_the_recipe_says_and_start_at_zero():
    tables = {
        name: {n for n, _ in fresh(positions=name).named_parameters() if "position_bias" in n or "pos_embed" in n}
        for name in ("absolute", "relative", "shared_relative")
    }
    assert tables["absolute"] == {"vit.pos_embed"}
    assert tables["shared_relative"] == {"vit.rel_pos_bias.relative_position_bias_table"}
    assert tables["relative"] == {f"vit.blocks.{i}.attn.relative_position_bias_table" for i in range(3)}
    assert not fresh().vit.rel_pos_bias.relative_position_bias_table.any()


def test_only_tokens_and_absolute_positions_are_not_decayed():
    assert an_encoder(positions="absolute").no_weight_decay() == {"vit.cls_token", "vit.pos_embed"}
    assert "vit.rel_pos_bias.relative_position_bias_table" not in an_encoder().no_weight_decay()


def test_depths_cover_the_stem_each_block_and_the_norm(encoder):
    depths = {name: encoder.depth_of(name) for name, _ in encoder.named_parameters()}
    assert set(depths.values()) == set(range(encoder.depth + 2))
    assert all(depths[name] == int(name.split(".")[2]) + 1 for name in depths if name.startswith("vit.blocks."))
    last = {name for name, depth in depths.items() if depth == encoder.depth + 1}
    shared = {name for name in depths if name == "vit.rel_pos_bias.relative_position_bias_table"}  # as published
    assert last == {"vit.norm.weight", "vit.norm.bias"} | shared


@torch.no_grad()
def test_more_blocks_go_on_as_a_deeper_encoder_would_with_its_bias(encoder, images):
    deeper = shaken(encoder.create(depth=5))
    state = {n: v for n, v in deeper.state_dict().items() if not n.startswith(("blocks.3.", "blocks.4."))}
    encoder.vit.load_state_dict(state)
    more = encoder.more_blocks(2, 3).eval()
    more.blocks.load_state_dict(deeper.blocks[3:].state_dict())
    (early,) = encoder.layers(images, [2])
    late = deeper.forward_intermediates(
        encoder.normalize(images), [4], output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
    )
    found = more(early, encoder.grid(SIZE))
    assert torch.equal(found.patches, late[0][0])
    assert torch.equal(found.prefix, late[0][1])


def test_more_blocks_share_the_encoder_s_bias_without_owning_it(images):
    encoder = an_encoder()
    more = encoder.more_blocks(1, 2)
    assert not [name for name, _ in more.named_parameters() if "position_bias" in name]
    table = encoder.vit.rel_pos_bias.relative_position_bias_table
    (raw,) = encoder.layers(images, [1])
    more(raw._replace(prefix=raw.prefix.detach(), patches=raw.patches.detach()), (4, 6)).patches.sum().backward()
    assert table.grad.any()


@torch.no_grad()
def test_a_copy_of_encoder_and_head_shares_the_copy_s_bias(images):
    """Moving teachers are copies of the whole objective."""
    both = nn.ModuleDict({"encoder": (encoder := an_encoder())})
    both["more"] = encoder.more_blocks(1, 2).eval()
    other = copy.deepcopy(both)
    (raw,) = encoder.layers(images, [1])
    before = both["more"](raw, (4, 6)).patches
    nn.init.normal_(other["encoder"].vit.rel_pos_bias.relative_position_bias_table)
    assert torch.equal(both["more"](raw, (4, 6)).patches, before)
    assert not torch.equal(other["more"](raw, (4, 6)).patches, before)


def test_more_blocks_drop_paths_and_start_as_the_blocks_that_they_stand_beside():
    more = fresh(drop_path_rate=0.2, layer_scale=0.1).more_blocks(2, 3)
    assert [block.drop_path2.drop_prob for block in more.blocks] == pytest.approx([0.15, 0.2])  # of a depth of 5
    spread = [block.mlp.fc2.weight.std().item() for block in more.blocks]
    assert spread == pytest.approx([0.0108 / 8**0.5, 0.0108 / 10**0.5], rel=0.05)
    assert (more.blocks[1].gamma_2 == 0.1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "rotary"}, "encoder.positions='rotary' is unknown; choose absolute, relative, shared_relative"),
        ({"model": "vit_tiny_patch16_224"}, "encoder.model='vit_tiny_patch16_224' is not timm's Beit"),
        ({"weight_init": "jax"}, "encoder.weight_init='jax' is unknown; choose beit, mae or '' (timm's default)"),
        ({"patch_size": 5}, "image size 32x48 does not divide by the patch size 5"),
        ({"mean": [0.5]}, "encoder.mean has 1 values for images of 3 channels"),
    ],
)
def test_what_makes_no_encoder_is_refused(changes, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        fresh(**changes)
    assert message in str(error.value)
