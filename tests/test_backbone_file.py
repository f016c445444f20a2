"""The encoder of a finished run is one file that timm alone reads."""

import json

import pytest
import timm
import torch
from safetensors import safe_open

from mim import backbone_file, build
from mim.contracts import StorageError
from mim.pretrained.weights import backbone_of
from tests.test_train import dataset, recipe, run  # noqa: F401  (dataset is a fixture)


def opened(path):
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def read(path):
    """What a user does, with timm alone."""
    facts, tensors = opened(path)
    model = timm.create_model(facts["model"], **json.loads(facts["model_args"]))
    model.load_state_dict(tensors)
    return facts, model.eval()


def test_timm_alone_reads_the_average_of_a_run_and_computes_its_features(dataset, tmp_path):  # noqa: F811
    run(recipe(dataset, tmp_path), tmp_path / "run")
    facts, model = read(tmp_path / "run/backbone.safetensors")
    loaded = build.load_run(tmp_path / "run")
    images = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(json.loads(facts[name])).view(1, -1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        ours = torch.cat(loaded.encoder(images), dim=1)
        assert model.forward_features((images - mean) / std).equal(ours)
    assert (facts["step"], facts["weights"]) == ("7", "average of momentum 0.9")


def test_a_run_without_an_average_gives_its_last_weights(dataset, tmp_path):  # noqa: F811
    run(recipe(dataset, tmp_path, optim__ema=None), tmp_path / "run")
    facts, tensors = opened(tmp_path / "run/backbone.safetensors")
    assert facts["weights"] == "last"
    wanted = backbone_of(build.load_run(tmp_path / "run").encoder).state_dict()
    assert tensors.keys() == wanted.keys()
    assert all(tensors[name].equal(value) for name, value in wanted.items())


def test_the_file_is_written_when_the_run_is_done_and_again_where_it_is_missing(dataset, tmp_path):  # noqa: F811
    path, file = recipe(dataset, tmp_path), tmp_path / "run/backbone.safetensors"
    run(path, tmp_path / "run", stop_at=4)
    assert not file.exists()
    run(path, tmp_path / "run")
    written, (facts, tensors) = file.stat().st_mtime_ns, opened(file)
    run(path, tmp_path / "run")
    assert file.stat().st_mtime_ns == written
    file.unlink()
    run(path, tmp_path / "run")
    assert opened(file)[0] == facts
    assert all(opened(file)[1][name].equal(value) for name, value in tensors.items())


def test_a_tokenizer_run_has_no_such_file(dataset, tmp_path):  # noqa: F811
    run(recipe(dataset, tmp_path, "fsq"), tmp_path / "run")
    assert not (tmp_path / "run/backbone.safetensors").exists()


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(StorageError, match="cannot be written"):
        backbone_file.write_verified(tmp_path / "missing/b.safetensors", {"a": torch.zeros(2)}, {})


def test_a_disk_that_gives_back_other_values_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(backbone_file, "load_file", lambda path: {"a": torch.ones(2)})
    with pytest.raises(StorageError, match="gives back other values of"):
        backbone_file.write_verified(tmp_path / "b.safetensors", {"a": torch.zeros(2)}, {})
    assert list(tmp_path.iterdir()) == []
