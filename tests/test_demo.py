"""The demo from images to table, on tiny pictures and two steps a stage."""

import json
import os
import signal
import threading
import time

import numpy as np
import pytest
from PIL import Image

from mim import demo
from mim.config import ConfigError


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAIN_CROPS", 12)
    monkeypatch.setattr(demo, "VAL_CROPS", 4)
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        pixels = np.kron(rng.integers(0, 256, (30 + 5 * i, 40, 3)), np.ones((9, 9, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"picture{i}.jpg")
    return folder


SHORT = ("optim.length=2 steps", "optim.warmup=1 steps", "train.workers=0", "optim.batch_size=4")


def test_the_demo_runs_every_stage_on_own_pictures_and_prints_one_table(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    demo.main(pictures, out, overrides=SHORT)
    printed = capsys.readouterr().out
    rows = ("raw pixels", "intensity histogram", "random init, as BEiT", "BEiT", "random init, as MAE", "MAE")
    assert all(f"  {row} " in printed for row in rows)
    results = json.loads((out / "results.json").read_text())
    assert set(results["accuracy"]) == set(rows)
    assert results["export_difference"] == {"beit": 0.0, "mae": 0.0}
    assert all(0 <= results["codes"][name] <= 1 for name in ("accuracy", "unigram_accuracy", "usage"))
    demo.main(pictures, out, overrides=SHORT)  # everything is done before: nothing is trained or exported again
    assert json.loads((out / "results.json").read_text())["accuracy"] == results["accuracy"]


def test_training_and_held_out_crops_come_from_disjoint_regions():
    columns = np.where(np.arange(300) < 210, 0, 255).astype(np.uint8) + np.zeros((200, 1), dtype=np.uint8)
    train = [np.asarray(crop) for crop in demo._crops(columns, "train", 0, 0)]
    val = [np.asarray(crop) for crop in demo._crops(columns, "val", 0, 0)]
    assert max(int(crop.max()) for crop in train) == 0
    assert min(int(crop.min()) for crop in val) == 255


def test_a_folder_without_large_images_is_refused(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "small.png")
    with pytest.raises(ConfigError, match="holds 0 images of at least 256 px"):
        demo.main(tmp_path, tmp_path / "out")


def test_the_probes_read_baselines_and_networks_from_one_pass_over_the_images(loaded_run, monkeypatch):
    """An untrained encoder that stands for a trained one probes like the one that is drawn from the same seed."""
    loaded = {name: loaded_run(name) for name in ("beit", "mae")}
    for run in loaded.values():
        run.config["optim"]["seed"] = 0
        run.views.sizes = [(16, 16)]  # the ridge of raw pixels is as wide as there are
    rows = demo._probe(loaded)
    assert rows["random init, as MAE"] == rows["MAE"]
    assert all(0 <= value <= 1 for row in rows.values() for value in (row["knn"], row["ridge"]))
    assert rows["intensity histogram"] != rows["raw pixels"]


def endless(shards, run):
    data = [f"data.path={shards / 'train'}", f"data.val_path={shards / 'val'}"]
    return ["mae_demo", *data, f"train.run={run}", "optim.length=100000 steps", "train.log_every=1 steps"]


def test_a_stop_signal_lets_the_trainings_save_and_stop(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "LANES", (("mae",),))
    run = tmp_path / "mae"

    def stop_after_the_first_step():
        deadline = time.monotonic() + 240
        while not (run / "log.jsonl").is_file() or not (run / "log.jsonl").read_text():
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_after_the_first_step, daemon=True).start()
    assert demo.Trainings({"mae": endless(shards, run)}, {}).run() == 75
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert any((run / "checkpoints").iterdir())


def test_when_one_training_fails_the_others_stop_and_its_code_is_returned(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "LANES", (("mae",), ("beit",)))
    commands = {"mae": endless(shards, tmp_path / "mae"), "beit": ["no_such_recipe"]}
    assert demo.Trainings(commands, {}).run() == 2
