"""RandAugment keyed by a sample: timm's result, by a seed alone, with nobody else's draws touched."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from mim import build
from mim.config import ConfigError
from mim.data.augment import crop, rand_augment_crop
from mim.data.randaugment import rand_augment

POLICY, FILL = "rand-m9-mstd0.5-inc1", (124, 116, 104)


def picture(channels=3, size=(40, 48)):
    return torch.randint(256, (channels, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def changed(view, seed):
    return rand_augment(view, seed, policy=POLICY, fill=FILL)


def test_the_same_seeds_give_timms_own_result():
    view = picture()
    options = {"translate_const": 18, "img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
    transform = rand_augment_transform(POLICY, options)
    for seed in range(12):
        random.seed(seed)
        np.random.seed(seed)
        expected = np.array(transform(Image.fromarray(view.permute(1, 2, 0).numpy())))
        assert np.array_equal(changed(view, seed).permute(1, 2, 0).numpy(), expected), seed


def test_the_global_generators_are_left_as_they_were():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    changed(picture(), 5)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_what_was_drawn_elsewhere_does_not_matter():
    random.seed(1)
    first = [changed(picture(), seed) for seed in range(5)]
    random.seed(2)
    np.random.seed(2)
    assert all(torch.equal(changed(picture(), seed), view) for seed, view in enumerate(first))
    assert len({view.numpy().tobytes() for view in first}) > 1


def test_a_gray_image_stays_gray():
    view = picture(channels=1)
    results = [changed(view, seed) for seed in range(20)]
    assert all(r.shape == view.shape and r.dtype == torch.uint8 for r in results)
    assert any(not torch.equal(r, view) for r in results)


def test_the_crop_is_that_of_the_plain_view_then_changed():
    image, size = picture(), [(32, 32)]
    options = {"scale": (0.5, 1.0), "hflip": 0.5}
    (plain,) = crop(image, np.random.default_rng(4), size, **options)
    (view,) = rand_augment_crop(image, np.random.default_rng(4), size, policy="rand-m9-n0", **options)
    assert torch.equal(view, plain)


@pytest.mark.parametrize(("channels", "dtype"), [(3, torch.uint16), (4, torch.uint8), (3, torch.float32)])
def test_other_images_than_8_bit_ones_of_1_or_3_channels_are_refused(channels, dtype):
    with pytest.raises(ValueError, match="8-bit images of 1 or 3 channels"):
        changed(picture(channels).to(dtype), 0)


@pytest.mark.parametrize("policy", ["augmix-m5", "rand-q9", "m9"])
def test_an_unknown_policy_is_refused_before_any_worker_starts(recipe, policy):
    sections = recipe("classify")
    sections["data"]["view"] = {"name": "rand_augment_crop", "policy": policy}
    with pytest.raises(ConfigError, match=r"data\.view\.policy"):
        build.build(sections)
