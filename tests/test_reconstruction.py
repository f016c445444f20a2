"""The picture of a reconstruction: what is shown in a cell is what the cell claims."""

import numpy as np
import pytest
import torch

from mim.data.shards import Dataset
from mim.evals import reconstruction
from mim.evals.reconstruction import Config

SIZE, FRAME = 32, 2


@pytest.fixture
def cells():
    """`cells(loaded)`: the picture of a run cut into cells (rows, columns, H, W, 3), uint8, at the images' own size."""

    def cut(loaded, num_images=2):
        ((name, picture),) = reconstruction.run(loaded, Config(num_images=num_images, height=SIZE))
        assert name == "reconstruction"
        step = SIZE + 2 * FRAME
        pixels = np.asarray(picture)
        rows, columns = pixels.shape[0] // step, pixels.shape[1] // step
        assert rows == num_images
        grid = pixels.reshape(rows, step, columns, step, 3).transpose(0, 2, 1, 3, 4)
        return grid[:, :, FRAME:-FRAME, FRAME:-FRAME].astype(int)

    return cut


@pytest.fixture
def seen(monkeypatch):
    """The batches that an objective was asked to reconstruct."""
    return []


def predicting(loaded, prediction, seen):
    def reconstruct(batch, frozen):
        seen.append(batch)
        return prediction(batch["images"])

    loaded.objective.reconstruct = reconstruct
    return loaded


def levels(images):
    """(B, C, H, W) in [0, 1] -> (B, H, W, C) in whole levels, as a picture holds them."""
    return (images * 255).round().permute(0, 2, 3, 1).numpy().astype(int)


def hidden(batch):
    """(B, H, W) bool: the pixels under the mask."""
    return batch["mask"].view(-1, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()


@pytest.mark.parametrize("objective", ["mae", "beit"])
def test_columns_are_image_visible_part_prediction_and_prediction_under_the_mask(loaded_run, cells, seen, objective):
    loaded = predicting(loaded_run(objective), lambda images: 1 - images, seen)
    found = cells(loaded)
    image, prediction, where = levels(seen[0]["images"]), levels(1 - seen[0]["images"]), hidden(seen[0])[..., None]
    assert found.shape[1] == 4
    assert np.array_equal(found[:, 0], image)
    assert np.array_equal(found[:, 1], np.where(where, 128, image))
    assert np.array_equal(found[:, 2], prediction)
    assert np.array_equal(found[:, 3], np.where(where, prediction, image))


def test_a_perfect_prediction_shows_the_image(loaded_run, cells, seen):
    found = cells(predicting(loaded_run("mae"), lambda images: images, seen))
    assert np.array_equal(found[:, 3], found[:, 0])


def test_a_prediction_at_the_tokenizer_s_size_is_brought_to_the_image_s(loaded_run, cells, seen):
    loaded = predicting(loaded_run("beit"), lambda images: torch.full((len(images), 3, 16, 16), 0.2), seen)
    assert (cells(loaded)[:, 2] == 51).all()


def test_a_tokenizer_run_shows_what_its_own_codes_decode_to(loaded_run, cells):
    loaded = loaded_run("tokenize")
    tokenizer = loaded.objective.tokenizer
    tokenizer.encode = lambda images: torch.zeros(len(images), 16, dtype=torch.int64)
    tokenizer.decode = lambda codes, grid: torch.full((len(codes), 3, 8 * grid[0], 8 * grid[1]), 0.2)
    found = cells(loaded)
    assert found.shape[1] == 2
    assert (found[:, 1] == 51).all()


def test_images_come_from_the_held_out_split(loaded_run, cells, seen, shards):
    cells(predicting(loaded_run("mae"), lambda images: images, seen), num_images=3)
    held_out = Dataset.open(shards / "val")
    keys = {held_out.read(s, r).key for s, count in enumerate(held_out.counts) for r in range(count)}
    assert len(seen[0]["keys"]) == 3
    assert set(seen[0]["keys"]) <= keys
