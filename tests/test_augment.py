import io

import numpy as np
import pytest
import torch
from PIL import Image

from mim.data import augment
from mim.data.augment import Box, center, crop, gray_center, gray_crop, multi_crop
from mim.data.decode import Encoded, decode, open_image
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
