import torch
from torchvision.transforms.v2 import functional as tv

from mim.data.jitter import SALT, jitter_
from tokenizer.quantize import uniform_noise

torch.manual_seed(0)
NOISE = torch.randint(2**62, (64,))
IMAGES = 0.35 + 0.3 * torch.rand(64, 3, 12, 16)  # far from 0 and 1: nothing is clamped on the way


def jitter(views, noise, strength):
    """The changed views."""
    changed = [view.clone() for view in views]
    jitter_(changed, noise, strength)
    return changed


def factors(noise, strength):
    return 1 + strength * (2 * uniform_noise(noise ^ SALT, (3,)) - 1)


def test_it_is_brightness_then_contrast_then_saturation():
    (found,) = jitter([IMAGES], NOISE, 0.3)
    for image, changed, (brightness, contrast, saturation) in zip(IMAGES, found, factors(NOISE, 0.3), strict=True):
        weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # torchvision rounds them elsewhere
        expected = image * brightness
        expected = contrast * expected + (1 - contrast) * (expected * weights).sum(0).mean()
        expected = saturation * expected + (1 - saturation) * (expected * weights).sum(0)
        assert (changed - expected.clamp(0, 1)).abs().max() < 1e-5


def test_it_agrees_with_torchvision():
    (found,) = jitter([IMAGES], NOISE, 0.3)
    for image, changed, draws in zip(IMAGES, found, factors(NOISE, 0.3).tolist(), strict=True):
        expected = tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(image, draws[0]), draws[1]), draws[2])
        assert (changed - expected).abs().max() < 2e-3


def test_factors_fill_the_asked_interval_and_do_not_follow_each_other():
    draws = factors(torch.randint(2**62, (4000,)), 0.4)
    assert draws.min() >= 0.6
    assert draws.max() <= 1.4
    assert (draws.mean(0) - 1).abs().max() < 0.02
    assert (draws.std(0) - 0.8 / 12**0.5).abs().max() < 0.01
    assert torch.corrcoef(draws.T).fill_diagonal_(0).abs().max() < 0.06


def test_a_sample_is_changed_alike_in_any_batch():
    (whole,) = jitter([IMAGES], NOISE, 0.4)
    (part,) = jitter([IMAGES[20:23]], NOISE[20:23], 0.4)
    assert (whole[20:23] - part).abs().max() < 1e-6
    assert not torch.equal(jitter([IMAGES[:1]], NOISE[:1], 0.4)[0], jitter([IMAGES[:1]], NOISE[1:2], 0.4)[0])


def test_both_views_get_the_same_change():
    small = IMAGES[:, :, ::2, ::2].contiguous()
    large_changed, small_changed = jitter([IMAGES, small], NOISE, 0.4)
    assert (large_changed[:, :, ::2, ::2] - small_changed).abs().max() < 1e-6


def test_pixels_stay_in_the_unit_interval():
    (found,) = jitter([torch.rand(8, 3, 5, 5)], NOISE[:8], 1.0)
    assert found.min() >= 0
    assert found.max() <= 1


def test_no_strength_is_no_change():
    assert (jitter([IMAGES], NOISE, 0.0)[0] - IMAGES).abs().max() < 1e-6
