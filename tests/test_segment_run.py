"""Runs of segmentation: bit-exact resume, one and two processes, from an encoder of ours, and classes from the data."""

import json

import pytest
import torch

from mim import build
from mim.config import ConfigError, to_yaml
from mim.data.shards import Dataset
from mim.evals import miou
from tests.test_distributed import torchrun
from tests.test_train import lines, run, tensors

ENCODER = {"name": "vit", "model": "vit_tiny_patch16_224", "width": 24, "depth": 2, "num_heads": 2, "patch_size": 8}


@pytest.fixture
def written(drawn_shapes, tmp_path):
    """`written(**objective)`: the path of a tiny recipe, whose 5 images a step do not divide by 2 ranks."""

    def write(drop=0.0, **objective):
        views = {"view": {"name": "segment_crop"}, "eval_view": {"name": "segment_whole"}}
        sections = {
            "data": {"path": str(drawn_shapes), "image_size": 32, **views},
            "encoder": {**ENCODER, "drop_path_rate": drop},
            "objective": {"name": "segment", "channels": 16, "auxiliary_channels": 8, "dropout": drop, **objective},
            "optim": {"batch_size": 5, "length": "4 steps", "warmup": "1 steps", "lr": 1e-3, "layer_decay": 0.8},
            "train": {"log_every": "1 steps", "save_every": "2 steps", "workers": 0, "cpu": True},
            "evals": {"miou": {"every": "4 steps", "batch_size": 2}},
        }
        path = tmp_path / "segment.yaml"
        path.write_text(to_yaml(sections))
        return str(path)

    return write


def test_a_stopped_run_goes_on_bit_for_bit_with_its_running_statistics(written, tmp_path):
    path = written(drop=0.2, norm="batch")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(path, whole, "optim.ema=0.9")
    run(path, broken, "optim.ema=0.9", stop_at=2)
    run(path, broken, "optim.ema=0.9")
    one, other = tensors(whole), tensors(broken)
    assert any(name.endswith("running_mean") for name in one)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    told = [[{k: v for k, v in line.items() if k != "segmentation"} for line in lines(x)] for x in (whole, broken)]
    assert told[0] == told[1]  # but for the path of the picture


def test_two_processes_train_and_judge_as_one_also_with_batch_norm(written, tmp_path):
    path = written(norm="batch")
    run(path, tmp_path / "one")
    launched = torchrun(path, tmp_path / "two")
    assert launched.returncode == 0, launched.stderr
    one, two = ([e for e in lines(tmp_path / name) if e["event"] == "train"] for name in ("one", "two"))
    for name in ("loss", "auxiliary_loss", "pixel_accuracy", "grad_norm"):
        assert [entry[name] for entry in two] == pytest.approx([entry[name] for entry in one], abs=1e-4), name
    (logged,) = [e for e in lines(tmp_path / "two") if e["event"] == "eval"]
    alone = dict(miou.run(build.load_run(tmp_path / "two"), miou.Config(batch_size=2)))
    numbers = {key: value for key, value in alone.items() if isinstance(value, float)}
    assert {key: logged[key] for key in numbers} == numbers
    assert launched.stderr.count("background") == 1  # the table is told once


def test_the_classes_come_from_the_data_and_are_kept_with_the_run(written, tmp_path):
    run(written(), tmp_path / "run")
    loaded = build.load_run(tmp_path / "run")
    assert loaded.config["objective"]["num_classes"] == loaded.objective.num_classes == 5


def test_an_encoder_of_a_pretraining_run_is_where_it_starts(written, recipe, tmp_path):
    sections = recipe("mae")
    sections["encoder"] = ENCODER
    sections["train"] = {"workers": 0, "cpu": True, "save_every": "1 steps"}
    (tmp_path / "mae.yaml").write_text(to_yaml(sections))
    run(str(tmp_path / "mae.yaml"), tmp_path / "mae")
    run(written(), tmp_path / "run", f"encoder.init={tmp_path / 'mae'}", "optim.lr=0", "optim.weight_decay=0")
    given, found = tensors(tmp_path / "mae"), tensors(tmp_path / "run")
    names = [name for name in found if name.startswith("model.encoder.")]
    assert names
    assert all(torch.equal(given[name], found[name]) for name in names)
    report = json.loads((tmp_path / "run/init.json").read_text())
    assert any(name.startswith("mae.") for name in report["unused"])


def test_a_stated_number_of_classes_that_the_data_contradict_is_refused(recipe, drawn_shapes):
    sections = recipe("segment")
    sections["objective"]["num_classes"] = 4
    with pytest.raises(ConfigError, match=r"objective\.num_classes=4, but .* has 5; set objective\.num_classes=5"):
        build.build(sections, dataset=Dataset.open(drawn_shapes / "train"))


def test_data_without_label_maps_say_how_to_get_them(recipe, shards):
    sections = recipe("segment")
    with pytest.raises(
        ConfigError, match="has no label maps; make its shards with `mim shards make IMAGES OUT --masks"
    ):
        build.build(sections, dataset=Dataset.open(shards / "train"))


def test_a_view_without_label_maps_is_refused(recipe, drawn_shapes):
    sections = recipe("segment")
    sections["data"]["view"] = {"name": "crop"}
    with pytest.raises(ConfigError, match=r"data\.view\.name=crop shows no label maps"):
        build.build(sections, dataset=Dataset.open(drawn_shapes / "train"))
