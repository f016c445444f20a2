"""The picture of a reconstruction: what is shown in a cell is what the cell claims."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mim.config import ConfigError
from mim.evals import reconstruction
from mim.evals.reconstruction import Config
from mim.looking import record
from mim.pictures.subjects import subjects
from mim.pictures.unmasking import unmask

SIZE, GAP, TOP = 32, 4, 34  # pixels of a cell, between cells, of title and heads


@pytest.fixture
def cells():
    """`cells(loaded)`: the picture of a run cut into cells (rows, columns, H, W, 3), uint8, at the images' own size."""

    def cut(loaded, num_images=2, **options):
        ((name, picture),) = reconstruction.run(loaded, Config(num_images=num_images, height=SIZE, **options))
        assert name == "reconstruction"
        step = SIZE + GAP
        pixels = np.asarray(picture)[TOP:, GAP:]
        rows, columns = pixels.shape[0] // step, pixels.shape[1] // step
        assert rows == num_images
        grid = pixels.reshape(rows, step, columns, step, 3).transpose(0, 2, 1, 3, 4)
        return grid[:, :, :SIZE, :SIZE].astype(int)

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
    loaded = predicting(loaded_run("mae"), lambda images: images, seen)
    cells(loaded, num_images=3)
    found = subjects(loaded, [str(shards / "val")], num_images=3)
    assert torch.equal(seen[0]["images"], torch.cat([subject.batch["images"] for subject in found]))


def test_masks_of_several_ratios_and_seeds_stand_side_by_side(loaded_run, cells, seen):
    found = cells(predicting(loaded_run("mae"), lambda images: images, seen), ratios=[0.25, 0.75], seeds=[0, 1])
    assert found.shape[1] == 1 + 3 * 4
    assert [batch["num_masked"] for batch in seen] == [4, 4, 12, 12]
    assert not torch.equal(seen[0]["mask"], seen[1]["mask"])
    assert not torch.equal(seen[0]["mask"][0], seen[0]["mask"][1])


@pytest.mark.parametrize(
    ("objective", "options", "sentence"),
    [
        ("beit", {"true_statistics": True}, "predicts no normalised patches"),
        ("mae", {"ratios": [1.5]}, "mask.ratio=1.5 must lie between 0 and 1"),
        ("mae", {"order": "best"}, "choose confident or random"),
        ("tokenize", {"rounds": 3}, "has no mask"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(loaded_run, objective, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        dict(reconstruction.run(loaded_run(objective), Config(num_images=1, **options)))


# ---- the animation -------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "rounds", "frames"), [("mae", 3, 4), ("beit", 99, 9)])
def test_the_animation_has_a_frame_for_each_round_and_stays_small(loaded_run, tmp_path, objective, rounds, frames):
    """Of 8 masked patches at most 8 rounds can reveal one."""
    found = dict(reconstruction.run(loaded_run(objective), Config(rounds=rounds)))
    _, pictures = record(found.items(), tmp_path, 7)
    path = Path(pictures["unmasking"])
    assert path.name == "unmasking-00000007.gif"
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.info["loop"]) == (frames, 0)
    assert path.stat().st_size < 200_000


def test_a_round_reveals_the_most_certain_and_sees_them_in_the_next():
    certainty = torch.tensor([[0.1, 0.9, 0.5, 0.7]])

    class Certain:
        def reconstruct(self, batch, frozen):
            batch["confidence"], batch["predicted_codes"] = certainty, torch.full((1, 4), 5)
            codes.append(batch["codes"].clone())
            return batch["images"] + 1  # so it tells how many rounds it has been seen in

    codes, images = [], torch.zeros(1, 1, 2, 2)
    mask = torch.tensor([[True, False, True, True]])
    batch = {"images": images, "mask": mask, "num_masked": 3, "codes": torch.zeros(1, 4, dtype=torch.int64)}
    rounds = list(unmask(Certain(), batch, {}, (2, 2), rounds=2, order="confident", seed=0))
    assert [left.flatten().tolist() for _, left in rounds] == [
        [True, False, True, True],
        [True, False, False, False],  # the two of three that are more certain; the visible one stays what it is
        [False, False, False, False],
    ]
    assert rounds[-1][0].flatten().tolist() == [1, 0, 1, 1]
    assert codes[1].tolist() == [[0, 0, 5, 5]]
    assert torch.equal(batch["mask"], mask)
    assert not images.any()
