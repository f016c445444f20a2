"""What is measured of codes is what its name says."""

import numpy as np
import pytest
import torch

from mim.probing import codes


class Brightness:
    """A tokenizer of 8 px whose code is how bright a patch is, in 16 levels."""

    num_codes, stride, channels = 16, 8, 3

    def grid(self, size):
        return size[0] // 8, size[1] // 8

    def encode(self, images):
        mean = torch.nn.functional.avg_pool2d(images.mean(dim=1, keepdim=True), 8)
        return (mean * 15.999).long().flatten(1)

    def decode(self, ids, grid):
        square = (ids.float() / 15).unflatten(1, grid)[:, None].repeat(1, 3, 1, 1)
        return torch.nn.functional.interpolate(square, scale_factor=8)


def a_batch(levels):
    """Images whose patches have the given levels (B, h, w), with their codes."""
    images = Brightness().decode(levels.flatten(1), tuple(levels.shape[1:])) * 15 / 16 + 1 / 32
    return {"images": images, "codes": levels.flatten(1), "noise": torch.arange(len(levels))}


LEVELS = torch.randint(0, 16, (4, 4, 4), generator=torch.Generator().manual_seed(0))


def test_the_tokenizer_of_these_tests_gives_the_levels():
    assert torch.equal(Brightness().encode(a_batch(LEVELS)["images"]), LEVELS.flatten(1))


def test_codes_of_patches_alone_stay_under_a_shift_and_not_under_jitter():
    batch = a_batch(LEVELS)
    assert torch.equal(codes.under_shift(Brightness(), batch, (4, 4)), torch.ones(4))
    stable = codes.under_jitter(Brightness(), batch)
    assert stable.max() < 0.9
    assert torch.equal(batch["images"], a_batch(LEVELS)["images"])  # the batch is left alone


def test_codes_of_places_do_not_stay_under_a_shift():
    class Places(Brightness):
        def encode(self, images):
            h, w = self.grid(images.shape[-2:])
            return torch.arange(h * w).expand(len(images), -1)

    batch = a_batch(LEVELS) | {"codes": torch.arange(16).expand(4, -1)}
    assert codes.under_shift(Places(), batch, (4, 4)).max() == 0


def test_neighbours_differ_where_copying_the_left_one_would_be_wrong():
    ids = torch.tensor([[[1, 1, 2], [3, 4, 5]], [[7, 7, 7], [7, 7, 7]]]).flatten(1)
    assert codes.neighbours_differ(ids, (2, 3)).tolist() == [0.75, 0.0]


def test_the_loss_of_pixels_is_their_mean_absolute_error():
    batch = a_batch(LEVELS)
    loss = codes.misfit(Brightness(), batch, (4, 4))["recon_mae"]
    expected = (LEVELS / 15 - (LEVELS / 16 + 1 / 32)).abs().flatten(1).mean(dim=1)
    assert torch.allclose(loss, expected, atol=1e-6)


def test_a_histogram_holds_roots_of_shares():
    found = codes.histogram(torch.tensor([[0, 0, 0, 2]]), 4)
    assert torch.allclose(found.square(), torch.tensor([[0.75, 0.0, 0.25, 0.0]]))


def test_the_gallery_shows_patches_of_the_most_frequent_code_first():
    levels = LEVELS.clone()
    levels[:, 0] = 15
    (_, code_map), (_, gallery) = codes.pictures(Brightness(), iter([a_batch(levels)]))
    assert code_map.size == (2 * 100, 4 * 100)
    first = np.asarray(gallery)[2:34, 2:34]
    assert first.min() == first.max() == pytest.approx(255 * (15 / 16 + 1 / 32), abs=1)
