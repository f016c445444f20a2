"""ONNX Runtime gives the tokens of the run, from pixels, at any batch size; what is damaged is caught."""

import shutil

import numpy as np
import pytest
import torch
from broken_export import break_after_writing, shaken_run

from mim.config import ConfigError
from mim.contracts import ExportError
from mim.exports import onnx as target
from mim.handover import inference

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
KINDS = {
    "registers, layer scale": ({"num_registers": 2, "layer_scale": 0.1}, (48, 64)),
    "beit": ({"name": "beit", "model": "beit_base_patch16_224"}, (32, 32)),
}


def images(size=(32, 32), rows=4):
    return torch.rand(rows, 3, *size, generator=torch.Generator().manual_seed(3))


def run_file(file, pixels):
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {"images": pixels.numpy()})
    return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """The model.onnx of the shaken tiny MAE run, which tests that damage it copy."""
    return tmp_path_factory.mktemp("onnx") / "model.onnx"


@pytest.fixture
def exported(loaded_run, tmp_path, model_file, monkeypatch):
    """`exported(damage)`: export the run; tracing happens once for all tests, everything else each time."""

    def export(damage=None):
        torch.manual_seed(0)
        loaded = shaken_run(loaded_run)
        if model_file.exists():
            monkeypatch.setattr(target, "write", lambda network, images, file, *a, **o: shutil.copy(model_file, file))
        if damage is not None:
            break_after_writing(monkeypatch, target, damage)
        report = target.export(loaded, tmp_path / "out", target.Config())
        if not model_file.exists():
            shutil.copy(tmp_path / "out" / "model.onnx", model_file)
        return loaded, tmp_path / "out", report

    return export


def test_pixels_in_zero_to_one_give_the_tokens_of_the_run_at_any_batch_size(exported):
    loaded, folder, report = exported()
    assert report["max_difference"] <= report["tolerance"] == 1e-4
    for rows in (1, 4):
        found = run_file(folder / "model.onnx", images(rows=rows))
        features = loaded.encoder(images(rows=rows))
        assert list(found) == ["prefix", "patches", "pooled"]
        assert torch.allclose(found["prefix"], features.prefix, atol=1e-4)
        assert torch.allclose(found["patches"], features.patches, atol=1e-4)
        assert torch.allclose(found["pooled"], features.patches.mean(dim=1), atol=1e-4)


def test_the_file_names_its_batch_dimension_and_tells_where_it_comes_from(exported):
    _, folder, report = exported()
    model = onnx.load(folder / "model.onnx")
    (given,) = model.graph.input
    assert [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim] == ["batch", 3, 32, 32]
    assert "in [0, 1]" in {p.key: p.value for p in model.metadata_props}["input"]
    assert "onnxruntime" in report["versions"]
    assert "normalisation is INSIDE" in (folder / "README.md").read_text()


def test_the_file_holds_no_paths_of_this_machine_and_resamples_nothing(exported):
    _, folder, _ = exported()
    assert b"site-packages" not in (folder / "model.onnx").read_bytes()
    assert "Resize" not in {node.op_type for node in onnx.load(folder / "model.onnx").graph.node}


def rewrite(change):
    """Damage to the model: `change(graph, initializers by name)`."""

    def damage(folder):
        model = onnx.load(folder / "model.onnx")
        change(model.graph, {i.name: i for i in model.graph.initializer})
        onnx.save(model, folder / "model.onnx")

    return damage


def altered(graph, initializers):
    found = next(i for name, i in initializers.items() if name.endswith("mlp.fc2.weight") or "fc2" in name)
    value = onnx.numpy_helper.to_array(found).copy()
    value.flat[0] += np.float32(1e-6)
    found.CopyFrom(onnx.numpy_helper.from_array(value, found.name))


def wrong_mean(graph, initializers):
    found = next(i for i in initializers.values() if list(i.dims) == [1, 3, 1, 1])
    found.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(found) + np.float32(0.1), found.name))


def wrong_eps(graph, initializers):
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = 1e-1


def one_more(graph, initializers):
    graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(3, np.float32), "nobody"))


def one_output_less(graph, initializers):
    del graph.output[0]


FAULTS = {
    altered: "weight .* is not that of the run",
    wrong_mean: "differs from",
    wrong_eps: "differs from",
    one_more: "tensors are unused in model.onnx: nobody",
    one_output_less: "missing from model.onnx: prefix",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_caught(fault, exported, tmp_path):
    with pytest.raises(ExportError, match=FAULTS[fault]):
        exported(rewrite(fault))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_model_is_caught(exported):
    with pytest.raises(ExportError, match=r"checker of ONNX refuses model\.onnx"):
        exported(lambda folder: (folder / "model.onnx").write_bytes(b"\x00\x01"))


@pytest.mark.parametrize("kind", ["beit", pytest.param("registers, layer scale", marks=pytest.mark.slow)])
def test_other_encoders_are_exported_too_at_the_size_that_is_asked_for(kind, loaded_run, tmp_path):
    encoder, size = KINDS[kind]
    loaded = shaken_run(loaded_run, "beit", **encoder)
    target.export(loaded, tmp_path / "out", target.Config(pool="class", image_size=list(size)))
    found = run_file(tmp_path / "out" / "model.onnx", images(size, rows=2))
    assert torch.allclose(found["pooled"], loaded.encoder(images(size, rows=2)).prefix[:, 0], atol=1e-4)


def test_a_missing_library_is_told_with_its_extra(loaded_run, tmp_path, monkeypatch):
    monkeypatch.setattr("mim.handover.export_folder._installed", lambda name: name != "onnxscript")
    with pytest.raises(ConfigError, match=r"needs onnxscript; install it: pip install 'mimstream\[onnx\]'"):
        target.export(loaded_run("mae"), tmp_path / "out", target.Config())


# ---- the function that is exported ---------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "encoder",
    [{}, {"positions": "sincos", "num_registers": 2}, {"name": "eva", "model": "eva02_tiny_patch14_224"}],
    ids=["vit", "registers", "eva"],
)
def test_the_network_of_a_fixed_size_is_the_encoder_at_that_size(encoder, loaded_run):
    loaded = shaken_run(loaded_run, **encoder)
    for size in ((32, 32), (48, 64)):
        network = inference.inference(loaded, size=size, pool="mean")
        found, features = network(images(size)), loaded.encoder(images(size))
        assert torch.equal(found["prefix"], features.prefix)
        assert torch.equal(found["patches"], features.patches)


def test_an_encoder_of_one_size_refuses_another(loaded_run, tmp_path):
    loaded = loaded_run("beit", **KINDS["beit"][0])
    with pytest.raises(ConfigError, match=r"images of 48x48, but .* encoder\.name=beit are for 32x32"):
        target.export(loaded, tmp_path / "out", target.Config(image_size=48))


def test_an_unknown_pool_is_refused(loaded_run, tmp_path):
    with pytest.raises(ConfigError, match="pool='max' is unknown; choose mean or class"):
        target.export(loaded_run("mae"), tmp_path / "out", target.Config(pool="max"))
