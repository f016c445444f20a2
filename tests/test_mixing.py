"""Erasing and mixing on the device: timm's, touching nothing else, and known by the seeds alone."""

import random

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup

from mim.data.mixing import Mixing, erase

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)


def images(rows, size=16, channels=3):
    return torch.rand(rows, channels, size, size, generator=torch.Generator().manual_seed(0))


def seed(number=0):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def mixing(mixup=0.8, cutmix=1.0, smoothing=0.1):
    return Mixing(mixup, cutmix, smoothing=smoothing, num_classes=4)


def test_the_asked_share_of_images_gets_a_box_and_no_other_pixel_changes():
    seed()
    before = images(400)
    after = erase(before, 0.25, mean=MEAN, std=STD)
    changed = (after != before).all(dim=1)  # (B, H, W): noise is never equal
    assert changed.flatten(1).any(dim=1).float().mean() == pytest.approx(0.25, abs=0.06)
    assert torch.equal((after != before).any(dim=1), changed)
    for box in changed[changed.flatten(1).any(dim=1)][:10]:
        rows, columns = box.any(dim=1), box.any(dim=0)
        assert box.sum() == rows.sum() * columns.sum()
        assert box.sum() <= 0.4 * box.numel()


def test_the_noise_is_normal_in_the_pixels_that_the_network_normalises():
    seed()
    before = images(100)
    after = erase(before, 1.0, mean=MEAN, std=STD)
    noise = ((after - MEAN) / STD).movedim(1, -1)[(after != before).all(dim=1)]  # (pixels, C)
    assert noise.mean(dim=0).abs().max() < 0.05
    assert (noise.std(dim=0) - 1).abs().max() < 0.05


def test_the_seeds_decide_what_is_erased():
    seed(1)
    first = erase(images(20), 0.5, mean=MEAN, std=STD)
    seed(1)
    assert torch.equal(erase(images(20), 0.5, mean=MEAN, std=STD), first)
    seed(2)
    assert not torch.equal(erase(images(20), 0.5, mean=MEAN, std=STD), first)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_is_timms_and_leaves_its_input_alone(mixup, cutmix):
    before, labels = images(6), torch.tensor([0, 1, 2, 3, 0, 1])
    seed(3)
    mixed, soft = mixing(mixup, cutmix)(before, labels)
    seed(3)
    theirs = Mixup(mixup, cutmix, label_smoothing=0.1, num_classes=4)(images(6), labels)
    assert torch.equal(mixed, theirs[0])
    assert torch.equal(soft, theirs[1])
    assert torch.equal(before, images(6))
    assert not torch.equal(mixed, before)
    assert soft.sum(dim=1).allclose(torch.ones(6))


def test_the_middle_of_an_odd_number_is_mixed_with_none():
    seed(3)
    before = images(5)
    mixed, soft = mixing(cutmix=0.0)(before, torch.tensor([0, 1, 2, 3, 0]))
    assert mixed[2].allclose(before[2], atol=1e-6)
    assert soft[2].allclose(torch.tensor([0.025, 0.025, 0.925, 0.025]))
    assert not mixed[1].allclose(before[1], atol=1e-3)
    assert mixed[1].add(mixed[3]).allclose(before[1] + before[3], atol=1e-5)  # lambda and 1 - lambda of both


def test_neither_an_unlabelled_row_nor_its_partner_gets_a_label():
    seed()
    _, soft = mixing()(images(6), torch.tensor([0, -1, 2, 3, 0, 1]))
    assert soft.any(dim=1).tolist() == [True, False, True, True, False, True]
