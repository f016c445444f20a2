"""The program of torch.export gives the tokens of the run, from pixels; there is no pickle in it."""

import json
import pickle
import shutil
import zipfile

import pytest
import torch
from broken_export import break_after_writing, shaken_run

from mim.config import ConfigError
from mim.contracts import ExportError
from mim.exports import torch as target


def images(size=(32, 32), rows=4):
    return torch.rand(rows, 3, *size, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """The model.pt2 of the shaken tiny MAE run, which tests that damage it copy."""
    return tmp_path_factory.mktemp("torch") / "model.pt2"


@pytest.fixture
def exported(loaded_run, tmp_path, model_file, monkeypatch):
    """`exported(damage)`: export the run; tracing happens once for all tests, everything else each time."""

    def export(damage=None):
        torch.manual_seed(0)
        loaded = shaken_run(loaded_run)
        if model_file.exists():
            monkeypatch.setattr(target, "write", lambda network, images, file: shutil.copy(model_file, file))
        if damage is not None:
            break_after_writing(monkeypatch, target, damage)
        report = target.export(loaded, tmp_path / "out", target.Config())
        if not model_file.exists():
            shutil.copy(tmp_path / "out" / "model.pt2", model_file)
        return loaded, tmp_path / "out", report

    return export


@torch.no_grad()
def test_the_loaded_program_gives_the_tokens_of_the_run_at_any_batch_size(exported):
    loaded, folder, report = exported()
    assert report["max_difference"] <= report["tolerance"] == 1e-6
    program = torch.export.load(folder / "model.pt2").module()
    for rows in (1, 4):
        found, features = program(images(rows=rows)), loaded.encoder(images(rows=rows))
        assert torch.allclose(found["prefix"], features.prefix, atol=1e-6)
        assert torch.allclose(found["patches"], features.patches, atol=1e-6)
        assert torch.allclose(found["pooled"], features.patches.mean(dim=1), atol=1e-6)


def test_nothing_is_unpickled_when_it_is_loaded_and_only_torchs_own_operators_are_in_it(exported, monkeypatch):
    _, folder, _ = exported()

    def refuse(*arguments, **options):
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch._C, "_pickle_load_obj", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    program = torch.export.load(folder / "model.pt2")
    called = {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert called <= {"aten", "<built-in function getitem>", "<built-in function mul>"}


def test_the_archive_holds_no_pickle_and_no_paths_of_this_machine(exported):
    _, folder, _ = exported()
    assert target.pickles(folder / "model.pt2") == []
    with zipfile.ZipFile(folder / "model.pt2") as archive:
        assert not [name for name in archive.namelist() if b"site-packages" in archive.read(name)]


def test_a_pickle_in_the_archive_is_found(tmp_path):
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "usual.pt2")
    assert [name.rpartition("/")[2] for name in target.pickles(tmp_path / "usual.pt2")] == ["model.pt"]


def repacked(change):
    """Damage to the archive: `change(name, content)` returns other content."""

    def damage(folder):
        file = folder / "model.pt2"
        with zipfile.ZipFile(file) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, content in parts.items():
                archive.writestr(name, change(name, content))

    return damage


def altered(name, content):
    return content[:-1] + bytes([content[-1] ^ 1]) if name.endswith("weights/weight_2") else content


def wrong_eps(name, content):
    return content.replace(b'"as_float": 1e-06', b'"as_float": 0.1') if name.endswith("model.json") else content


def wrong_mean(name, content):
    return b"\x00" * len(content) if "constants/tensor_0" in name else content


def no_graph(name, content):
    return json.dumps({}).encode() if name.endswith("model.json") else content


FAULTS = {
    altered: "is not that of the run",
    wrong_eps: "differs from",
    wrong_mean: "differs from",
    no_graph: "torch cannot load model.pt2",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_program_is_caught(fault, exported, tmp_path):
    with pytest.raises(ExportError, match=FAULTS[fault]):
        exported(repacked(fault))
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_positions_are_resampled_to_the_size_that_is_asked_for(loaded_run, tmp_path):
    loaded = shaken_run(loaded_run)
    report = target.export(loaded, tmp_path / "out", target.Config(image_size=[48, 64], pool="class"))
    assert report["image_size"] == [48, 64]
    assert report["outputs"] == {"prefix": [1, 32], "patches": [48, 32], "pooled": [32]}
    found = torch.export.load(tmp_path / "out" / "model.pt2").module()(images((48, 64)))
    assert torch.allclose(found["pooled"], loaded.encoder(images((48, 64))).prefix[:, 0], atol=1e-6)


def test_a_size_that_patches_do_not_fill_is_refused(loaded_run, tmp_path):
    with pytest.raises(ConfigError, match="50"):
        target.export(loaded_run("mae"), tmp_path / "out", target.Config(image_size=50))
