import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mim.contracts import IGNORE
from mim.data import augment
from mim.data.augment import (
    Box,
    center,
    crop,
    gray_center,
    gray_crop,
    multi_crop,
    segment_crop,
    segment_native,
    segment_whole,
)
from mim.data.decode import Encoded, decode, open_image
from mim.data.label_map import Pair
from mim.data.order import rng

RAMP = torch.stack(torch.meshgrid(torch.arange(200), torch.arange(250), indexing="ij")).to(torch.uint8)
IMAGE = torch.cat([RAMP, RAMP[:1]]).permute(1, 2, 0).contiguous().permute(2, 0, 1)  # rows, columns, rows
VIEWS = [crop, center, gray_crop, gray_center]


def name(sample):
    return rng("view", 0, 0, sample)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_uint8_of_the_asked_sizes_and_a_function_of_the_generator(view, channels):
    sizes = [(32, 48), (16, 24)]
    first, again = view(IMAGE[:channels], name(1), sizes), view(IMAGE[:channels], name(1), sizes)
    assert [tuple(v.shape) for v in first] == [(channels, 32, 48), (channels, 16, 24)]
    assert all(v.dtype == torch.uint8 for v in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("view", [crop, center])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_sixteen_bits_and_floats_of_any_channels_have_the_views_of_eight_bits(view, channels):
    image = IMAGE[:1].expand(channels, -1, -1)
    sizes = [(32, 48), (16, 24)]
    expected = view(image, name(3), sizes)
    deep = view((image.to(torch.int32) * 257).to(torch.uint16), name(3), sizes)
    floats = view(image.float() / 255, name(3), sizes)
    for plain, sixteen, real in zip(expected, deep, floats, strict=True):
        assert sixteen.dtype == torch.uint16
        assert real.dtype == torch.float32
        assert plain.shape == sixteen.shape == real.shape
        assert (sixteen.float() / 257 - plain).abs().max() <= 1
        assert (real * 255 - plain).abs().max() <= 1.01


@pytest.mark.parametrize("white", [0, 65535])
def test_sixteen_bits_never_wrap_around_where_the_filter_overshoots(white):
    edge = torch.full((1, 40, 40), 65535 - white, dtype=torch.int32)
    edge[:, :, 20:] = white
    (view,) = center(edge.to(torch.uint16), name(0), [(100, 100)], crop_ratio=1.0)
    rows = view[0].int()
    assert ((rows[:, 0] - (65535 - white)).abs() < 3000).all()
    assert (rows[:, :40] - (65535 - white)).abs().max() < 6000
    assert (rows[:, 60:] - white).abs().max() < 6000


@pytest.mark.parametrize("view", VIEWS)
def test_an_encoded_image_has_the_views_of_its_pixels(view):
    buffer = io.BytesIO()
    Image.fromarray(IMAGE.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=90)
    encoded, whole = open_image(buffer.getvalue()), decode(buffer.getvalue())
    assert isinstance(encoded, Encoded)
    for sample in range(10):
        found, expected = (
            view(encoded, name(sample), [(32, 48), (16, 24)]),
            view(whole, name(sample), [(32, 48), (16, 24)]),
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("view", [gray_crop, gray_center])
def test_gray_views_refuse_what_has_no_gray_levels(view):
    for image, fact in [
        (torch.zeros(5, 9, 9, dtype=torch.uint8), "5 of uint8"),
        (torch.zeros(1, 9, 9), "1 of float32"),
    ]:
        with pytest.raises(ValueError, match=f"8-bit images of 1 or 3 channels, not {fact}; use view crop or center"):
            view(image, name(0), [(8, 8)])


@pytest.mark.parametrize("view", [crop, center])
def test_views_keep_the_memory_layout_of_the_decoder(view):
    for found in view(IMAGE, name(0), [(32, 48), (16, 24)]):
        assert found.permute(1, 2, 0).is_contiguous() or found.flip(2).permute(1, 2, 0).is_contiguous()


@pytest.mark.parametrize("view", VIEWS)
def test_both_sizes_show_the_same_box_and_flip(view):
    for sample in range(20):
        large, small = view(IMAGE, name(sample), [(64, 64), (32, 32)])
        pooled = torch.nn.functional.avg_pool2d(large.float(), 2)
        assert (pooled - small)[:, 2:-2, 2:-2].abs().max() <= 3


def test_crop_covers_the_asked_area_and_aspect():
    areas, aspects, flips = [], [], 0
    for sample in range(300):
        box = augment._random_box(200, 250, name(sample), (0.2, 1.0), (3 / 4, 4 / 3))
        areas.append(box.h * box.w / (200 * 250))
        aspects.append(box.w / box.h)
        assert 0 <= box.top <= 200 - box.h
        assert 0 <= box.left <= 250 - box.w
        (view,) = crop(IMAGE, name(sample), [(8, 8)])
        flips += int(view[1, 4, 0]) > int(view[1, 4, -1])
    assert 0.19 < min(areas) < 0.25
    assert max(areas) > 0.85
    assert 0.74 < min(aspects) < 0.8
    assert 1.25 < max(aspects) < 1.35
    assert 100 < flips < 200


def test_an_extreme_aspect_falls_back_to_the_centre():
    box = augment._random_box(1, 1000, name(0), (0.9, 1.0), (3 / 4, 4 / 3))
    assert box == Box(0, 499, 1, 1) or box == Box(0, 500, 1, 1)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1)])
def test_tiny_images_have_views(view, shape):
    assert view(torch.zeros(3, *shape, dtype=torch.uint8), name(0), [(16, 16)])[0].shape == (3, 16, 16)


def test_center_keeps_an_image_of_the_asked_size_untouched():
    (view,) = center(IMAGE, name(0), [(200, 250)], crop_ratio=1.0)
    assert torch.equal(view, IMAGE)


def test_center_frames_like_resize_then_crop():
    (view,) = center(IMAGE, name(0), [(64, 64)], crop_ratio=0.8)
    box = (45, 20, 205, 180)  # the middle 160 x 160
    pillow = Image.fromarray(IMAGE.permute(1, 2, 0).numpy()).resize((64, 64), Image.Resampling.BICUBIC, box=box)
    assert np.abs(view.permute(1, 2, 0).numpy().astype(int) - np.asarray(pillow)).max() <= 1


def test_the_photometric_change_is_gray_varied_and_keyed_by_the_sample():
    views = [gray_center(IMAGE, name(sample), [(32, 32)])[0] for sample in range(40)]
    assert all(torch.equal(view[0], view[1]) for view in views)
    inverted = [int(view[0, 4, 16]) > int(view[0, 28, 16]) for view in views]  # the ramp brightens downwards
    assert 8 < sum(inverted) < 32
    assert len({float(view.float().mean()) for view in views}) == 40


def test_multi_crop_gives_global_and_local_crops_of_their_own_boxes_and_areas():
    """On an image that holds its own coordinates, each crop shows where it was cut."""
    rows, columns = torch.meshgrid(torch.arange(200.0), torch.arange(200.0), indexing="ij")
    image = torch.stack([rows, columns])
    options = {"num_global": 2, "num_local": 6, "local_size": 8, "hflip": 0.5, "ratio": (1.0, 1.0)}
    found = multi_crop(image, np.random.default_rng(3), [(16, 16)], **options)
    assert found["images"].shape == (2, 2, 16, 16)
    assert found["local_images"].shape == (6, 2, 8, 8)
    for name, (low, high) in {"images": (0.4, 1.0), "local_images": (0.05, 0.4)}.items():
        spans = found[name][:, 0, -1, 0] - found[name][:, 0, 0, 0]  # rows covered, less about one pixel of the crop
        areas = (spans * (1 + 1 / (found[name].shape[-1] - 1)) / 200) ** 2
        assert areas.min() > 0.8 * low
        assert areas.max() < 1.2 * high
        assert len({round(float(corner)) for corner in found[name][:, 0, 0, 0]}) > 1
    again = multi_crop(image, np.random.default_rng(3), [(16, 16)], **options)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_multi_crop_without_local_crops_has_no_field_for_them():
    found = multi_crop(torch.zeros(3, 20, 20), np.random.default_rng(0), [(8, 8)], num_local=0)
    assert set(found) == {"images"}


# ---- segmentation --------------------------------------------------------------------------------

SEGMENT = [segment_crop, segment_whole]
LEVEL = 50  # gray levels between two classes


def painted(rng, height, width):
    """A label map of five classes in cells of at least 16 pixels, and the image that is painted with it."""
    rows, columns = (np.arange(side) * max(1, side // 16) // side for side in (height, width))
    label_map = rng.integers(0, 5, (rows[-1] + 1, columns[-1] + 1), dtype=np.uint8)[rows][:, columns]
    image = torch.from_numpy(label_map * np.uint8(LEVEL)).expand(3, -1, -1)
    return Pair(image.contiguous(), torch.from_numpy(label_map))


def away_from_edges(label_map, radius):
    """Where the classes within a radius are all the same."""
    maps = label_map.float()[None]
    side = 2 * radius + 1
    return (F.max_pool2d(maps, side, 1, radius) == -F.max_pool2d(-maps, side, 1, radius))[0]


@pytest.mark.parametrize(("view", "radius"), [(segment_crop, 8), (segment_whole, 2)])  # of the filter: 2 view pixels,
@pytest.mark.parametrize("shape", [(90, 120), (150, 61), (33, 200)])  # or as many as 2 source pixels have
def test_image_and_label_map_show_the_same_place_whatever_the_crop_and_flip(view, radius, shape):
    checked = 0
    for sample in range(12):
        found = view(painted(np.random.default_rng(sample), *shape), name(sample), [(64, 80)])
        label_map, image = found["label_maps"], found["images"]
        assert (label_map.shape, label_map.dtype, image.shape) == ((64, 80), torch.uint8, (3, 64, 80))
        inside = away_from_edges(label_map, radius) & (label_map != IGNORE)
        assert torch.equal((image[0][inside].float() / LEVEL).round().to(torch.uint8), label_map[inside])
        assert (image[:, label_map == IGNORE] == 0).all()
        checked += int(inside.sum())
    assert checked > 12 * 64 * 80 * 0.05


@pytest.mark.parametrize("view", SEGMENT)
def test_edges_lie_between_the_same_pixels_of_image_and_label_map(view):
    """Half black and half white: where the image is brighter than gray, there the map says so, to the pixel."""
    differs, edges = 0, 0
    for sample in range(40):
        step = np.random.default_rng(sample).integers(7, 23)
        label_map = (torch.arange(160)[None] // step % 2).to(torch.uint8).repeat(120, 1).contiguous()
        pair = Pair(label_map[None] * 255, label_map)
        found = view(pair, name(sample), [(50, 70)])
        row, bright = found["label_maps"][0], found["images"][0, 0] > 127
        inside = row != IGNORE
        differs += int((bright[inside] != row[inside].bool()).sum())
        edges += int((row[inside][1:] != row[inside][:-1]).sum())
    assert edges > 100
    assert differs <= 0.1 * edges  # a pixel whose centre is the edge itself may fall to either side


@pytest.mark.parametrize("view", SEGMENT)
def test_segmentation_views_are_a_function_of_the_generator(view):
    pair = painted(np.random.default_rng(0), 90, 120)
    one, again = (view(pair, name(4), [(32, 32)]) for _ in range(2))
    assert set(one) == {"images", "label_maps"}
    assert all(torch.equal(one[field], again[field]) for field in one)


@pytest.mark.parametrize("view", [*SEGMENT, segment_native])
def test_without_a_label_map_segmentation_views_show_the_image_alone(view):
    (shown,) = view(IMAGE, name(1), [(32, 48)])
    assert shown.shape[0] == 3
    assert shown.dtype == torch.uint8


def test_an_encoded_image_and_its_map_have_the_views_of_its_pixels():
    buffer = io.BytesIO()
    Image.fromarray(IMAGE.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=90)
    encoded, whole = open_image(buffer.getvalue()), decode(buffer.getvalue())
    label_map = torch.from_numpy(np.random.default_rng(0).integers(0, 9, whole.shape[1:], dtype=np.uint8))
    for sample in range(5):
        found, expected = (segment_crop(Pair(i, label_map), name(sample), [(32, 48)]) for i in (encoded, whole))
        assert all(torch.equal(found[field], expected[field]) for field in expected)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float32])
@pytest.mark.parametrize("channels", [1, 5])
def test_deep_images_have_segmentation_views(dtype, channels):
    image = IMAGE[:1].expand(channels, -1, -1).float().to(dtype)
    found = segment_crop(Pair(image, IMAGE[0]), name(0), [(300, 300)], scale=(0.5, 0.5))
    assert (found["images"].shape, found["images"].dtype) == ((channels, 300, 300), dtype)
    assert (found["label_maps"][:, -1] == IGNORE).all()


def test_the_scale_of_a_segment_crop_is_of_the_short_side():
    """Classes are the rows: a crop shows as many of them as its height has source pixels."""
    rows = torch.arange(200, dtype=torch.uint8)[:, None].repeat(1, 240)
    scales = []
    for sample in range(150):
        options = {"scale": (0.5, 2.0), "max_class_ratio": 1.0, "hflip": 0.0}
        shown = segment_crop(Pair(rows[None], rows), name(sample), [(50, 50)], **options)["label_maps"]
        column = shown[:, 0][shown[:, 0] != IGNORE].int()
        scales.append(len(column) / float(column[-1] - column[0] + 1) * 200 / 50)  # of the short side, 200, to 50
    assert 0.45 < min(scales) < 0.6
    assert 1.8 < max(scales) < 2.1


def test_short_states_the_side_to_which_the_scale_belongs():
    rows = torch.arange(200, dtype=torch.uint8)[:, None].repeat(1, 240)
    shown = segment_crop(Pair(rows[None], rows), name(0), [(50, 50)], scale=(1.0, 1.0), short=100)["label_maps"]
    assert int(shown[-1, 0]) - int(shown[0, 0]) in (98, 99, 100)  # 50 of 100 pixels: half of the 200 rows


def test_a_crop_of_mostly_one_class_is_drawn_again():
    label_map = torch.zeros(200, 200, dtype=torch.uint8)
    label_map[80:120, 80:120] = 1
    pair = Pair(label_map[None], label_map)

    def largest_share(limit):
        shares = []
        for sample in range(60):
            options = {"scale": (3.0, 3.0), "max_class_ratio": limit}
            shown = segment_crop(pair, name(sample), [(32, 32)], **options)["label_maps"]
            shares.append(float((shown == shown.flatten().mode().values).float().mean()))
        return np.mean(np.array(shares) >= 0.75)

    assert largest_share(0.75) < largest_share(1.0) - 0.2


def test_segment_whole_keeps_the_aspect_and_fills_up_or_stretches():
    label_map = torch.ones(40, 80, dtype=torch.uint8)
    pair = Pair(torch.full((3, 40, 80), 9, dtype=torch.uint8), label_map)
    kept = segment_whole(pair, name(0), [(32, 32)])
    assert (kept["label_maps"][:16] == 1).all()
    assert (kept["label_maps"][16:] == IGNORE).all()
    assert (kept["images"][:, 16:] == 0).all()
    stretched = segment_whole(pair, name(0), [(32, 32)], keep_aspect=False)
    assert (stretched["label_maps"] == 1).all()


@pytest.mark.parametrize("shape", [(40, 80), (33, 20), (200, 210)])
def test_segment_native_covers_the_asked_size_and_leaves_the_map_as_it_is(shape):
    pair = painted(np.random.default_rng(0), *shape)
    found = segment_native(pair, name(0), [(48, 64)])
    h, w = found["images"].shape[1:]
    assert torch.equal(found["label_maps"], pair.label_map)
    assert h >= 48 and w >= 64 and (h == 48 or w == 64)  # noqa: PT018
    assert abs(h / w - shape[0] / shape[1]) < 0.03
    larger = segment_native(pair, name(0), [(48, 64)], short=100)["images"]
    assert min(larger.shape[1:]) == 100


@pytest.mark.parametrize("view", [*SEGMENT, segment_native])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1)])
def test_tiny_images_have_segmentation_views(view, shape):
    pair = Pair(torch.zeros(3, *shape, dtype=torch.uint8), torch.zeros(shape, dtype=torch.uint8))
    assert view(pair, name(0), [(16, 16)])["images"].shape[0] == 3
