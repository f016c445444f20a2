"""The encoder of any timm backbone: timm's own features, nothing masked leaks, and the families' facts are right."""

import copy
import functools
from types import SimpleNamespace

import pytest
import timm
import torch

from mim.contracts import LoadedRun
from mim.data import augment
from mim.encoders.dense import Config, build
from mim.exports import timm as target
from mim.objectives import mae, simmim
from mim.patches import patchify, unpatchify

SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
PLAIN = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
SMALL = {  # family: model, options that make it small, image size
    "swin": ("swin_tiny_patch4_window7_224", SWIN, (32, 48)),
    "swinv2": ("swinv2_tiny_window8_256", SWIN, (32, 48)),
    "xcit": ("xcit_nano_12_p8_224", {"embed_dim": 32, "depth": 2, "num_heads": 2, "cls_attn_layers": 1}, (32, 48)),
    "cait": ("cait_xxs24_224", PLAIN | {"depth_token_only": 1}, (32, 48)),
    "crossvit": (
        "crossvit_tiny_240",
        {
            "embed_dim": [16, 32],
            "depth": [[1, 2, 0], [1, 2, 0]],
            "num_heads": [2, 2],
            "mlp_ratio": [2, 2, 1],
            "img_scale": [1.0, 2 / 3],
        },
        (48, 72),
    ),
    "mobilevit": ("mobilevit_xxs", {"width_factor": 0.5}, (64, 96)),
    "mobilevitv2": ("mobilevitv2_050", {"width_factor": 0.5}, (64, 128)),
    "mixer": ("mixer_s16_224", {"mlp_ratio": [0.1, 0.1]}, (32, 48)),
    "convnext": ("convnext_atto", {"depths": [1, 2, 1, 1], "dims": [8, 16, 16, 32]}, (64, 96)),
    "deit3": ("deit3_small_patch16_224", PLAIN, (32, 48)),
    "eva02": ("eva02_tiny_patch14_224", PLAIN | {"use_fc_norm": False, "use_post_transformer_norm": True}, (32, 48)),
    "hiera": ("hiera_tiny_224", {"embed_dim": 16, "stages": [1, 1, 1], "q_pool": 2}, (64, 96)),
    "coatnet": (
        "coatnet_pico_rw_224",
        {"embed_dim": [32, 32, 32, 32], "depths": [1, 1, 1, 1], "stem_width": [8, 16]},
        (64, 96),
    ),  # its norm is over maps
    "mambaout": ("mambaout_femto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 32]}, (64, 96)),  # NHWC, not said
    "hybrid": ("vit_tiny_r_s16_p8_224", {"embed_dim": 32, "depth": 2, "num_heads": 2}, (64, 96)),
}
STRIDES = {
    "crossvit": 12, "mobilevit": 32, "mobilevitv2": 32, "mixer": 16, "convnext": 32, "hiera": 16, "coatnet": 32,
    "mambaout": 32, "hybrid": 32,
}  # fmt: skip
NORMS_ITS_MAPS = set(SMALL) - {"hiera"}  # timm refuses norm=True there: it norms after pooling


def small(family, channels=3, **changes):
    """An encoder of a family, built once."""
    return copy.deepcopy(_small(family, channels, **changes))


@functools.cache
def _small(family, channels, **changes):
    model, options, size = SMALL[family]
    torch.manual_seed(0)
    encoder = build(Config(model, options=options, **changes), image_size=size, channels=channels)
    with torch.no_grad():
        for parameter in encoder.parameters():  # tokens and gammas start at zero or equal: make each count
            parameter += 0.1 * torch.randn_like(parameter)
    return encoder.eval()


def images_for(family, channels=3):
    return torch.rand(2, channels, *SMALL[family][2], generator=torch.Generator().manual_seed(1))


def mask_for(encoder, family):
    h, w = encoder.grid(SMALL[family][2])
    draws = [torch.randperm(h * w, generator=torch.Generator().manual_seed(i)) < h * w // 2 for i in range(2)]
    return torch.stack(draws)


def repainted(images, encoder, which):
    """The same images with other pixels in the patches where `which` (B, N) is True."""
    patches = patchify(images, encoder.patch_size)
    painted = torch.where(which[..., None], 1 - patches, patches)
    return unpatchify(painted, encoder.grid(images.shape[-2:]), images.shape[1])


@pytest.fixture(params=SMALL)
def family(request):
    return request.param


@pytest.fixture
def token():
    """`token(encoder)`: a mask token of its width."""
    return lambda encoder: torch.randn(1, 1, encoder.width, generator=torch.Generator().manual_seed(2))


# ---- timm's own ----------------------------------------------------------------------------------


@torch.no_grad()
def test_without_a_mask_the_patches_are_timm_s_last_map_as_the_model_norms_it(family):
    encoder, images = small(family), images_for(family)
    index = encoder.facts.maps[encoder.depth - 1]
    (theirs,) = encoder.model.forward_intermediates(
        encoder.normalize(images), indices=[index], norm=family in NORMS_ITS_MAPS, intermediates_only=True
    )
    patches = encoder(images).patches
    h, w = encoder.grid(images.shape[-2:])
    assert encoder.patch_size == STRIDES.get(family, 8)
    assert theirs.shape == (2, encoder.width, h, w)
    assert torch.allclose(patches, theirs.flatten(2).transpose(1, 2), atol=1e-6)


@torch.no_grad()
def test_prefix_tokens_come_where_the_model_has_them_from_the_start(family):
    encoder = small(family)
    prefix = encoder(images_for(family)).prefix
    assert prefix.shape == (2, 1 if family in ("deit3", "eva02", "hybrid") else 0, encoder.width)


@torch.no_grad()
def test_crossvit_shows_its_branch_of_fine_patches():
    encoder, images = small("crossvit"), images_for("crossvit")
    fine, _ = encoder.model.forward_features(encoder.normalize(images))
    assert torch.equal(encoder(images).patches, fine[:, 1:])


# ---- replacing -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_masked_pixels_change_no_feature_at_all(family, token, training):
    encoder, images = small(family), images_for(family)
    encoder.train(training)  # batch norms then share statistics between images
    mask = mask_for(encoder, family)
    before, after = (
        encoder(given, mask=mask, mask_token=token(encoder)) for given in (images, repainted(images, encoder, mask))
    )
    assert torch.equal(before.patches, after.patches)
    assert torch.equal(before.prefix, after.prefix)


@torch.no_grad()
def test_visible_pixels_and_the_mask_token_are_seen(family, token):
    encoder, images = small(family), images_for(family)
    mask, mask_token = mask_for(encoder, family), token(encoder)
    before = encoder(images, mask=mask, mask_token=mask_token).patches
    assert (encoder(repainted(images, encoder, ~mask), mask=mask, mask_token=mask_token).patches != before).any()
    changed = encoder(images, mask=mask, mask_token=-mask_token).patches != before
    assert changed.any(dim=2).all()


@torch.no_grad()
def test_tokens_of_the_stem_are_replaced_under_masked_patches_and_nowhere_else(family, token):
    encoder, images = small(family), images_for(family)
    mask, mask_token = mask_for(encoder, family), token(encoder)
    (stem,) = encoder.facts.stems
    h, w = encoder.grid(images.shape[-2:])
    found = []
    encoder.model.get_submodule(stem.module).register_forward_hook(lambda m, i, output: found.append(output))
    pixels = patchify(images, encoder.patch_size)
    blanked = torch.where(mask[..., None], encoder.mean.view(3).repeat(encoder.patch_size**2), pixels)
    encoder(unpatchify(blanked, (h, w), 3))
    encoder(images, mask=mask, mask_token=mask_token)
    plain, replaced = (as_map(output, stem.layout, (h * stem.factor, w * stem.factor)) for output in found)
    expected = mask.view(2, h, w).repeat_interleave(stem.factor, 1).repeat_interleave(stem.factor, 2)
    assert plain.shape == (2, h * stem.factor, w * stem.factor, stem.width)
    assert torch.equal(replaced, torch.where(expected[..., None], mask_token[0, 0, : stem.width], plain))


def as_map(output, layout, grid):
    output = output[0] if isinstance(output, tuple) else output
    return {"NLC": lambda: output.unflatten(1, grid), "NHWC": lambda: output, "NCHW": lambda: output.movedim(1, -1)}[
        layout
    ]()


@pytest.mark.parametrize(
    ("columns", "model", "layout"), [(16, "swin", "NHWC"), (8, "mambaout", "NHWC"), (8, "convnext", "NCHW")]
)
def test_rows_and_channels_of_a_stem_are_told_apart_where_they_are_equally_many(columns, model, layout):
    name, options, _ = SMALL[model]
    encoder = build(Config(name, options=options), image_size=(4 * columns, 4 * columns), channels=3)
    assert encoder.facts.stems[0].width == columns
    assert encoder.facts.stems[0].layout == layout


@torch.no_grad()
def test_an_empty_mask_changes_nothing(family, token):
    encoder, images = small(family), images_for(family)
    nothing = torch.zeros_like(mask_for(encoder, family))
    masked = encoder(images, mask=nothing, mask_token=token(encoder))
    assert torch.equal(masked.patches, encoder(images).patches)


@torch.no_grad()
def test_a_mask_is_forgotten_with_its_forward_even_if_that_failed(token):
    encoder, images = small("swin"), images_for("swin")
    plain, mask = encoder(images).patches, mask_for(encoder, "swin")
    with pytest.raises(RuntimeError):
        encoder(images, mask=mask, mask_token=token(encoder)[..., :5])
    assert torch.equal(encoder(images).patches, plain)


@torch.no_grad()
def test_a_copy_of_the_encoder_replaces_its_own_tokens(token):
    """Moving teachers are copies."""
    encoder, images = small("swin"), images_for("swin")
    options = {"mask": mask_for(encoder, "swin"), "mask_token": token(encoder)}
    expected = encoder(images, **options).patches
    copied = copy.deepcopy(encoder)
    for parameter in encoder.parameters():
        parameter.zero_()
    assert torch.equal(copied(images, **options).patches, expected)
    assert not torch.equal(copied(images, mask=options["mask"], mask_token=-options["mask_token"]).patches, expected)


# ---- training ------------------------------------------------------------------------------------


def a_batch(encoder, family, channels=3):
    mask = mask_for(encoder, family)
    return {"images": images_for(family, channels), "mask": mask, "num_masked": int(mask[0].sum())}


def test_simmim_learns_a_batch(family):
    size = SMALL[family][2]
    objective = simmim.build(small(family).train(), simmim.Config())
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-2)
    batch = a_batch(objective.encoder, family)
    rows, columns = torch.meshgrid(*(torch.linspace(0, 1, n) for n in size), indexing="ij")
    batch["images"] = torch.stack([rows, columns]).unsqueeze(1).expand(-1, 3, -1, -1).contiguous()  # (B, C, H, W)
    losses = []
    for _ in range(10):
        loss = objective(batch, torch.tensor(0.5))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_every_trained_parameter_gets_a_gradient_and_the_others_are_frozen(family):
    objective = simmim.build(small(family).train(), simmim.Config())
    objective(a_batch(objective.encoder, family), torch.tensor(0.5))["loss"].sum().backward()
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    assert not [name for name, p in trained.items() if p.grad is None]
    frozen = {name.split(".")[2] for name, p in objective.named_parameters() if not p.requires_grad}
    assert frozen == {
        "xcit": {"cls_token", "cls_attn_blocks"},
        "cait": {"cls_token", "blocks_token_only"},
        "crossvit": {"blocks", "norm"},  # what only the other branch reads
        "convnext": {"head"}, "hiera": {"head"}, "mambaout": {"head"},  # norms after pooling
    }.get(family, set())  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("family", ["swin", "xcit", "crossvit", "mobilevit", "eva02"])
def test_images_of_other_channels_are_encoded(family):
    encoder = small(family, channels=2)
    h, w = encoder.grid(SMALL[family][2])
    assert encoder(images_for(family, 2)).patches.shape == (2, h * w, encoder.width)
    assert encoder.channels == 2


@pytest.mark.slow
@torch.no_grad()
def test_an_encoder_compiles_as_one_graph_with_the_same_features(token):
    encoder, images = small("swin"), images_for("swin")
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
    for options in ({}, {"mask": mask_for(encoder, "swin"), "mask_token": token(encoder)}, {}):
        assert torch.allclose(compiled(images, **options).patches, encoder(images, **options).patches, atol=1e-5)


# ---- layers and depths ---------------------------------------------------------------------------


@torch.no_grad()
def test_layers_are_the_maps_of_the_stages_in_the_asked_order(family):
    encoder, images = small(family), images_for(family)
    ends = sorted(encoder.facts.maps)
    first, last = encoder.layers(images, [-1, ends[0]], norm=True)[::-1]
    assert torch.equal(last.patches, encoder(images).patches)
    assert first.patches.shape[1] % last.patches.shape[1] == 0
    assert not torch.equal(first.patches, last.patches)
    (raw,) = encoder.layers(images, [-1])
    assert torch.equal(encoder.final_norm(raw.patches), last.patches)


@torch.no_grad()
@pytest.mark.parametrize(("family", "ends"), [("swin", [1, 3]), ("convnext", [0, 2, 3, 4]), ("cait", [0, 1])])
def test_blocks_that_end_a_stage_have_an_output(family, ends):
    assert sorted(small(family).facts.maps) == ends


def test_a_block_inside_a_stage_is_refused():
    with pytest.raises(ValueError, match="block 2 of SwinTransformer has no output of its own; blocks that have: 1, 3"):
        small("swin").layers(images_for("swin"), [2])


def test_every_parameter_has_a_depth_and_every_depth_a_parameter(family):
    encoder = small(family)
    depths = {name: encoder.depth_of(name) for name, _ in encoder.named_parameters()}
    assert set(depths.values()) == set(range(encoder.depth + 2))
    (stem,) = encoder.facts.stems
    assert {depth for name, depth in depths.items() if name.startswith(f"model.{stem.module}.")} == {0}
    assert {depth for name, depth in depths.items() if name.startswith("model.norm.")} <= {encoder.depth + 1}


def test_blocks_of_a_pyramid_are_counted_through_its_stages():
    encoder = small("swin")
    assert encoder.depth == 4
    assert encoder.depth_of("model.layers.1.blocks.0.norm1.weight") == 3
    assert encoder.depth_of("model.layers.1.downsample.norm.weight") == 3


def test_undecayed_parameters_are_named_in_full():
    assert "model.cls_token" in small("xcit").no_weight_decay()
    assert {name for name in small("xcit").no_weight_decay() if "pos_embed." in name}  # timm says pos_embed.*
    assert "model.layers.0.blocks.0.attn.relative_position_bias_table" in small("swin").no_weight_decay()
    assert small("convnext").no_weight_decay() == set()


def test_drop_path_reaches_the_model():
    model = small("swin", drop_path_rate=0.3).model
    assert model.layers[-1].blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)


# ---- export --------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_export_reloads_in_timm_with_equal_features(family, recipe, tmp_path):
    encoder, images = small(family), images_for(family)
    views = SimpleNamespace(sizes=[SMALL[family][2]], evaluation=augment.center)
    loaded = LoadedRun(None, encoder, {}, views, recipe("simmim"), 7, tmp_path / "run")
    report = target.export(loaded, tmp_path / "out", target.Config())
    assert report["max_difference"] == 0.0
    reloaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0).eval()
    index = encoder.facts.maps[encoder.depth - 1]
    (theirs,) = reloaded.forward_intermediates(encoder.normalize(images), indices=[index], intermediates_only=True)
    (ours,) = encoder.layers(images, [-1])
    assert torch.equal(theirs.flatten(2).transpose(1, 2), ours.patches)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"model": "swim_tiny"}, 64, "encoder.model='swim_tiny' is not a timm model; some that are: "),
        ({"options": {"depht": 2}}, 64, "encoder.options.depht is not an option of encoder.model='swin_tiny_patch4"),
        ({"options": {"img_size": 32}}, 64, "encoder.options.img_size is not an option of encoder.model='swin_tiny_pa"),
        (
            {"model": "mobilevit_xxs", "options": {"chs": 2}},
            64,
            "known: aa_layer, act_layer, attn_kwargs, ",
        ),
        (
            {"model": "deit3_small_patch16_224", "options": {"embed_dim": 50}},
            64,
            "of 64x64 pixels and 3 channels",
        ),
        (
            {"model": "mixer_s16_224", "options": {"embed_dim": 64}},
            64,
            "encoder.options.embed_dim is fixed by timm",
        ),
        ({"model": "hiera_tiny_224"}, 60, "encoder.model='hiera_tiny_224' cannot be built for images of 60x60 pixels"),
        ({"model": "nest_tiny"}, 100, "encoder.model='nest_tiny' cannot be built for images of 100x100 pixels"),
        ({"model": "mobilevitv2_050"}, (64, 96), "makes a grid of 2x4 of images of 64x96 pixels, which is not one str"),
        (
            {"model": "pit_s_224"},
            224,
            "encoder.model='pit_s_224' has no patch_embed, stem, conv_stem or conv1",
        ),
        ({"model": "vgg11"}, 64, "so masked tokens cannot be replaced; choose another model or image size"),
        (
            {"model": "vgg11", "drop_path_rate": 0.1},
            64,
            "encoder.model='vgg11' drops no paths; set ",
        ),
        ({"mean": [0.5], "std": [0.5]}, 64, "encoder.mean has 1 values for images of 3 channels"),
    ],
)
def test_what_makes_no_encoder_is_refused(changes, size, message):
    with torch.device("meta"), pytest.raises(ValueError) as error:  # noqa: PT011
        build(Config(**changes), image_size=(size, size) if isinstance(size, int) else size, channels=3)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_without_intermediate_maps_is_refused(monkeypatch):
    from timm.models.swin_transformer import SwinTransformer

    monkeypatch.delattr(SwinTransformer, "forward_intermediates")
    with pytest.raises(ValueError, match="has no forward_intermediates, through which features are read; choose ano"):
        _small.__wrapped__("swin", 3)


def test_an_image_that_the_stride_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="image size 36x48 does not divide by the patch size 8"):
        small("swin").grid((36, 48))


def test_a_dense_model_cannot_serve_mae():
    with pytest.raises(ValueError, match=r"objective\.name=mae needs an encoder that can drop patches"):
        mae.build(small("swin"), mae.Config())


def test_a_dense_model_has_no_further_blocks():
    with pytest.raises(ValueError, match=r"encoder\.name=dense has no further blocks of the kind of SwinTransformer"):
        small("swin").more_blocks(2, 1)
