"""The export to timm is the module itself: read back as a user would, it differs by exactly nothing."""

import json
import socket

import conftest
import numpy as np
import pytest
import timm
import torch
from broken_export import alter, break_after_writing, shaken_run
from PIL import Image
from safetensors.torch import load_file
from timm.data import resolve_model_data_config

from mim import build
from mim.contracts import ExportError, LoadedRun
from mim.data.shards import Dataset
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
    assert found["crop_pct"] == 0.875  # of the run's evaluation view, here the default


def test_the_transform_of_timm_frames_an_image_as_the_run_evaluates_it(exported):
    loaded, folder, _ = exported()
    rows, columns = np.mgrid[:64, :96]
    pixels = np.stack([rows * 3, columns * 2, rows + columns], axis=-1).astype(np.uint8)  # (H, W, C), smooth
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    theirs = timm.data.create_transform(**resolve_model_data_config(model))(Image.fromarray(pixels))
    (view,) = loaded.views.evaluation(torch.from_numpy(pixels).permute(2, 0, 1), np.random.default_rng(0), [(32, 32)])
    ours = loaded.encoder.normalize(view[None].float() / 255)[0]
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().mean() < 0.02  # the box is cut before resizing here and after it there


USES = {
    "another size": ({"img_size": (48, 64)}, (3, 48, 64)),
    "one channel": ({"in_chans": 1}, (1, 32, 32)),
    "more channels": ({"in_chans": 5}, (5, 32, 32)),
    "another number of classes": ({"num_classes": 7}, (3, 32, 32)),
    "images of any size": ({"dynamic_img_size": True}, (3, 64, 32)),
}


@torch.no_grad()
@pytest.mark.parametrize("use", USES)
def test_what_a_user_of_timm_asks_for_works_offline(use, exported, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the network was used")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    _, folder, _ = exported(positions="sincos", num_registers=2)
    options, size = USES[use]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()
    found = model(torch.rand(2, *size))
    assert found.shape == (2, options.get("num_classes", 32))


@torch.no_grad()
def test_features_only_gives_the_maps_of_the_run(exported):
    loaded, folder, _ = exported()
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=(0, 1)).eval()
    maps = model(loaded.encoder.normalize(images()))
    for found, features in zip(maps, loaded.encoder.layers(images(), [0, 1]), strict=True):
        assert found.shape == (2, 32, 4, 4)
        assert torch.equal(found.flatten(2).transpose(1, 2), features.patches)


DENSE = {
    "swin": conftest.TINY["dense"],
    "convnext": {"model": "convnext_atto", "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}},
    "mobilevit": {"model": "mobilevit_xxs"},
    "xcit": {"model": "xcit_nano_12_p16_224", "options": {"embed_dim": 16, "depth": 1, "num_heads": 2}},
    "cait": {"model": "cait_xxs24_224", "options": {"embed_dim": 16, "depth": 1, "num_heads": 2}},
}


@torch.no_grad()
@pytest.mark.parametrize("family", DENSE)
def test_other_families_come_back_with_exactly_the_features_of_the_run(family, exported, monkeypatch):
    monkeypatch.setitem(conftest.TINY, "vit", DENSE[family])
    loaded, folder, report = exported("simmim", name="dense")
    assert report["max_difference"] == 0.0
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    normalised = loaded.encoder.normalize(images())
    assert torch.equal(model.forward_features(normalised), loaded.encoder.model.forward_features(normalised))


def test_the_tensors_of_a_compiled_encoder_have_the_names_of_timm(loaded_run, tmp_path):
    loaded = loaded_run("mae")
    loaded.encoder.vit.blocks[0].compile(backend="eager")
    target.export(loaded, tmp_path / "out", target.Config())
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert names == timm.create_model(f"local-dir:{tmp_path / 'out'}").state_dict().keys()
    assert not {name for name in names if "_orig_mod" in name or "module." in name}


def test_images_that_are_not_square_are_exported_with_their_size(recipe, shards, tmp_path):
    sections = recipe("mae")
    sections["data"]["image_size"] = [32, 48]
    built = build.build(sections, dataset=Dataset.open(shards / "train"))
    built.objective.eval().requires_grad_(False)
    loaded = LoadedRun(built.objective, built.encoder, {}, built.views, built.sections, 1, tmp_path / "run")
    assert target.export(loaded, tmp_path / "out", target.Config())["max_difference"] == 0.0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert resolve_model_data_config(model)["input_size"] == (3, 32, 48)
    assert model(torch.rand(2, 3, 32, 48)).shape == (2, 32)


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


# ---- broken exports --------------------------------------------------------------------------------


def edit(change):
    """Damage to config.json: `change` gets the parsed file."""

    def damage(folder):
        found = json.loads((folder / "config.json").read_text())
        change(found)
        (folder / "config.json").write_text(json.dumps(found))

    return damage


CONFIGS = {
    "another number of heads": (lambda c: c["model_args"].update(num_heads=4), "differs"),
    "another depth": (lambda c: c["model_args"].update(depth=1), "cannot load"),
    "another patch size": (lambda c: c["model_args"].update(patch_size=4), "pos_embed of the reloaded"),
    "a norm more": (lambda c: c["model_args"].update(pre_norm=True), "cannot load"),
    "another activation": (lambda c: c["model_args"].update(act_layer="relu"), "differs"),
    "another eps": (lambda c: (c.update(architecture="vit_base_patch16_clip_224"), c["model_args"].update(
        pre_norm=False)), "differs"),
    "another mean": (lambda c: c["pretrained_cfg"].update(mean=[0.5, 0.5, 0.5]), "differs"),
    "another std": (lambda c: c["pretrained_cfg"].update(std=[0.5, 0.5, 0.5]), "differs"),
    "another size": (lambda c: c["pretrained_cfg"].update(input_size=[3, 64, 64]), "reads the size"),
}  # fmt: skip


@pytest.mark.parametrize("fault", CONFIGS)
def test_a_wrong_config_is_caught(fault, loaded_run, tmp_path, monkeypatch):
    loaded = shaken_run(loaded_run)
    change, message = CONFIGS[fault]
    break_after_writing(monkeypatch, target, edit(change))
    with pytest.raises(ExportError, match=message):
        target.export(loaded, tmp_path / "out", target.Config())
    assert list(tmp_path.iterdir()) == []


TENSORS = {
    "altered": lambda t: t | {"blocks.0.mlp.fc2.bias": t["blocks.0.mlp.fc2.bias"] + 1e-7},
    "missing": lambda t: {n: v for n, v in t.items() if n != "cls_token"},
    "unused": lambda t: t | {"mask_token": torch.zeros(1, 1, 32)},
    "not finite": lambda t: t | {"norm.bias": t["norm.bias"] / 0},
}


@pytest.mark.parametrize("fault", TENSORS)
def test_a_tensor_that_is_not_the_runs_is_caught(fault, loaded_run, tmp_path, monkeypatch):
    loaded = shaken_run(loaded_run)
    break_after_writing(monkeypatch, target, alter("model.safetensors", TENSORS[fault]))
    with pytest.raises(ExportError, match=r"(tensor|tensors) .*model\.safetensors"):
        target.export(loaded, tmp_path / "out", target.Config())
    assert list(tmp_path.iterdir()) == []
