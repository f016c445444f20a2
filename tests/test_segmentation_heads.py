"""The heads of segmentation: UPerNet is transformers' with the same weights; each brings maps to its own grid."""

import re

import pytest
import torch
from conftest import shaken

from mim.segmentation_heads import FCN, Level, Linear, ProgressiveUpsampling, Pyramid, UPerNet, norm_of, resized

OPTIONS = {"norm": "batch", "dropout": 0.1}
NAMES = [  # transformers' -> ours
    (r"fpn\.fpn1\.conv_transpose1", "0.steps.0.0"),
    (r"fpn\.fpn1\.normalization", "0.steps.0.1"),
    (r"fpn\.fpn1\.conv_transpose2", "0.steps.0.3"),
    (r"fpn\.fpn2", "0.steps.1.0"),
    (r"auxiliary_head\.convs\.0", "2.convolution"),
    (r"auxiliary_head", "2"),
    (r"decode_head", "1"),
    (r"psp_modules\.blocks\.(\d)\.conv", r"pooled.\1"),
    (r"psp_bottleneck", "context"),
    (r"lateral_convs", "lateral"),
    (r"fpn_convs", "smooth"),
    (r"fpn_bottleneck", "fuse"),
    (r"\.convolution\.(?=weight)", ".0."),
    (r"\.normalization\.", ".1."),
    (r"classifier", "scores.1"),
]


def maps_of(levels, size=64, batch=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, x.width, size // x.stride, size // x.stride, generator=generator) for x in levels]


def plain(stride, width=16):
    return [Level(block, width, stride) for block in (3, 5, 7, 11)]


@torch.no_grad()
def test_pyramid_and_heads_are_those_of_transformers_beit():
    transformers = pytest.importorskip("transformers")
    cfg = transformers.BeitConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=64, patch_size=16, intermediate_size=16,
        num_labels=5, out_indices=[1, 2, 3, 4], auxiliary_channels=8,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = shaken(transformers.BeitForSemanticSegmentation(cfg))
    levels = plain(16)
    head = UPerNet([16] * 4, 5, channels=16, **OPTIONS)
    ours = torch.nn.ModuleList([Pyramid(levels, norm="batch"), head, FCN(16, 5, channels=8, **OPTIONS)]).eval()
    state = {}
    for name, value in theirs.state_dict().items():
        for old, new in NAMES:
            name = re.sub(old, new, name)
        state[name.replace("convolution.convolution", "convolution.0")] = value
    ours.load_state_dict({n: v for n, v in state.items() if not n.startswith("beit.")})
    maps = maps_of(levels)
    found, expected = ours[0](maps), theirs.fpn(tuple(maps))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    for one, other in (
        (ours[1](found), theirs.decode_head(expected)),
        (ours[2](found[2]), theirs.auxiliary_head(expected)),
    ):
        assert ((one - other).abs().max() / other.abs().max()) < 1e-5


@pytest.mark.parametrize("patch_size", [4, 8, 16, 32])
def test_a_pyramid_has_strides_of_4_to_32_whatever_the_patches(patch_size):
    levels = plain(patch_size)
    found = Pyramid(levels, norm="group")(maps_of(levels))
    assert [64 // x.shape[2] for x in found] == [4, 8, 16, 32]


def test_a_pyramid_of_an_odd_grid_sees_the_last_row_too():
    levels = plain(16)
    maps = [x[:, :, :3, :3] for x in maps_of(levels)]
    maps[3][:, :, 2, 2] = 100
    *_, coarsest = Pyramid(levels, norm="group")(maps)
    assert coarsest.shape[2:] == (2, 2)
    assert (coarsest[:, :, 1, 1] == 100).all()


@pytest.mark.parametrize(("stride", "num_steps"), [(4, 2), (8, 3), (14, 4), (16, 4)])
def test_progressive_upsampling_doubles_until_a_cell_is_a_pixel(stride, num_steps):
    head = ProgressiveUpsampling(Level(0, 16, stride), 5, channels=8, norm="group", dropout=0.0)
    assert head([torch.randn(1, 16, 2, 3)]).shape == (1, 5, 2 * 2**num_steps, 3 * 2**num_steps)


def test_a_linear_head_is_one_linear_map_of_every_token():
    head = Linear(16, 5, norm="group", dropout=0.0)
    x = torch.randn(2, 16, 3, 4)
    weight, bias = head.scores[1].weight.flatten(1), head.scores[1].bias
    expected = x.permute(0, 2, 3, 1) @ weight.T + bias  # (B, h, w, classes)
    assert torch.allclose(head([x]).permute(0, 2, 3, 1), expected, atol=1e-6)


def test_upernet_scores_at_the_finest_of_any_number_of_levels():
    levels = [Level(0, 16, 4), Level(1, 24, 8), Level(2, 32, 16)]
    head = UPerNet([16, 24, 32], 5, channels=16, norm="group", dropout=0.0)
    assert head(maps_of(levels)).shape == (2, 5, 16, 16)


def test_upernet_sees_the_whole_image_from_every_cell():
    """The pooled context: what changes in one corner reaches the other."""
    levels = plain(16)
    head = UPerNet([16] * 4, 5, channels=16, norm="batch", dropout=0.0).eval()
    maps = maps_of(levels, size=256)
    before = head(maps)
    maps[3] = maps[3].clone()
    maps[3][:, :, 0, 0] += 50
    assert (head(maps) - before)[:, :, -1, -1].abs().min() > 0


def test_resizing_keeps_corners_apart_as_published():
    """Corners are not aligned: doubling [0, 1] gives the values at 1/4 and 3/4 between the centres."""
    row = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    assert resized(row, (1, 4)).flatten().tolist() == [0.0, 0.25, 0.75, 1.0]
    assert resized(row, (1, 2)) is row


@pytest.mark.parametrize(("channels", "groups"), [(768, 48), (512, 32), (24, 3), (16, 1)])
def test_a_group_has_at_most_sixteen_channels_and_divides(channels, groups):
    assert norm_of("group", channels).num_groups == groups
