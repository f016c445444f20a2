"""A classify run goes to timm with its head: the logits of the export are those of the objective."""

import json

import conftest
import pytest
import timm
import torch
from broken_export import alter, break_after_writing
from timm.data import resolve_model_data_config

from mim.config import ConfigError
from mim.contracts import ExportError
from mim.exports import timm as target
from mim.handover import inference
from mim.objectives import classify

ENCODERS = {
    "vit": {},
    "eva": {"name": "eva", "model": "eva02_tiny_patch14_224"},
    "beit": {"name": "beit", "model": "beit_base_patch16_224"},
}
CONVNEXT = {"model": "convnext_atto", "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}}
HEADS = {
    "mean": {"pool": "mean"},
    "class": {"pool": "class"},
    "probe of the mean": {"pool": "mean", "frozen": True},
    "probe of the class token": {"pool": "class", "frozen": True},
}


@pytest.fixture
def classify_run(recipe, loaded_run, monkeypatch):
    """`classify_run(objective, **encoder)`: a classifier whose every parameter and statistic counts."""

    def load(objective=None, **encoder):
        monkeypatch.setitem(conftest.TINY, "classify", {"num_classes": 3, **(objective or {})})
        loaded = loaded_run("classify", **encoder)
        generator = torch.Generator().manual_seed(0)
        for tensor in loaded.objective.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        for name, buffer in loaded.objective.named_buffers():
            if name.endswith("running_var"):
                buffer.abs_().add_(0.1)
        return loaded

    return load


def distilled_run(classify_run):
    """A run whose objective has two heads, as distillation trains them."""
    loaded = classify_run({"pool": "class"}, num_registers=1)
    cfg = classify.Config(num_classes=3, pool="class", head_std=0.3, distill=classify.Distill("soft"))
    loaded.objective = classify.build(loaded.encoder, cfg).eval().requires_grad_(False)
    return loaded


def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_logits_of_the_export_are_those_of_the_run(encoder, head, classify_run, tmp_path):
    loaded = classify_run(HEADS[head], **ENCODERS[encoder])
    report = target.export(loaded, tmp_path / "out", target.Config())
    assert report["max_difference"] <= report["tolerance"] == (1e-5 if "probe" in head else 0.0)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert model.num_classes == 3
    logits = loaded.objective.logits({"images": images()})
    assert torch.allclose(model(loaded.encoder.normalize(images())), logits, atol=1e-5)


def test_the_head_can_be_left_out(classify_run, tmp_path):
    loaded = classify_run()
    report = target.export(loaded, tmp_path / "out", target.Config(head=False))
    assert report["max_difference"] == 0.0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert model.num_classes == 0
    assert torch.equal(model.norm.weight, loaded.encoder.vit.norm.weight)


def test_another_head_can_be_put_in_its_place(classify_run, tmp_path):
    target.export(classify_run(), tmp_path / "out", target.Config())
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=7)
    assert model(images()).shape == (4, 7)
    assert resolve_model_data_config(model)["input_size"] == (3, 32, 32)


def test_a_head_that_a_family_of_timm_has_no_place_for_is_refused_with_the_way_out(classify_run, tmp_path, monkeypatch):
    monkeypatch.setitem(conftest.TINY, "vit", CONVNEXT)
    with pytest.raises(ConfigError, match=r"timm's ConvNeXt has another kind of head .* with head=false"):
        target.export(classify_run(name="dense"), tmp_path / "out", target.Config())
    assert target.export(classify_run(name="dense"), tmp_path / "out", target.Config(head=False))["max_difference"] == 0


def test_two_heads_whose_softmaxes_are_averaged_are_refused_with_the_way_out(classify_run, tmp_path):
    distilled = distilled_run(classify_run)
    with pytest.raises(ConfigError, match=r"two heads, objective\.distill their softmaxes; .* with head=false"):
        target.export(distilled, tmp_path / "out", target.Config())
    assert list(tmp_path.iterdir()) == []


FAULTS = {
    "a head that is another": lambda t: t | {"head.weight": t["head.weight"] + 1e-6},
    "a head that is missing": lambda t: {name: v for name, v in t.items() if name != "head.bias"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_head_is_caught(fault, classify_run, tmp_path, monkeypatch):
    break_after_writing(monkeypatch, target, alter("model.safetensors", FAULTS[fault]))
    with pytest.raises(ExportError, match="head"):
        target.export(classify_run(), tmp_path / "out", target.Config())


def test_a_wrong_pool_is_caught(classify_run, tmp_path, monkeypatch):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        config["model_args"] |= {"global_pool": "token", "fc_norm": True}
        (folder / "config.json").write_text(json.dumps(config))

    break_after_writing(monkeypatch, target, damage)
    with pytest.raises(ExportError, match="differs from"):
        target.export(classify_run(), tmp_path / "out", target.Config())


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_onnx_and_torch_get_the_logits_of_the_objective(head, classify_run):
    loaded = classify_run(HEADS[head])
    found = inference.inference(loaded, size=(32, 32), pool="mean")(images())
    assert torch.allclose(found["logits"], loaded.objective.logits({"images": images()}), atol=1e-6)
    expected = inference.expected(loaded, images(), pool="mean")
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


@torch.no_grad()
def test_the_two_heads_of_a_distilled_classifier_go_to_onnx_and_torch(classify_run):
    loaded = distilled_run(classify_run)
    found = inference.inference(loaded, size=(32, 32), pool="class")(images())
    assert torch.allclose(found["logits"], loaded.objective.logits({"images": images()}), atol=1e-6)
