"""Where a fine-tuning starts: runs, exports and timm's names give the same features, at a higher resolution too."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from mim import build, config, train
from mim.config import ConfigError, to_yaml
from mim.contracts import LoadedRun
from mim.data.make import make
from mim.data.shards import Dataset
from mim.exports import timm as timm_export
from mim.pretrained import resample, weight_files, weights
from mim.saving import checkpoint
from mim.watch import stopping
from tests.conftest import TINY, shaken
from tests.tiny import picture

ENCODERS = {
    "vit": {"name": "vit", **TINY["vit"]},
    "sincos": {"name": "vit", **TINY["vit"], "positions": "sincos"},
    "registers": {"name": "vit", **TINY["vit"], "num_registers": 2, "layer_scale": 0.1},
    "eva": {"name": "eva", **TINY["eva"]},
    "beit": {"name": "beit", **TINY["mim.encoders.beit"], "layer_scale": 0.1},
    "dense": {"name": "dense", **TINY["dense"]},
}
PIXELS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}


def encoder_of(section, size=32):
    """An encoder as a recipe names it, with weights of its own."""
    module, cfg = config.component("mim.encoders", {**section, **PIXELS}, "encoder")
    torch.manual_seed(5)
    return module.build(cfg, image_size=(size, size), channels=3).eval()


@pytest.fixture(scope="module", params=ENCODERS)
def source(request, shards, tmp_path_factory):
    """An encoder with random weights: its recipe, a run that was filled from its export, the export, and itself."""
    section, folder = ENCODERS[request.param], tmp_path_factory.mktemp("source")
    sections = {
        "data": {"path": str(shards), "image_size": 32, "view": {"name": "crop"}},
        "mask": {"name": "random", "ratio": 0.5},
        "encoder": {**section, **PIXELS},
        "objective": {"name": "simmim"},
        "optim": {"batch_size": 8, "length": "1 steps", "warmup": "0 steps", "lr": 0.0},
        "train": {"workers": 0},
    }
    built = build.build(sections, dataset=Dataset.open(shards / "train"))
    torch.manual_seed(0)
    shaken(built.encoder)
    loaded = LoadedRun(built.objective, built.encoder, {}, built.views, built.sections, 1, folder / "none")
    timm_export.export(loaded, folder / "export", timm_export.Config())
    sections["encoder"]["init"] = str(folder / "export")
    (folder / "source.yaml").write_text(to_yaml(sections))
    assert train.main(str(folder / "source.yaml"), [f"train.run={folder / 'run'}"]) == stopping.DONE
    return section, folder / "run", folder / "export", built.encoder


def images(size=32):
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def same(one, other):
    return torch.equal(one.patches, other.patches) and torch.equal(one.prefix, other.prefix)


# ---- sources ---------------------------------------------------------------------------------------------------------


def test_a_run_its_export_and_a_timm_name_give_exactly_the_features_of_the_source(source, monkeypatch):
    """The run was itself filled from the export, by `mim train`. Nothing asks for the network but the name."""
    section, run, export, theirs = source
    created = timm.create_model

    def offline(name, pretrained=False, **options):
        assert (name, pretrained) == ("vit_tiny_patch16_224", True)
        return created(f"local-dir:{export}", pretrained=True, **options)

    for origin in (run, f"{run}@1", export, "vit_tiny_patch16_224"):
        own = encoder_of(section)
        with monkeypatch.context() as patch:
            if origin == "vit_tiny_patch16_224":
                patch.setattr(weight_files.timm, "create_model", offline)
            else:
                patch.setattr(weight_files, "fetch", lambda name: pytest.fail(f"{name} was fetched"))
            report = weights.initialize_encoder(own, str(origin))
        assert same(own(images()), theirs(images())), origin
        assert report.resized == {}
        assert report.reinitialised == []
        assert any("as the weights were trained" in note for note in report.notes), origin
    assert same(build.load_run(run).encoder(images()), theirs(images()))


def tuned(recipe, folder, name, **changes):
    """A fine-tuning of one step, `section__key=value` changed; returns its folder."""
    sections = recipe("classify") | {"train": {"workers": 0, "log_every": "1 steps"}}
    sections["optim"] |= {"length": "1 steps", "warmup": "0 steps", "lr": 0.0}
    for key, value in changes.items():
        section, _, option = key.partition("__")
        sections.setdefault(section, {})[option] = value
    (folder / f"{name}.yaml").write_text(to_yaml(sections))
    assert train.main(str(folder / f"{name}.yaml"), [f"train.run={folder / name}"]) == stopping.DONE
    return folder / name


def tensors(run: Path):
    return checkpoint.read_tensors(checkpoint.newest(run), ("model.",))


def report_of(run: Path):
    return json.loads((run / "init.json").read_text())


@pytest.fixture
def pretrained(recipe, tmp_path):
    """A run of MAE."""
    sections = recipe("mae") | {"train": {"workers": 0}}
    (tmp_path / "mae.yaml").write_text(to_yaml(sections))
    assert train.main(str(tmp_path / "mae.yaml"), [f"train.run={tmp_path / 'mae'}"]) == stopping.DONE
    return tmp_path / "mae"


def test_a_fine_tuning_takes_the_encoder_and_tells_what_starts_anew_and_what_stays_behind(recipe, pretrained, tmp_path):
    before = tensors(pretrained)
    for name, start in (("by_encoder", {"encoder__init": str(pretrained)}), ("by_run", {"init__run": str(pretrained)})):
        run = tuned(recipe, tmp_path, name, **start)
        after, report = tensors(run), report_of(run)
        inside = [n for n in before if n.startswith("model.encoder.")]
        assert inside
        assert all(after[n].equal(before[n]) for n in inside)
        assert {f"classify.{n}" for n in ("head.weight", "head.bias", "norm.weight", "norm.bias")} == set(
            report["reinitialised"]
        )
        assert "mae.mask_token" in report["unused"]
        assert any(n.startswith("mae.decoder") for n in report["unused"])


def test_a_fine_tuned_run_starts_another_fine_tuning_with_other_classes(recipe, pretrained, tmp_path):
    first = tuned(recipe, tmp_path, "first", encoder__init=str(pretrained), optim__lr=1e-2, optim__length="3 steps")
    assert not tensors(first)["model.encoder.vit.cls_token"].equal(tensors(pretrained)["model.encoder.vit.cls_token"])
    two = tmp_path / "two"
    for i in range(8):
        (tmp_path / f"images/class{i % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"images/class{i % 2}/{i}.png").write_bytes(picture(i, kind="PNG"))
    make(tmp_path / "images", two, labels_from_folders=True, workers=1)
    again = tuned(recipe, tmp_path, "again", encoder__init=str(first), data__path=str(two), objective__num_classes=None)
    after, before, report = tensors(again), tensors(first), report_of(again)
    assert all(after[n].equal(before[n]) for n in before if n.startswith("model.encoder."))
    assert after["model.head.weight"].shape == (2, 32)
    assert "classify.head.weight" in report["reinitialised"]
    assert "classify.head.weight" in report["unused"]
    with_run = tuned(
        recipe, tmp_path, "with_run", init__run=str(first), data__path=str(two), objective__num_classes=None
    )
    assert tensors(with_run)["model.norm.weight"].equal(before["model.norm.weight"])
    assert "classify.head.weight (3x32 in the file, 2x32 here)" in report_of(with_run)["unused"]


# ---- higher resolution -----------------------------------------------------------------------------------------------


def test_a_learned_gradient_of_positions_stays_a_gradient_on_a_finer_grid():
    """Values that rise by one from row to row (column to column): on twice the grid by a half."""
    small, large = encoder_of(ENCODERS["vit"]), encoder_of(ENCODERS["vit"], size=64)
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    with torch.no_grad():
        table = small.vit.pos_embed
        table[:, 1:] = torch.stack([rows, columns], dim=2).reshape(1, 16, 2).repeat(1, 1, 16)
    state = {n: t.clone() for n, t in small.vit.state_dict().items()}
    given, _ = resample.fit_positions(state, large.vit, (4, 4))
    found = given["pos_embed"][0, 1:].reshape(8, 8, 32)
    inner = slice(2, 6)  # the border has no neighbours to go on from
    expected = (torch.arange(8.0) + 0.5) / 2 - 0.5
    assert torch.allclose(found[inner, inner, 0], expected[inner, None].expand(4, 4), atol=0.06)
    assert torch.allclose(found[inner, inner, 1], expected[None, inner].expand(4, 4), atol=0.06)
    assert given["pos_embed"][0, 0].equal(state["pos_embed"][0, 0])


def test_at_twice_the_size_equal_content_has_nearly_the_features_of_the_source(source):
    """Patches of one colour each, every one four times: what a patch says must not depend on the resolution.

    Attention sees each four times, so that only the class token's share and positions between the known ones differ.
    Compared with the features of another image, the difference is small; less so of a Swin, whose windows see half as
    far.
    """
    section, run, export, theirs = source
    h, w = theirs.grid((32, 32))
    cells = torch.rand(4, 3, h, w, generator=torch.Generator().manual_seed(2))
    small, large = (torch.nn.functional.interpolate(cells, (side, side), mode="nearest") for side in (32, 64))
    expected = theirs(small).patches.unflatten(1, (h, w))  # (B, h, w, D)
    other = (expected.roll(1, dims=0) - expected).square().mean()
    for origin in (run, export):
        own = encoder_of(section, size=64)
        weights.initialize_encoder(own, str(origin))
        found = own(large).patches.unflatten(1, (h, 2, w, 2)).mean(dim=(2, 4))  # (B, h, w, D)
        error = (found - expected).square().mean()
        assert error < (0.8 if section["name"] == "dense" else 0.25) * other, float(error / other)


def test_a_fine_tuned_run_goes_on_at_twice_the_size_with_nearly_its_predictions(recipe, tmp_path):
    first = tuned(recipe, tmp_path, "first", objective__head_std=0.5)
    larger = tuned(recipe, tmp_path, "larger", objective__head_std=0.5, init__run=str(first), data__image_size=64)
    assert report_of(larger)["reinitialised"] == []
    assert set(report_of(larger)["resized"]) == {"pos_embed"}
    cells = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    before, after = (
        build.load_run(run).objective.logits(
            {"images": torch.nn.functional.interpolate(cells, (side, side), mode="nearest")}
        )
        for run, side in ((first, 32), (larger, 64))
    )
    assert (after - before).square().mean() < 0.05 * (before.roll(1, dims=0) - before).square().mean()


@pytest.mark.parametrize(
    ("model", "options", "resized"),
    [
        ("hiera_tiny_224", {"embed_dim": 16, "num_heads": 1, "stages": [1, 1, 1, 1]}, {"pos_embed"}),
        ("mobilevit_xxs", {}, set()),  # a tenth of its state counts the batches of BatchNorms
    ],
)
def test_families_of_other_habits_are_filled_at_twice_the_size(tmp_path, model, options, resized):
    section = {"name": "dense", "model": model, "options": options}
    small, large = (encoder_of(section, size=size) for size in (64, 128))
    save_file({n: t.contiguous().clone() for n, t in small.model.state_dict().items()}, tmp_path / "file.safetensors")
    report = weights.initialize_encoder(large, str(tmp_path / "file.safetensors"))
    assert set(report.resized) == resized
    assert report.reinitialised == []
    assert len(report.loaded) + len(resized) == report.num_wanted


def test_maps_of_positions_are_resampled_with_and_without_a_prefix_and_a_strange_count_is_not():
    rows = torch.linspace(0, 1, 4)[None, :, None, None].expand(1, 4, 4, 2).contiguous()
    found, steps = resample.position_map(rows, torch.zeros(1, 8, 8, 2))
    assert steps == ["positions 4x4 -> 8x8, bicubic"]
    assert found[0, :, 0, 0].diff().gt(0).all()
    with_prefix = torch.cat([torch.full((1, 1, 2), 9.0), rows.flatten(1, 2)], dim=1)
    found, _ = resample.position_map(with_prefix, torch.zeros(1, 65, 2))
    assert found[0, 0].eq(9).all()
    assert found.shape == (1, 65, 2)
    assert resample.position_map(torch.zeros(1, 16, 2), torch.zeros(1, 50, 2)) is None


def test_a_network_whose_weights_depend_on_the_image_size_is_refused_with_the_reason(tmp_path):
    section = {"name": "dense", "model": "mixer_s32_224", "options": {"mlp_ratio": (0.1, 0.1)}}
    small, large = encoder_of(section, size=64), encoder_of(section, size=128)
    save_file(small.model.state_dict(), tmp_path / "file.safetensors")
    with pytest.raises(ConfigError, match=r"and data\.image_size where the weights depend on it"):
        weights.initialize_encoder(large, str(tmp_path / "file.safetensors"))
