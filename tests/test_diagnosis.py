"""`mim bench data`: what it concludes from its figures, and that it measures what a loader does."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mim.data.augment import center
from mim.data.decode import decode
from mim.data.diagnosis import Diagnosis, Resized, _shrink, measure
from mim.data.make import make
from mim.data.mixture import order_of
from mim.data.shards import Dataset
from mim.data.stages import STAGES

FOUND = Diagnosis(
    dataset="shards/x",
    num_images=1000,
    num_shards=10,
    image_bytes=100e3,
    seconds={"read": 1e-4, "decode": 6e-4, "augment": 2e-4, "collate": 1e-4},  # 1000 images/s
    to_device=1e-5,
    device="cpu",
    workers=2,
    cpus=4,
    delivered=1900.0,
    resized=Resized(256, 2.0),
)


def change(**values):
    return dataclasses.replace(FOUND, **values)


def mask_quarter(rng):
    return rng.permutation(12) < 3


def write_dataset(root, side, count=12):
    rng = np.random.default_rng(0)
    (root / "in").mkdir()
    for i in range(count):
        pixels = np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((side // 8, side // 8, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(root / "in" / f"{i}.jpg")
    make(root / "in", root / "out", shard_size=5, workers=1)
    return Dataset.open(root / "out")


def measured(dataset, workers=0, size=32):
    return measure(
        dataset,
        order=order_of(dataset, seed=0),
        view=center,
        sizes=[(size, size)],
        mask=mask_quarter,
        channels=3,
        batch_size=4,
        workers=workers,
        device=torch.device("cpu"),
        seconds=0.05,
    )


def test_the_largest_stage_bounds_unless_the_main_process_is_slower_than_all_workers():
    assert FOUND.one_worker == pytest.approx(1000)
    assert FOUND.expected == pytest.approx(2000)
    assert FOUND.bound == "decode"
    assert change(to_device=1 / 1500).bound == "to device"
    assert change(to_device=1 / 1500, workers=1).bound == "decode"


def test_advice_names_workers_and_pre_resized_shards_with_their_numbers():
    workers, resized = FOUND.advice()
    assert workers == "2 of 4 allowed CPUs render: set train.workers=4, for up to 4000 images/s"
    assert "images of 256 pixels on their short side render 2.0x as fast" in resized
    assert resized.endswith("would let a worker make 1667 images/s")  # 1 ms - half of 0.8 ms


def test_resizing_that_brings_little_is_not_advised():
    for resized in (None, Resized(256, 1.1)):
        assert not [line for line in change(resized=resized).advice() if "short side" in line]


def test_slow_reading_of_small_shards_advises_fewer_of_them():
    slow = change(seconds=FOUND.seconds | {"read": 1e-2}, resized=None, num_shards=500)
    assert slow.bound == "read"
    assert slow.advice()[1] == "a shard holds 0.2 MB: 1 instead of 500 would be read in longer runs"
    assert "local disk" in change(seconds=FOUND.seconds | {"read": 1e-2}, resized=None, num_shards=1).advice()[1]


def test_the_report_tells_every_stage_and_json_has_the_same_figures():
    text, found = FOUND.text(), json.loads(json.dumps(FOUND.json()))
    for stage in (*STAGES, "one worker", "to device", "loader"):
        assert f"\n{stage} " in text
    assert "bound: decode" in text
    assert found["images_per_s"]["decode"] == pytest.approx(1667, abs=1)
    assert found["bound"] == "decode"
    assert found["advice"] == FOUND.advice()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_real_loader_is_measured_by_stage(tmp_path, workers):
    found = measured(write_dataset(tmp_path, 64), workers)
    assert set(found.seconds) == set(STAGES)
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert found.delivered > 0
    assert (found.num_images, found.num_shards, found.workers) == (12, 3, workers)
    assert found.image_bytes == pytest.approx(
        np.mean([file.stat().st_size for file in (tmp_path / "in").iterdir()]), rel=0.01
    )


def test_resizing_is_tried_only_where_images_are_larger_than_the_crop_needs(tmp_path):
    dataset = write_dataset(tmp_path, 128)
    assert measured(dataset, size=32).resized.short == 37
    assert measured(dataset, size=128).resized is None


def test_a_shrunken_image_has_the_asked_short_side_and_the_same_content(tmp_path):
    dataset = write_dataset(tmp_path, 128, count=1)
    data = dataset.read(0, 0).image
    smaller = decode(_shrink(data, 64, 3))
    assert smaller.shape == (3, 64, 64)
    assert smaller.float().mean() == pytest.approx(decode(data).float().mean(), abs=2)
    assert _shrink(data, 128, 3) is None
    assert _shrink(b"no image", 16, 3) is None
