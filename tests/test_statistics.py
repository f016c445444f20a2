import pickle

import numpy as np
import pytest

from mim.contracts import DataError
from mim.data.statistics import Statistics

RNG = np.random.default_rng(0)


def summary(*images, parts=2):
    """The summary of images (C, H, W), gathered in several processes."""
    gathered = [Statistics() for _ in range(parts)]
    for i, image in enumerate(images):
        gathered[i % parts].add(image)
    return Statistics.summary(pickle.loads(pickle.dumps(part)) for part in gathered)


def flat(images):
    """(C, pixels) of all images."""
    return np.concatenate([image.reshape(len(image), -1) for image in images], axis=1)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_integers_have_the_mean_and_deviation_of_all_pixels(dtype, channels):
    white = np.iinfo(dtype).max
    images = [RNG.integers(0, white + 1, (channels, 5 + i, 7)).astype(dtype) for i in range(6)]
    found = summary(*images)
    assert found["dtype"] == dtype
    assert found["range"] == [[0, white]] * channels
    np.testing.assert_allclose(found["mean"], flat(images).mean(axis=1) / white, atol=1e-6)
    np.testing.assert_allclose(found["std"], flat(images).std(axis=1) / white, atol=1e-6)
    assert ("gray" in found) == (channels == 3)


def test_the_order_and_the_parts_change_nothing():
    images = [RNG.integers(0, 65536, (3, 9, 7)).astype(np.uint16) for _ in range(7)]
    assert summary(*images) == summary(*images[::-1], parts=3)


def test_a_small_deviation_far_from_zero_is_not_lost():
    images = [np.full((1, 64, 64), 65535, dtype=np.uint16) for _ in range(40)]
    images[0][0, 0, 0] = 65534
    expected = flat(images).astype(np.float64).std() / 65535
    assert summary(*images)["std"][0] == round(expected, 6)


def test_gray_and_colour_together_are_colour():
    gray, colour = RNG.integers(0, 256, (1, 4, 5), dtype=np.uint8), RNG.integers(0, 256, (3, 6, 5), dtype=np.uint8)
    expected = flat([gray.repeat(3, axis=0), colour])
    found = summary(gray, colour)
    np.testing.assert_allclose(found["mean"], expected.mean(axis=1) / 255, atol=1e-6)
    np.testing.assert_allclose(found["std"], expected.std(axis=1) / 255, atol=1e-6)


def test_gray_and_colour_floats_together_are_colour():
    gray, colour = RNG.random((1, 20, 20), dtype=np.float32), RNG.random((3, 20, 20), dtype=np.float32)
    found = summary(gray, colour)
    np.testing.assert_allclose(found["mean"], flat([gray.repeat(3, axis=0), colour]).mean(axis=1), atol=5e-3)


def test_colour_read_as_gray_has_its_own_statistics():
    images = [RNG.integers(0, 256, (3, 6, 5), dtype=np.uint8) // (i + 1) for i in range(3)]
    gray = np.array([0.299, 0.587, 0.114]) @ flat(images) / 255
    assert summary(*images)["gray"] == pytest.approx({"mean": gray.mean(), "std": gray.std()}, abs=1e-6)


def test_eight_and_sixteen_bits_together_are_sixteen():
    low, deep = RNG.integers(0, 256, (1, 4, 5), dtype=np.uint8), RNG.integers(0, 65536, (1, 6, 5), dtype=np.uint16)
    found = summary(low, deep)
    assert found["dtype"] == "uint16"
    expected = np.concatenate([low.ravel() / 255, deep.ravel() / 65535])
    assert found["mean"] == pytest.approx([expected.mean()], abs=1e-6)
    assert found["std"] == pytest.approx([expected.std()], abs=1e-6)


def test_floats_are_mapped_by_their_percentiles():
    images = [RNG.normal([[[280]], [[-3]]], [[[10]], [[0.5]]], (2, 60, 70)).astype(np.float32) for _ in range(5)]
    images[2][0, 3, 3] = 1e9  # an outlier that must not set the range
    low, high = np.percentile(flat(images), [0.1, 99.9], axis=1)
    found = summary(*images)
    value_range = np.array(found["range"])
    np.testing.assert_allclose(value_range[:, 0], low, rtol=2e-3)
    np.testing.assert_allclose(value_range[:, 1], high, rtol=2e-3)
    lowest, highest = value_range[:, :1], value_range[:, 1:]
    mapped = ((flat(images).astype(np.float64) - lowest) / (highest - lowest)).clip(0, 1)
    np.testing.assert_allclose(found["mean"], mapped.mean(axis=1), atol=2e-3)
    np.testing.assert_allclose(found["std"], mapped.std(axis=1), atol=2e-3)


def test_a_constant_float_channel_has_a_range():
    low, high = summary(np.full((1, 4, 4), 2.5, dtype=np.float32))["range"][0]
    assert low <= 2.5 < high


@pytest.mark.parametrize(
    ("shapes", "dtypes", "message"),
    [
        ([3, 5], ["uint8"] * 2, "the images have 3, 5 channels"),
        ([1, 5], ["uint8"] * 2, "the images have 1, 5 channels"),
        ([1, 1], ["uint8", "float32"], "some images are float32 and others uint8"),
    ],
)
def test_images_that_do_not_go_together_are_refused(shapes, dtypes, message):
    with pytest.raises(DataError, match=message):
        summary(*(np.zeros((c, 2, 2), dtype=d) for c, d in zip(shapes, dtypes, strict=True)))
