"""Any backbone as evaluations see a run: its features are those of timm's own module."""

import json

import pytest
import timm
import torch
from timm.models import save_for_hf

from mim.config import ConfigError
from mim.encoders import dense
from mim.evals import knn
from mim.probing import judged
from mim.probing.features import Wanted, embedder

SMALL = {"img_size": (32, 32), "num_classes": 0}
TINY_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
EXPORTS = {  # the encoder that it becomes: a timm name and the arguments of its factory
    "vit": ("vit_tiny_patch16_224", {**TINY_VIT, "init_values": 1e-5, "reg_tokens": 2, "dynamic_img_size": True}),
    "eva": ("eva02_tiny_patch14_224", {**TINY_VIT, "use_fc_norm": False, "use_post_transformer_norm": True}),
    "beit": ("beit_base_patch16_224", {**TINY_VIT, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True,
                                       "use_fc_norm": False}),
    "dense": ("swin_tiny_patch4_window7_224", {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2],
                                               "window_size": 4}),
}  # fmt: skip


def exported(folder, architecture, arguments):
    """A timm model with random weights, saved as `mim export timm` saves one; and the model."""
    torch.manual_seed(1)
    model = timm.create_model(architecture, **SMALL, **arguments).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    data = {"input_size": (3, 32, 32), "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    save_for_hf(model, str(folder), safe_serialization=True, data_config=data)
    return model


@pytest.mark.parametrize("kind", EXPORTS)
@torch.no_grad()
def test_an_exported_folder_has_the_features_of_its_module_and_its_own_pixels(tmp_path, shards, kind):
    model = exported(tmp_path / "export", *EXPORTS[kind])
    loaded = judged.load(str(tmp_path / "export"), {"path": str(shards)}, {})
    assert loaded.config["encoder"]["name"] == kind
    assert loaded.views.sizes == [(32, 32)]
    images = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1), torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)
    tokens = model.forward_features((images - mean) / std)
    tokens = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens[:, getattr(model, "num_prefix_tokens", 0) :]
    found = embedder(loaded, Wanted(pools=["tokens"]))(images)["-1/tokens"]
    assert torch.allclose(found, tokens, atol=1e-6)


def test_an_evaluation_runs_on_an_exported_folder(tmp_path, shards):
    exported(tmp_path / "export", *EXPORTS["vit"])
    loaded = judged.load(str(tmp_path / "export"), {"path": str(shards)}, {})
    assert 0 <= dict(knn.run(loaded, knn.Config(k=5)))["knn"] <= 1


def test_a_module_that_no_encoder_of_its_class_makes_is_judged_as_a_dense_one(tmp_path, shards):
    """A transformer with an option that a recipe does not have."""
    model = exported(tmp_path / "export", "vit_tiny_patch16_224", {**TINY_VIT, "no_embed_class": True})
    loaded = judged.load(str(tmp_path / "export"), {"path": str(shards)}, {})
    assert loaded.config["encoder"]["name"] == "dense"
    images = torch.rand(2, 3, 32, 32)
    features = model.forward_features((images - loaded.encoder.mean) / loaded.encoder.std)
    found = embedder(loaded, Wanted(pools=["tokens", "class"]))(images)
    assert torch.allclose(found["-1/tokens"], features[:, 1:], atol=1e-6)
    assert torch.allclose(found["-1/class"], features[:, 0], atol=1e-6)


def weights_of(loaded):
    return next(p for p in loaded.encoder.parameters() if p.ndim > 1)


def test_a_timm_name_has_random_weights_that_its_seed_decides_and_its_own_pixels(shards):
    data = {"path": str(shards), "image_size": 32}
    first, again = (judged.load("timm:test_vit.r160_in1k", data, {}) for _ in range(2))
    other = judged.load("test_vit.r160_in1k", data, {"init_seed": 1})
    assert torch.equal(weights_of(first), weights_of(again))
    assert not torch.equal(weights_of(first), weights_of(other))
    assert first.encoder.mean.flatten().tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert first.views.sizes == [(32, 32)]
    assert (first.step, first.objective.encoder) == (0, first.encoder)


def test_a_timm_name_takes_the_size_that_timm_names_and_weights_from_a_file(shards, tmp_path):
    torch.manual_seed(5)
    source = timm.create_model("test_vit", num_classes=0)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    loaded = judged.load("test_vit", {"path": str(shards)}, {"init": str(tmp_path / "weights.pth")})
    assert loaded.views.sizes == [tuple(source.pretrained_cfg["input_size"][1:])]
    assert torch.equal(loaded.encoder.vit.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_nothing_is_downloaded_unless_asked(shards, monkeypatch):
    asked = []
    monkeypatch.setattr(judged.weights, "initialize_encoder", lambda encoder, source: asked.append(source))
    judged.load("test_vit", {"path": str(shards), "image_size": 32}, {})
    assert asked == []
    with pytest.raises(AttributeError):  # it has no report
        judged.load("timm:test_vit", {"path": str(shards), "image_size": 32}, {"pretrained": True})
    assert asked == ["test_vit"]


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        (
            "vit_of_nobody",
            {},
            {},
            "vit_of_nobody is not a run directory .*, an exported folder .* or a timm name; some",
        ),
        ("{tmp}", {}, {}, "is not a run directory"),
        ("test_vit", {"image_size": 33}, {}, "test_vit cannot be judged: .*33"),
        ("test_vit", {}, {"pretrained": True, "init": "x"}, "pretrained=true and init=x both give the weights"),
        ("test_vit", {"path": None}, {}, "data.path is missing"),
        ("{export}", {}, {"init": "x"}, "init=x is for timm names"),
        ("{foreign}", {}, {}, "names no architecture of timm"),
        ("{broken}", {}, {}, "config.json is not JSON"),
    ],
)
def test_what_cannot_be_judged_is_one_sentence(tmp_path, shards, model, data, options, message):
    folders = {"export": json.dumps({"architecture": "test_vit"}), "foreign": "{}", "broken": "{"}
    for name, text in folders.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    model = model.format(tmp=tmp_path, **{name: tmp_path / name for name in folders})
    with pytest.raises(ConfigError, match=message):
        judged.load(model, {"path": str(shards), **data}, options)


def test_a_model_whose_tokens_cannot_be_replaced_can_be_judged():
    cfg = dense.Config(model="densenet121")
    with torch.device("meta"), pytest.raises(ValueError, match="masked tokens cannot be replaced"):
        dense.build(cfg, image_size=(64, 64), channels=3)
    with torch.device("meta"):
        encoder = dense.build(cfg, image_size=(64, 64), channels=3, masked=False)
        assert encoder(torch.rand(2, 3, 64, 64)).patches.shape == (2, 4, encoder.width)


# ---- a run on other images -----------------------------------------------------------------------


def test_a_run_is_judged_on_other_images_and_in_another_size(loaded_run, shards):
    loaded = loaded_run("mae")
    found = judged.on(loaded, {"path": str(shards / "train"), "val_path": str(shards / "val"), "image_size": 48})
    assert found.views.sizes == [(48, 48)]
    assert found.config["data"]["val_path"] == str(shards / "val")
    assert loaded.views.sizes == [(32, 32)]
    assert dict(knn.run(found, knn.Config(k=5)))["knn"] > 0.9
    assert judged.on(loaded, {"eval_view": {"name": "center", "crop_ratio": 1.0}}).views.sizes == [(32, 32)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"image_size": 33}, "data.image_size: image size 33x33 does not divide by the patch size 8"),
        ({"channels": 1}, "data.channels=1, but .* was trained on 3"),
        ({"imagesize": 32}, "data.imagesize is not a known key; did you mean 'image_size'"),
    ],
)
def test_other_images_that_the_run_cannot_see_are_one_sentence(loaded_run, data, message):
    with pytest.raises(ConfigError, match=message):
        judged.on(loaded_run("mae"), data)
