"""The export to transformers: each class computes what the run computes, and what it cannot compute is refused."""

import json
import socket

import numpy as np
import pytest
import torch
from broken_export import alter, break_after_writing
from conftest import shaken
from PIL import Image
from safetensors.torch import load_file

from mim import build
from mim.config import ConfigError
from mim.contracts import ExportError, LoadedRun
from mim.exports import transformers as target
from mim.handover import export_folder, hf_layouts
from mim.pretrained import weights

pytest.importorskip("transformers")
import transformers

BEIT = {"name": "beit", "model": "beit_base_patch16_224"}
DINOV2_GIANT = {"model": "vit_giant_patch14_dinov2", "width": 48, "num_heads": 3}
EXACT = {  # kind -> encoders that it represents to the last bit, or nearly
    "dinov2": {
        "layer scale": {"layer_scale": 0.1},
        "none": {},
        "sincos": {"positions": "sincos", "layer_scale": 0.1},
        "a gated MLP": DINOV2_GIANT,
        "drop path": {"layer_scale": 0.1, "drop_path_rate": 0.3},
    },
    "dinov2_with_registers": {
        "layer scale": {"num_registers": 3, "layer_scale": 0.1},
        "none": {"num_registers": 1},
        "no positions of the prefix": {"model": "vit_small_patch14_reg4_dinov2", "layer_scale": 0.1},
    },
    "vit": {
        "plain": {},
        "sincos": {"positions": "sincos"},
    },
    "beit": {
        "shared relative": BEIT,
        "relative": {**BEIT, "positions": "relative", "layer_scale": 1e-5},
        "absolute, no layer scale": {**BEIT, "positions": "absolute", "layer_scale": 0.0},
    },
    "timm_wrapper": {
        "registers": {"num_registers": 2, "layer_scale": 0.1},
        "pre-norm": {"model": "vit_base_patch16_clip_224"},
        "qk-norm": {"qk_norm": True},
        "rotary": {"name": "eva", "model": "eva02_tiny_patch14_224"},
        "beit": BEIT,
    },
}
SWIN = {
    "name": "dense",
    "model": "swin_tiny_patch4_window7_224",
    "options": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
}
CASES = [(kind, name) for kind, variants in EXACT.items() for name in variants]
CLASSES = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "vit": "ViTModel",
    "beit": "BeitModel",
    "timm_wrapper": "TimmWrapperModel",
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test reaches for the network."""

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def a_run(recipe, tmp_path):
    """`a_run(objective, data, settings, **encoder)`: an untrained run of no data whose every parameter counts."""

    def build_run(objective="mae", data=None, settings=None, **encoder):
        sections = recipe(objective)
        sections["data"].update(data or {})
        sections["objective"].update(settings or {})
        dense = encoder.get("name") == "dense"  # which shares no option with the recipe's ViT
        sections["encoder"] = encoder if dense else {**sections["encoder"], **encoder}
        torch.manual_seed(0)
        built = build.build(sections)
        shaken(built.objective).requires_grad_(False)
        for name, buffer in built.objective.named_buffers():  # of a linear probe's norm
            if "running" in name:
                buffer.uniform_(0.5, 2)
        return LoadedRun(built.objective, built.encoder, built.frozen, built.views, built.sections, 7, tmp_path / "run")

    return build_run


@pytest.fixture
def exported(a_run, tmp_path):
    """`exported(kind, **encoder)`: a run, the folder of its export, and the report."""

    def export(kind="auto", *, objective=None, data=None, settings=None, pool="class", head=True, **encoder):
        objective = objective or ("simmim" if encoder.get("name") in ("beit", "dense") else "mae")
        loaded = a_run(objective, data, settings, **encoder)
        report = target.export(loaded, tmp_path / "out", target.Config(kind=kind, pool=pool, head=head))
        return loaded, tmp_path / "out", report

    return export


def images(size=(32, 32), channels=3):
    return torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(3))


def tokens(loaded, pixels):
    return torch.cat(loaded.encoder(pixels), dim=1)


def opened(folder, **options):
    return transformers.AutoModel.from_pretrained(folder, local_files_only=True, **options).eval()


def kind_options(kind):
    return {"add_pooling_layer": False} if kind == "vit" else {}


# ---- the same features ---------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_the_class_of_transformers_has_the_tokens_of_the_run(exported, kind, variant):
    loaded, folder, report = exported(kind, **EXACT[kind][variant])
    assert report["max_difference"] <= report["tolerance"] == 1e-6
    model = opened(folder, **kind_options(kind))
    assert type(model).__name__ == CLASSES[kind] == report["architecture"]
    theirs = model(loaded.encoder.normalize(images())).last_hidden_state
    assert (theirs - tokens(loaded, images())).abs().max() <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "auto"])
def test_layer_scale_is_folded_into_the_weights_of_a_class_without_it(exported, kind):
    """Images that are not square leave auto this class alone."""
    size = {} if kind == "vit" else {"image_size": [32, 48]}
    loaded, folder, report = exported(kind, layer_scale=0.1, data=size)
    assert (report["kind"], report["tolerance"]) == ("vit", 1e-5)
    assert report["max_difference"] <= 1e-5
    model = opened(folder, add_pooling_layer=False)
    pixels = images(loaded.views.sizes[0])
    theirs = model(loaded.encoder.normalize(pixels)).last_hidden_state
    assert (theirs - tokens(loaded, pixels)).abs().max() <= 1e-5
    assert not [name for name in load_file(folder / "model.safetensors") if "scale" in name or "pooler" in name]


@torch.no_grad()
def test_beit_may_pool_as_its_fine_tuning_does(exported):
    loaded, folder, report = exported("beit", pool="mean", **BEIT, layer_scale=0.1)
    assert report["max_difference"] <= 1e-6
    found = opened(folder)(loaded.encoder.normalize(images()))
    raw = loaded.encoder.layers(images(), [-1])[0].patches
    assert (found.pooler_output - loaded.encoder.final_norm(raw.mean(dim=1))).abs().max() <= 1e-6
    assert (loaded.encoder.final_norm(found.last_hidden_state) - tokens(loaded, images())).abs().max() <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "beit"])
def test_the_pooled_output_is_the_class_token(exported, kind):
    loaded, folder, _ = exported(kind, **next(iter(EXACT[kind].values())))
    found = opened(folder)(loaded.encoder.normalize(images())).pooler_output
    assert (found - loaded.encoder(images()).prefix[:, 0]).abs().max() <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers"])
def test_the_backbone_class_gives_the_maps_of_every_block(exported, kind):
    """What detectors and segmenters of transformers are built on."""
    loaded, folder, _ = exported(kind, layer_scale=0.1, num_registers=3 if "registers" in kind else 0)
    backbone = getattr(transformers, CLASSES[kind].replace("Model", "Backbone"))
    model = backbone.from_pretrained(folder, local_files_only=True, out_indices=[1, 2]).eval()
    maps = model(loaded.encoder.normalize(images())).feature_maps  # (B, D, h, w) each
    ours = loaded.encoder.layers(images(), [0, 1], norm=True)
    for theirs, features in zip(maps, ours, strict=True):
        assert (theirs.flatten(2).transpose(1, 2) - features.patches).abs().max() <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize(("kind", "encoder"), [("dinov2", {"layer_scale": 0.1}), ("vit", {}), ("timm_wrapper", {})])
def test_images_of_any_number_of_channels(exported, kind, encoder, channels):
    statistics = {"mean": [0.4] * channels, "std": [0.2] * channels}
    loaded, folder, report = exported(kind, data={"channels": channels}, **encoder, **statistics)
    assert report["max_difference"] <= 1e-6
    pixels = images(channels=channels)
    theirs = opened(folder, **kind_options(kind))(loaded.encoder.normalize(pixels)).last_hidden_state
    assert (theirs - tokens(loaded, pixels)).abs().max() <= 1e-6


@torch.no_grad()
def test_a_pyramid_goes_into_the_wrapper(exported):
    loaded, folder, report = exported("auto", **SWIN)
    assert report["kind"] == "timm_wrapper"
    normalised = loaded.encoder.normalize(images())
    assert torch.equal(opened(folder)(normalised).last_hidden_state, loaded.encoder.model.forward_features(normalised))


@torch.no_grad()
def test_registers_are_given_the_resampled_positions_of_the_run_at_another_size(exported):
    loaded, folder, _ = exported("dinov2_with_registers", num_registers=2)
    pixels = images((48, 48))
    theirs = opened(folder)(loaded.encoder.normalize(pixels)).last_hidden_state
    assert (theirs - tokens(loaded, pixels)).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("kind", "options"), [("dinov2", {}), ("vit", {"interpolate_pos_encoding": True})])
def test_positions_of_another_size_are_near_those_of_the_run(exported, kind, options):
    """transformers resamples them with another cubic and without antialias: what comes out is near, and not equal."""
    loaded, folder, _ = exported(kind, positions="sincos")
    pixels = images((48, 48))
    theirs = opened(folder, **kind_options(kind))(loaded.encoder.normalize(pixels), **options).last_hidden_state
    assert theirs.shape == (2, 37, 32)
    assert 1e-6 < (theirs - tokens(loaded, pixels)).abs().max() < 0.5


@torch.no_grad()
def test_the_wrapper_resamples_as_the_run_where_timm_is_asked_to(exported):
    loaded, folder, _ = exported("timm_wrapper")
    arguments = opened(folder).config.model_args
    model = opened(folder, model_args={**arguments, "dynamic_img_size": True})
    pixels = images((48, 48))
    theirs = model(loaded.encoder.normalize(pixels)).last_hidden_state
    assert (theirs - tokens(loaded, pixels)).abs().max() <= 1e-6


# ---- what is chosen, what is refused -------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder", "chosen"),
    [
        ({}, "vit"),
        ({"layer_scale": 0.1}, "dinov2"),
        ({"num_registers": 2}, "dinov2_with_registers"),
        ({"num_registers": 2, "layer_scale": 0.1}, "dinov2_with_registers"),
        (DINOV2_GIANT, "dinov2"),
        (BEIT, "beit"),
        ({"qk_norm": True}, "timm_wrapper"),
        ({"name": "eva", "model": "eva02_tiny_patch14_224"}, "timm_wrapper"),
    ],
)
def test_auto_chooses_the_nearest_class_that_computes_the_same(exported, encoder, chosen):
    _, folder, report = exported("auto", **encoder)
    assert report["kind"] == chosen
    assert json.loads((folder / "report.json").read_text())["kind"] == chosen


def test_the_report_and_the_card_tell_why_a_class_was_not_chosen(exported):
    _, folder, report = exported("auto", layer_scale=0.1, qk_norm=True)
    assert report["other_kinds"]["dinov2"] == "it norms queries and keys (qk_norm)"
    assert "Not of kind dinov2: it norms queries and keys (qk_norm)." in (folder / "README.md").read_text()


REFUSED = {
    "registers in ViT": ("vit", {"num_registers": 2}, r"2 registers.*use kind=dinov2_with_registers or timm_wrapper"),
    "registers in DINOv2": (
        "dinov2",
        {"num_registers": 2},
        r"registers.*use kind=dinov2_with_registers or timm_wrapper",
    ),
    "no registers": ("dinov2_with_registers", {}, "has no registers; use kind=vit or dinov2 or timm_wrapper"),
    "qk-norm": ("vit", {"qk_norm": True}, "norms queries and keys.*; use kind=timm_wrapper"),
    "pre-norm": ("vit", {"model": "vit_base_patch16_clip_224"}, "norms its tokens before.*; use kind=timm_wrapper"),
    "a hybrid stem": ("vit", {"model": "vit_tiny_r_s16_p8_224", "patch_size": None}, "one convolution; .*timm_wrapper"),
    "rotary": ("dinov2", {"name": "eva", "model": "eva02_tiny_patch14_224"}, "timm's Eva.*; use kind=timm_wrapper"),
    "a pyramid": ("vit", SWIN, "SwinTransformer.*; use kind=timm_wrapper"),
    "a ViT as BEiT": ("beit", {}, "VisionTransformer, not Beit; use kind=vit or dinov2 or timm_wrapper"),
    "BEiT as a ViT": ("vit", BEIT, "timm's Beit, not a plain VisionTransformer; use kind=beit or timm_wrapper"),
    "a gated MLP": ("vit", DINOV2_GIANT, "gated, .*; use kind=dinov2 or timm_wrapper"),
    "oblong DINOv2": ("dinov2", {"data": {"image_size": [32, 48]}}, "32x48, .*; use kind=vit or timm_wrapper"),
    "oblong BEiT": ("beit", {**BEIT, "data": {"image_size": [32, 48]}}, "32x48, .*; use kind=timm_wrapper"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_encoder_that_a_class_cannot_be_is_refused_with_the_kinds_that_can(a_run, tmp_path, case):
    kind, encoder, sentence = REFUSED[case]
    loaded = a_run("simmim" if encoder.get("name") else "mae", **encoder)
    with pytest.raises(ConfigError, match=f"kind={kind} cannot be this encoder: .*{sentence}$"):
        target.export(loaded, tmp_path / "out", target.Config(kind=kind))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kind": "clip"}, "kind='clip' is unknown; choose auto, timm_wrapper, dinov2"),
        ({"pool": "max"}, "pool='max' is unknown; choose class or mean"),
        ({"pool": "mean", "kind": "vit"}, "pool=mean is for kind=beit alone"),
        ({"pool": "mean", "kind": "timm_wrapper"}, "pool=mean is for kind=beit"),
        ({"pool": "mean"}, "kind=beit cannot be this encoder.*; use kind=vit or dinov2 or timm_wrapper"),
    ],
)
def test_options_that_mean_nothing_are_refused(a_run, tmp_path, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        target.export(a_run(), tmp_path / "out", target.Config(**options))


def test_without_transformers_the_remedy_is_named(a_run, tmp_path, monkeypatch):
    monkeypatch.setattr(export_folder, "_installed", lambda name: name != "transformers")
    with pytest.raises(ConfigError, match=r"needs transformers; install it: pip install 'mimstream\[hf\]'"):
        target.export(a_run(), tmp_path / "out", target.Config())


# ---- the head of a classify run ------------------------------------------------------------------

CLASS, MEAN = {"pool": "class"}, {"pool": "mean"}
PROBE_CLASS, PROBE_MEAN = {"pool": "class", "frozen": True}, {"pool": "mean", "frozen": True}
EVA = {"name": "eva", "model": "eva02_tiny_patch14_224"}
HEADS = [
    ("vit", CLASS, {}),
    ("vit", CLASS, {"layer_scale": 0.1}),
    ("vit", PROBE_CLASS, {}),
    ("dinov2", CLASS, {"layer_scale": 0.1}),
    ("dinov2", PROBE_MEAN, {"layer_scale": 0.1}),
    ("dinov2_with_registers", CLASS, {"num_registers": 2}),
    ("dinov2_with_registers", PROBE_MEAN, {"num_registers": 2}),
    ("beit", MEAN, BEIT),
    ("beit", CLASS, BEIT),
    ("beit", PROBE_CLASS, BEIT),
    ("timm_wrapper", MEAN, {}),
    ("timm_wrapper", CLASS, {"num_registers": 2}),
    ("timm_wrapper", PROBE_MEAN, EVA),
]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "options", "encoder"), HEADS)
def test_a_classifier_has_the_logits_of_the_run(exported, kind, options, encoder):
    loaded, folder, report = exported(kind, objective="classify", settings=options, **encoder)
    assert report["max_difference"] <= report["tolerance"] <= 1e-5
    model = transformers.AutoModelForImageClassification.from_pretrained(folder, local_files_only=True).eval()
    logits = model(loaded.encoder.normalize(images())).logits
    assert logits.shape == (2, 3)
    assert (logits - loaded.objective.logits({"images": images()})).abs().max() <= 1e-5


@torch.no_grad()
def test_the_features_of_a_classifier_can_be_read_without_its_head(exported):
    loaded, folder, _ = exported("dinov2", objective="classify", settings=CLASS)
    theirs = opened(folder)(loaded.encoder.normalize(images())).last_hidden_state
    assert (theirs - tokens(loaded, images())).abs().max() <= 1e-6


@torch.no_grad()
def test_the_head_can_be_left_out(exported):
    loaded, folder, report = exported("vit", objective="classify", settings=MEAN, head=False)
    assert report["architecture"] == "ViTModel"
    assert not [name for name in load_file(folder / "model.safetensors") if "classifier" in name]
    theirs = opened(folder, add_pooling_layer=False)(loaded.encoder.normalize(images())).last_hidden_state
    assert (theirs - tokens(loaded, images())).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("kind", "options", "encoder", "sentence"),
    [
        ("vit", MEAN, {}, "mean of the patches, which ViTModel does not pool so; use kind=timm_wrapper, or head=false"),
        ("dinov2", MEAN, {}, "norms the mean of raw patches.*; use kind=timm_wrapper, or head=false"),
        ("beit", PROBE_MEAN, BEIT, "BeitModel does not pool so; use kind=timm_wrapper, or head=false"),
        ("vit", PROBE_MEAN, {}, "; use kind=dinov2 or timm_wrapper, or head=false"),
    ],
)
def test_a_head_that_a_class_cannot_have_is_refused_with_what_can(a_run, tmp_path, kind, options, encoder, sentence):
    with pytest.raises(ConfigError, match=f"kind={kind} cannot be this classifier: .*{sentence}"):
        target.export(a_run("classify", None, options, **encoder), tmp_path / "out", target.Config(kind=kind))
    assert list(tmp_path.iterdir()) == []


def test_two_heads_are_refused_with_the_remedy(a_run, tmp_path):
    loaded = a_run("classify", None, CLASS, num_registers=1)
    loaded.objective.distill_head = torch.nn.Linear(32, 3)  # as `objective.distill` makes one
    with pytest.raises(ConfigError, match=r"two heads.*head=false"):
        target.export(loaded, tmp_path / "out", target.Config())


def test_an_altered_head_is_caught(a_run, tmp_path, monkeypatch):
    break_after_writing(monkeypatch, target, alter("model.safetensors", nudged("classifier.bias")))
    with pytest.raises(ExportError, match=r"tensor classifier.bias of model.safetensors is not that of the run"):
        target.export(a_run("classify", None, CLASS), tmp_path / "out", target.Config(kind="vit"))


def test_auto_takes_the_wrapper_for_a_head_that_no_class_has(exported):
    _, _, report = exported("auto", objective="classify", settings=MEAN)
    assert report["kind"] == "timm_wrapper"
    assert "does not pool so" in report["other_kinds"]["vit"]


# ---- a broken export is caught -------------------------------------------------------------------


def config_of(name, **changes):
    """Damage to a file of JSON."""

    def damage(folder):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | changes))

    return damage


def renamed(tensors):
    return {name.replace("encoder.layer.1.norm1", "encoder.layer.7.norm1"): t for name, t in tensors.items()}


def nudged(name):
    return lambda tensors: tensors | {name: tensors[name] + 1e-7}


KEY = "encoder.layer.0.attention.attention.key.weight"
BROKEN = {
    "a tensor altered": ("dinov2", alter("model.safetensors", nudged(KEY)), "tensor .*key.weight .* is not that of"),
    "a tensor missing": (
        "dinov2",
        alter("model.safetensors", lambda t: {n: v for n, v in t.items() if n != KEY}),
        "reports 1 missing keys.*",
    ),
    "a tensor unused": (
        "dinov2",
        alter("model.safetensors", lambda t: t | {"head.weight": t[KEY] + 1}),
        "reports 1 unexpected keys",
    ),
    "a tensor misnamed": ("dinov2", alter("model.safetensors", renamed), "reports 2 (missing|unexpected) keys"),
    "a tensor of another shape": (
        "dinov2",
        alter("model.safetensors", lambda t: t | {"layernorm.weight": t["layernorm.weight"][:8]}),
        "reports 1 mismatched keys",
    ),
    "heads": ("dinov2", config_of("config.json", num_attention_heads=4), "reads num_attention_heads=4 .* 2 was"),
    "epsilon": ("vit", config_of("config.json", layer_norm_eps=1e-12), "reads layer_norm_eps=1e-12"),
    "activation": ("vit", config_of("config.json", hidden_act="relu"), "reads hidden_act='relu'"),
    "another class": ("dinov2", config_of("config.json", model_type="beit"), "transformers reports"),
    "no config": ("vit", lambda folder: (folder / "config.json").unlink(), "cannot load the export"),
    "mean": ("vit", config_of("preprocessor_config.json", image_mean=[0.5] * 3), "normalises pixels otherwise"),
    "size": ("vit", config_of("preprocessor_config.json", crop_size={"height": 16, "width": 16}), r"of \(16, 16\)"),
    "rescaling": ("vit", config_of("preprocessor_config.json", do_rescale=False), "normalises pixels otherwise"),
    "wrapper: a tensor altered": (
        "timm_wrapper",
        alter("model.safetensors", nudged("norm.bias")),
        "tensor .*norm.bias",
    ),
    "wrapper: a tensor missing": (
        "timm_wrapper",
        alter("model.safetensors", lambda t: {n: v for n, v in t.items() if n != "norm.bias"}),
        "reports 1 missing keys",
    ),
    "wrapper: another model": (
        "timm_wrapper", config_of("config.json", architecture="vit_base_patch16_clip_224"), "reports|are missing",
    ),
    "wrapper: mean": ("timm_wrapper", config_of("config.json", pretrained_cfg={"mean": [0, 0, 0]}), "makes images of"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_export_is_caught_and_leaves_no_folder(a_run, tmp_path, monkeypatch, case):
    kind, damage, sentence = BROKEN[case]
    break_after_writing(monkeypatch, target, damage)
    with pytest.raises(ExportError, match=sentence):
        target.export(a_run(), tmp_path / "out", target.Config(kind=kind))
    assert list(tmp_path.iterdir()) == []


def test_a_class_that_computes_something_else_is_caught_by_the_features(a_run, tmp_path, monkeypatch):
    """Weights and configuration as written, but the conversion itself wrong: queries in the place of keys."""
    swap = {"query": "key", "key": "value", "value": "query"}
    rules = [(rf"\.attn\.{a}\.", f".attn.{b}_.") for a, b in swap.items()] + [(r"\.attn\.(\w+)_\.", r".attn.\1.")]
    monkeypatch.setattr(hf_layouts, "VIT", rules + hf_layouts.VIT)
    with pytest.raises(ExportError, match=r"differs from .* above 1e-06; nothing was written"):
        target.export(a_run(), tmp_path / "out", target.Config(kind="vit"))
    assert list(tmp_path.iterdir()) == []


# ---- the image processor -------------------------------------------------------------------------


def picture(height, width, channels=3):
    pixels = np.random.default_rng(5).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels if channels == 3 else pixels[..., 0])


def evaluated(loaded, image):
    """The evaluation view of an image, as the run's data have it: (1, C, H, W) in [0, 1]."""
    raw = torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1).permute(2, 0, 1)
    (view,) = loaded.views.evaluation(raw, np.random.default_rng(0), loaded.views.sizes[:1])
    return view[None].float() / 255


PROCESSED = [
    # image size of the run, crop ratio, size of the picture at which nothing is resized, channels
    (32, 1.0, (32, 32), 3),
    (32, 1.0, (32, 40), 3),  # cut at the sides
    (32, 0.8, (40, 40), 3),
    (32, 0.8, (48, 40), 3),
    ([32, 48], 1.0, (32, 48), 3),
    (32, 1.0, (32, 36), 1),
]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "timm_wrapper"])
@pytest.mark.parametrize(("size", "ratio", "given", "channels"), PROCESSED)
def test_processor_and_model_are_the_evaluation_view_and_the_encoder(exported, kind, size, ratio, given, channels):
    data = {"image_size": size, "eval_view": {"name": "center", "crop_ratio": ratio}, "channels": channels}
    loaded, folder, _ = exported(kind, data=data, mean=[0.1, 0.2, 0.3][:channels], std=[0.4, 0.5, 0.6][:channels])
    processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    image = picture(*given, channels)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    ours = evaluated(loaded, image)
    assert (pixels - loaded.encoder.normalize(ours)).abs().max() <= 1e-5
    theirs = opened(folder, **kind_options(kind))(pixels).last_hidden_state
    assert (theirs - tokens(loaded, ours)).abs().max() <= 1e-4


def test_a_resized_picture_is_processed_nearly_as_the_run_does(exported):
    """transformers resizes before it cuts and rounds to levels; the run cuts first."""
    loaded, folder, _ = exported("vit", data={"eval_view": {"name": "center", "crop_ratio": 0.875}})
    processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    rows, columns = np.mgrid[:90, :120]
    image = Image.fromarray(np.stack([rows, columns, rows + columns], -1).astype(np.uint8))
    pixels = processor(image, return_tensors="pt")["pixel_values"] * loaded.encoder.std + loaded.encoder.mean
    assert (pixels - evaluated(loaded, image)).abs().max() < 3 / 255


def test_values_of_another_range_are_normalised_as_they_are(exported):
    data = {"range": [0, 4000], "channels": 2, "eval_view": {"name": "center", "crop_ratio": 1.0}}
    loaded, folder, _ = exported("vit", data=data, mean=[0.1, 0.2], std=[0.4, 0.5])
    processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    raw = torch.rand(2, 32, 32) * 4000
    pixels = processor(raw, input_data_format="channels_first", return_tensors="pt")["pixel_values"]
    assert (pixels - loaded.encoder.normalize(raw[None] / 4000)).abs().max() <= 1e-5


# ---- the folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "files"), [("vit", {"preprocessor_config.json"}), ("timm_wrapper", set())])
def test_the_folder_holds_no_pickle_and_no_mask_token_of_the_objective(exported, kind, files):
    _, folder, _ = exported(kind, objective="simmim")
    always = {"README.md", "config.json", "model.safetensors", "recipe.json", "report.json"}
    assert {path.name for path in folder.iterdir()} == always | files
    assert not [n for n in load_file(folder / "model.safetensors") if "mask_token" in n or "decoder" in n]


def test_the_mask_token_that_a_class_insists_on_is_zero(exported):
    _, folder, _ = exported("dinov2_with_registers", num_registers=2)
    assert not load_file(folder / "model.safetensors")["embeddings.mask_token"].any()


def test_transformers_saves_the_export_under_the_same_names(exported, tmp_path):
    """So the classic names are still those that transformers itself writes."""
    for kind, encoder in (("dinov2", {"layer_scale": 0.1}), ("vit", {}), ("beit", BEIT)):
        _, folder, _ = exported(kind, **encoder)
        opened(folder, **kind_options(kind)).save_pretrained(tmp_path / kind)
        ours, theirs = (load_file(place / "model.safetensors") for place in (folder, tmp_path / kind))
        assert ours.keys() == theirs.keys()
        folder.rename(tmp_path / f"seen-{kind}")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "vit", "beit", "timm_wrapper"])
def test_an_export_can_start_another_run(exported, a_run, kind):
    encoder = next(iter(EXACT[kind].values()))
    loaded, folder, _ = exported(kind, **encoder)
    other = a_run("simmim", **encoder)
    shaken(other.encoder.requires_grad_(True))
    weights.initialize_encoder(other.encoder, str(folder))
    assert (tokens(other, images()) - tokens(loaded, images())).abs().max() <= 1e-6


def test_the_card_shows_code_that_runs(exported):
    for kind in ("vit", "dinov2"):
        _, folder, _ = exported(kind)
        card = (folder / "README.md").read_text()
        code = card.partition("```python")[2].partition("```")[0]
        scope = {"image": picture(40, 50)}
        exec(code, scope)
        assert scope["tokens"].shape == (1, 17, 32)
        folder.rename(folder.with_name(f"seen-{kind}"))


def test_a_head_of_any_size_fits_on_the_export(exported):
    for kind, encoder in (("dinov2", {}), ("vit", {}), ("beit", BEIT), ("timm_wrapper", {})):
        loaded, folder, _ = exported(kind, **encoder)
        model = transformers.AutoModelForImageClassification.from_pretrained(folder, num_labels=5)
        assert model(images()).logits.shape == (2, 5)
        stem = next(
            p for n, p in model.named_parameters() if n.endswith(("projection.weight", "patch_embed.proj.weight"))
        )
        assert torch.equal(stem, loaded.encoder.vit.patch_embed.proj.weight)
        folder.rename(folder.with_name(f"seen-{kind}"))


def test_averaged_weights_are_said_to_be_averaged(a_run, tmp_path):
    loaded = a_run()
    loaded.config["optim"]["ema"] = 0.99
    assert target.export(loaded, tmp_path / "out", target.Config())["weights"] == "exponential moving average (0.99)"
