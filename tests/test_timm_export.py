"""The export to timm is the module itself: read back as a user would, it differs by exactly nothing."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_model_data_config

from mim.config import ConfigError
from mim.exports import timm as target

VARIANTS = {
    "plain": {},
    "registers": {"num_registers": 3},
    "layer scale": {"layer_scale": 0.1},
    "sincos": {"positions": "sincos"},
    "drop path": {"drop_path_rate": 0.3},
    "pre-norm": {"model": "vit_base_patch16_clip_224"},
    "pixel statistics": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
}


OTHERS = {
    "hybrid": {"name": "vit", "model": "vit_tiny_r_s16_p8_224", "patch_size": None},
    "eva": {"name": "eva", "model": "eva02_tiny_patch14_224", "layer_scale": 0.1, "num_registers": 2},
    "learned rotary frequencies": {"name": "eva", "model": "vit_small_patch16_rope_mixed_224"},
    "dinov3": {"name": "eva", "model": "vit_small_patch16_dinov3", "qk_norm": True},
    "beit": {"name": "beit", "model": "beit_base_patch16_224"},
    "beit, a bias for each block": {"name": "beit", "model": "beitv2_base_patch16_224", "positions": "relative"},
    "beit, absolute": {"name": "beit", "model": "beit_base_patch16_224", "positions": "absolute", "layer_scale": 0.0},
}


@pytest.fixture
def exported(loaded_run, tmp_path):
    """`exported(**encoder)`: a run, the folder of its export, and the report."""

    def export(objective="mae", **encoder):
        loaded = loaded_run(objective, **encoder)
        for parameter in loaded.encoder.parameters():  # tokens and gammas start at zero or equal: make each count
            torch.nn.init.normal_(parameter, std=0.3)
        report = target.export(loaded, tmp_path / "out", target.Config(license="cc0-1.0"))
        return loaded, tmp_path / "out", report

    return export


def images(size=(32, 32), channels=3):
    return torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reloaded_model_has_exactly_the_features_of_the_run(exported, variant):
    loaded, folder, report = exported(**VARIANTS[variant])
    assert report["max_difference"] == 0.0
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    features = loaded.encoder(images())
    normalised = loaded.encoder.normalize(images())
    assert torch.equal(model.forward_features(normalised), torch.cat(list(features), dim=1))


@torch.no_grad()
@pytest.mark.parametrize("variant", OTHERS)
def test_encoders_of_other_kinds_come_back_with_exactly_the_features_of_the_run(exported, variant):
    loaded, folder, report = exported("beit", **OTHERS[variant] | {"drop_path_rate": 0.2, "weight_init": "mae"})
    assert report["max_difference"] == 0.0
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    features = loaded.encoder(images())
    assert torch.equal(model.forward_features(loaded.encoder.normalize(images())), torch.cat(features, dim=1))
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=10)(images()).shape == (2, 10)


def test_what_only_pretraining_needs_is_not_exported(exported):
    _, folder, _ = exported(drop_path_rate=0.3, weight_init="jax")
    arguments = json.loads((folder / "config.json").read_text())["model_args"]
    assert not {"drop_path_rate", "weight_init", "num_classes", "dynamic_img_size"} & arguments.keys()
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, drop_path_rate=0.1)  # the user's own
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


def test_the_data_config_of_timm_holds_size_and_statistics_of_the_run(exported):
    _, folder, _ = exported(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    found = resolve_model_data_config(timm.create_model(f"local-dir:{folder}", pretrained=True))
    assert found["input_size"] == (3, 32, 32)
    assert found["mean"] == pytest.approx((0.1, 0.2, 0.3))
    assert found["std"] == pytest.approx((0.4, 0.5, 0.6))
    assert found["crop_pct"] == 1.0


def test_statistics_of_the_data_are_exported_when_the_recipe_gives_none(exported):
    loaded, folder, _ = exported()
    found = resolve_model_data_config(timm.create_model(f"local-dir:{folder}", pretrained=True))
    assert found["mean"] == pytest.approx(loaded.encoder.mean.flatten().tolist())
    assert found["mean"] != pytest.approx((0.5, 0.5, 0.5), abs=0.02)


def test_a_new_head_can_be_trained_on_the_export(exported):
    loaded, folder, _ = exported()
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=10)
    assert model(images()).shape == (2, 10)
    assert torch.equal(model.blocks[0].attn.qkv.weight, loaded.encoder.vit.blocks[0].attn.qkv.weight)


def test_the_export_can_be_built_for_another_image_size(exported):
    _, folder, _ = exported()
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, img_size=(48, 64))
    assert model.forward_features(images((48, 64))).shape == (2, 1 + 6 * 8, 32)


def test_the_mask_token_and_the_decoder_are_not_exported(exported):
    _, folder, _ = exported()
    names = load_file(folder / "model.safetensors").keys()
    assert not {name for name in names if "mask_token" in name or "decoder" in name}


def test_a_beit_run_is_exported_the_same_way(exported):
    _, folder, report = exported("beit", layer_scale=0.1)
    assert report["max_difference"] == 0.0
    names = load_file(folder / "model.safetensors").keys()
    assert not {name for name in names if "mask_token" in name or name.startswith("head.")}


@torch.no_grad()
def test_transformers_reads_the_same_folder(exported):
    transformers = pytest.importorskip("transformers")
    loaded, folder, _ = exported(layer_scale=0.1, num_registers=2)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    normalised = loaded.encoder.normalize(images())
    assert torch.equal(model(normalised).last_hidden_state, loaded.encoder.vit.forward_features(normalised))


def test_transformers_puts_a_head_of_any_size_on_the_same_folder(exported):
    transformers = pytest.importorskip("transformers")
    _, folder, _ = exported()
    model = transformers.AutoModelForImageClassification.from_pretrained(folder, num_labels=5)
    assert model(images()).logits.shape == (2, 5)


def test_the_folder_tells_where_it_comes_from(exported):
    loaded, folder, report = exported()
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "recipe.json", "report.json",
    ]  # fmt: skip
    assert json.loads((folder / "report.json").read_text()) == report
    assert report == {
        "target": "timm",
        "run": str(loaded.path),
        "step": 7,
        "weights": "of the last step",
        "max_difference": 0.0,
    }
    assert json.loads((folder / "recipe.json").read_text())["encoder"]["width"] == 32
    assert "local-dir:" in (folder / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["license"] == "cc0-1.0"


def test_averaged_weights_are_said_to_be_averaged(loaded_run, tmp_path):
    loaded = loaded_run("mae")
    loaded.config["optim"]["ema"] = 0.99
    assert target.export(loaded, tmp_path / "out", target.Config())["weights"] == "exponential moving average"


def test_a_folder_that_holds_something_is_not_touched(loaded_run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="exists and is not empty; choose another folder"):
        target.export(loaded_run("mae"), out, target.Config())
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_file_in_the_place_of_the_folder_is_not_touched(loaded_run, tmp_path):
    (tmp_path / "out").write_text("keep")
    with pytest.raises(ConfigError, match="choose another folder"):
        target.export(loaded_run("mae"), tmp_path / "out", target.Config())
    assert (tmp_path / "out").read_text() == "keep"


def test_an_empty_folder_is_filled(loaded_run, tmp_path):
    (tmp_path / "out").mkdir()
    target.export(loaded_run("mae"), tmp_path / "out", target.Config())
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_that_differs_is_an_error_and_leaves_no_folder(loaded_run, tmp_path, monkeypatch):
    monkeypatch.setattr(target, "compare", lambda *arguments: 1e-6)
    with pytest.raises(RuntimeError, match="differs from the run by 1e-06"):
        target.export(loaded_run("mae"), tmp_path / "out", target.Config())
    assert list(tmp_path.iterdir()) == []


def test_the_folder_one_stands_in_is_not_replaced(loaded_run, tmp_path, monkeypatch):
    run = loaded_run("mae")
    monkeypatch.chdir(tmp_path)
    for out in (Path(), tmp_path):
        with pytest.raises(
            ConfigError, match=r"is the folder you are in; name another one for the export, e\.g\. .*export"
        ):
            target.export(run, out, target.Config())
    assert list(tmp_path.iterdir()) == []


def test_a_relative_folder_is_made_with_its_parents(loaded_run, tmp_path, monkeypatch):
    run = loaded_run("mae")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    target.export(run, Path("../a/b"), target.Config())
    assert (tmp_path / "a" / "b" / "model.safetensors").is_file()


def test_a_difference_is_noticed(loaded_run, tmp_path):
    loaded = loaded_run("mae")
    target.export(loaded, tmp_path / "out", target.Config())
    with torch.no_grad():
        loaded.encoder.vit.norm.bias += 1e-3
    assert target.compare(loaded.encoder.vit, tmp_path / "out", (3, 32, 32)) == pytest.approx(1e-3, rel=0.01)
