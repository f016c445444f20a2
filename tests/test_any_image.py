"""From a folder of unusual images to a picture of their reconstruction, by commands and a recipe alone."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from mim import __main__
from mim.config import to_yaml
from mim.data.shards import Dataset

SIZE = [24, 32]
RECIPE = {
    "mask": {"name": "random", "ratio": 0.5},
    "encoder": {
        "name": "vit",
        "model": "vit_tiny_patch16_224",
        "width": 24,
        "depth": 1,
        "num_heads": 2,
        "patch_size": 8,
    },
    "optim": {"batch_size": 4, "length": "3 steps", "warmup": "1 steps", "lr": 1e-3},
    "train": {"cpu": True, "workers": 0, "log_every": "1 steps", "save_every": "3 steps"},
}


@pytest.fixture
def mim(monkeypatch, capsys):
    """`mim(*arguments)` runs a command that must succeed in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mim", *map(str, arguments)])
        code = 0
        try:
            __main__.main()
        except SystemExit as stop:
            code = stop.code
        told = capsys.readouterr()
        assert code == 0, told.err
        return told.out

    return run


def waves(channels, seed):
    """A smooth image (H, W, C) in [0, 1]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:40, :50]
    phases = rng.uniform(0, 6, channels)
    return 0.5 + 0.4 * np.sin(rows[..., None] / 5 + columns[..., None] / (3 + seed % 3) + phases)


@pytest.fixture
def trained(mim, tmp_path):
    """`trained(save, channels, **data)`: write images, make shards, train; returns the dataset and the run's log."""

    def run(save, channels, **data):
        (tmp_path / "in").mkdir()
        for i in range(12):
            save(tmp_path / "in" / f"{i:02d}", i)
        mim("shards", "make", tmp_path / "in", tmp_path / "shards", "--val-ratio", "0.3", "--workers", "1")
        recipe = RECIPE | {
            "data": {"path": str(tmp_path / "shards"), "image_size": SIZE, "channels": channels, **data},
            "objective": {"name": "mae", "decoder_width": 16, "decoder_depth": 1,
                          "decoder_num_heads": 2, "norm_pix_loss": False},
        }  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
        mim("train", tmp_path / "recipe.yaml", f"train.run={tmp_path / 'run'}")
        log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
        return Dataset.open(tmp_path / "shards/train"), [line["loss"] for line in log if "loss" in line]

    return run


def picture_of(mim, folder):
    """The reconstruction's picture of two images without its title, (rows, width, 3)."""
    told = json.loads(mim("eval", "reconstruction", folder, "num_images=2", "height=24"))
    with Image.open(told["reconstruction"]) as picture:
        return np.asarray(picture)[34:]


def test_sixteen_bit_gray_tiffs_train_and_are_reconstructed(mim, trained, tmp_path):
    def save(path, i):
        Image.fromarray((waves(1, i)[..., 0] * 65535).astype(np.uint16)).save(path.with_suffix(".tif"))

    dataset, losses = trained(save, 1)
    assert (dataset.dtype, dataset.channels, dataset.range) == ("uint16", 1, [[0, 65535]])
    assert dataset.mean[0] == pytest.approx(0.5, abs=0.1)
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    assert losses[0] < 5  # in units of the pixels' own deviation
    picture = picture_of(mim, tmp_path / "run")
    assert picture.shape == (2 * (24 + 4), 4 * (32 + 4) + 4, 3)
    image = picture[:24, 4:36]
    assert (image[..., 0] == image[..., 2]).all()  # gray
    assert len(np.unique(image)) > 50  # neither clipped nor dark
    assert 90 < image.mean() < 165


def test_five_channel_arrays_train_and_their_first_three_are_shown(mim, trained, tmp_path):
    def save(path, i):
        np.save(path.with_suffix(".npy"), (waves(5, i) * 255).astype(np.uint8))

    dataset, losses = trained(save, 5)
    assert (dataset.dtype, dataset.channels) == ("uint8", 5)
    assert len(dataset.std) == 5
    assert np.isfinite(losses).all()
    picture = picture_of(mim, tmp_path / "run")
    image = picture[:24, 4:36].reshape(-1, 3).astype(float)
    assert picture.shape == (2 * (24 + 4), 4 * (32 + 4) + 4, 3)
    assert np.abs(np.corrcoef(image.T)[np.triu_indices(3, 1)]).max() < 0.999  # three different channels


def test_floats_are_mapped_by_the_percentiles_of_the_training_images(mim, trained, tmp_path):
    def save(path, i):
        np.save(path.with_suffix(".npy"), (260 + 40 * waves(2, i)).astype(np.float32))

    dataset, losses = trained(save, 2)
    assert dataset.dtype == "float32"
    (low, high), _ = dataset.range
    assert 262 < low < 266
    assert 294 < high < 298
    assert np.isfinite(losses).all()
    assert losses[0] < 5
    assert 90 < picture_of(mim, tmp_path / "run")[:24, 4:36].mean() < 165


def test_a_stated_range_maps_twelve_bits_in_sixteen(mim, trained, tmp_path):
    def save(path, i):
        Image.fromarray((waves(1, i)[..., 0] * 4095).astype(np.uint16)).save(path.with_suffix(".png"))

    _, losses = trained(save, 1, range=[0, 4095])
    assert losses[0] < 5
    assert 90 < picture_of(mim, tmp_path / "run")[:24, 4:36].mean() < 165


def test_a_recipe_of_192_by_256_trains(mim, shards, tmp_path):
    recipe = RECIPE | {
        "data": {"path": str(shards), "image_size": [192, 256]},
        "encoder": RECIPE["encoder"] | {"patch_size": 32},
        "objective": {"name": "mae", "decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    }
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    mim("train", tmp_path / "recipe.yaml", f"train.run={tmp_path / 'run'}")
    assert picture_of(mim, tmp_path / "run").shape == (2 * (24 + 4), 4 * (32 + 4) + 4, 3)
