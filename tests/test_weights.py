"""Starting from weights: what is resampled, what is refused, what executes, and how a run goes on from it."""

import argparse
import json
import os
import pathlib
import pickle
import shutil
import sys
import types
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from mim import build, config, train
from mim.config import ConfigError, to_yaml
from mim.data.shards import Dataset
from mim.encoders import beit, vit
from mim.patches import sincos_positions
from mim.pretrained import layouts, weight_files, weights
from mim.saving import checkpoint
from mim.watch import stopping

OURS = {"model": "vit_tiny_patch16_224", "width": 32, "depth": 2, "num_heads": 2, "patch_size": 8}


def encoder_of(image_size=(32, 32), channels=3, **options):
    torch.manual_seed(1)
    return vit.build(vit.Config(**(OURS | options)), image_size=image_size, channels=channels).eval()


def fill(encoder, source):
    return weights.initialize(torch.nn.ModuleDict({"encoder": encoder}), encoder, str(source), name="mae")


@pytest.fixture
def released(tmp_path):
    """A file of a small ViT with a grid of 4 x 4 patches of 8 x 8 pixels, and its tensors."""
    torch.manual_seed(2)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0
    )
    state = {n: torch.randn_like(t) * 0.1 for n, t in model.state_dict().items()}
    save_file(state, tmp_path / "released.safetensors")
    return tmp_path / "released.safetensors", state


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_positions_of_a_larger_image_are_resampled_and_the_report_says_so(released):
    file, state = released
    table = sincos_positions((4, 4), 32)  # smooth, so that resampling can be judged
    state["pos_embed"] = torch.cat([torch.full((1, 32), 7.0), table]).unsqueeze(0)
    save_file(state, file)
    encoder = encoder_of((64, 32))
    report = fill(encoder, file)
    assert report.resized == {"pos_embed": "1x17x32 -> 1x33x32 (positions 4x4 -> 8x4, bicubic)"}
    found = encoder.vit.pos_embed[0]
    assert found[0].eq(7.0).all()  # of the class token
    back = found[1:].reshape(4, 2, 4, 32).mean(dim=1).reshape(16, 32)
    assert (back - table).abs().max() < 0.25


def test_frozen_positions_are_recomputed_for_the_new_grid(released):
    file, state = released
    state["pos_embed"] = torch.cat([torch.zeros(1, 32), sincos_positions((4, 4), 32)]).unsqueeze(0)
    save_file(state, file)
    encoder = encoder_of((64, 64), positions="sincos")
    report = fill(encoder, file)
    assert "sine-cosine, recomputed" in report.resized["pos_embed"]
    assert encoder.vit.pos_embed[0, 1:].equal(sincos_positions((8, 8), 32))


def test_learned_positions_are_not_replaced_by_fixed_ones(released):
    with pytest.raises(ConfigError, match=r"has learned positions, .* set encoder.positions=learn"):
        fill(encoder_of(positions="sincos"), released[0])


def test_a_larger_patch_gives_the_same_tokens_on_an_image_enlarged_as_much(released):
    """What the pseudo-inverse is made for: <resize(x), resampled w> = <x, w>."""
    file, state = released
    encoder = encoder_of((64, 64), patch_size=16, mean=[0.0] * 3, std=[1.0] * 3)
    report = fill(encoder, file)
    assert "patch embedding by pseudo-inverse" in report.resized["patch_embed.proj.weight"]
    images = torch.rand(2, 3, 32, 32)
    enlarged = torch.cat(
        [torch.nn.functional.interpolate(images[:, :, r : r + 8, c : c + 8], 16, mode="bicubic", antialias=True)
         for r in range(0, 32, 8) for c in range(0, 32, 8)]
    ).reshape(4, 4, 2, 3, 16, 16).permute(2, 3, 0, 4, 1, 5).reshape(2, 3, 64, 64)  # fmt: skip
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    theirs = torch.nn.functional.conv2d(images, weight, bias, stride=8).flatten(2).mT
    mine = encoder.vit.patch_embed(enlarged).flatten(1, 2)
    assert (mine - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_gray_images_give_the_tokens_of_their_copies_in_colour(released):
    file, state = released
    encoder = encoder_of(channels=1, mean=[0.0], std=[1.0])
    report = fill(encoder, file)
    assert report.resized["patch_embed.proj.weight"] == "32x3x8x8 -> 32x1x8x8 (channels summed)"
    gray = torch.rand(2, 1, 32, 32)
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    theirs = torch.nn.functional.conv2d(gray.expand(-1, 3, -1, -1), weight, bias, stride=8).flatten(2).mT
    assert torch.allclose(encoder.vit.patch_embed(gray).flatten(1, 2), theirs, atol=1e-5)


def test_further_channels_repeat_colours_at_the_same_total(released):
    file, state = released
    encoder = encoder_of(channels=6)
    assert "channels repeated and scaled by 3/6" in fill(encoder, file).resized["patch_embed.proj.weight"]
    weight = encoder.vit.patch_embed.proj.weight
    assert torch.allclose(weight.sum(dim=1), state["patch_embed.proj.weight"].sum(dim=1), atol=1e-5)
    assert torch.allclose(weight[:, 3:], weight[:, :3])


def test_positions_of_prefix_tokens_move_into_the_tokens_where_the_encoder_keeps_none(released):
    """DINOv2 with registers in timm's form has positions for patches alone."""
    file, state = released
    encoder = encoder_of(model="vit_base_patch14_reg4_dinov2", num_registers=4, layer_scale=1e-5)
    assert encoder.vit.pos_embed.shape[1] == 16
    report = fill(encoder, file)
    assert torch.allclose(encoder.vit.cls_token[0, 0], state["cls_token"][0, 0] + state["pos_embed"][0, 0])
    assert encoder.vit.pos_embed[0].equal(state["pos_embed"][0, 1:])
    assert report.reinitialised == ["reg_token"]
    assert "positions of prefix tokens added to them" in report.resized["pos_embed"]


def test_a_table_of_relative_positions_is_resized_and_keeps_its_three_extra_rows(tmp_path):
    def build_beit(size, positions):
        cfg = beit.Config(width=32, depth=2, num_heads=2, patch_size=8, layer_scale=0.1, positions=positions)
        return beit.build(cfg, image_size=(size, size), channels=3)

    small, large = build_beit(32, "shared_relative"), build_beit(64, "relative")
    torch.nn.init.normal_(small.vit.rel_pos_bias.relative_position_bias_table)
    table = small.vit.rel_pos_bias.relative_position_bias_table.detach()
    torch.save({"model": small.vit.state_dict()}, tmp_path / "beit.pth")
    report = fill(large, tmp_path / "beit.pth")
    for block in large.vit.blocks:
        found = block.attn.relative_position_bias_table
        assert found.shape == (15 * 15 + 3, 2)
        assert found[-3:].equal(table[-3:])
        assert torch.allclose(found[112], table[24], atol=1e-4)  # the centre: a patch and itself
    assert "table of relative positions" in report.resized["blocks.1.attn.relative_position_bias_table"]


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"width": 48, "num_heads": 2}, r"another size than the encoder: cls_token 1x1x32 in the file, 1x1x48 here"),
        ({"depth": 1}, r"has 12 tensors for which the encoder has no place, such as blocks\.1\."),
        ({"depth": 6}, r"supplies 30 of the encoder's 78 tensors, less than 90%; it lacks blocks\.2\.norm1\.weight"),
    ],
)
def test_another_architecture_is_refused(released, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        fill(encoder_of(**options), released[0])


def test_layer_scale_that_the_encoder_lacks_is_refused(released):
    file, state = released
    save_file(state | {"blocks.0.ls1.gamma": torch.ones(32)}, file)
    with pytest.raises(ConfigError, match=r"has LayerScale .* set encoder.layer_scale=1e-5"):
        fill(encoder_of(), file)


def test_another_number_of_heads_is_refused_where_the_source_tells_it(released, tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 4, "image_size": 32, "patch_size": 8}))
    released[0].rename(folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"has 4 attention heads, the encoder 2; set encoder.num_heads=4"):
        fill(encoder_of(), folder)


def test_a_file_of_something_else_names_what_it_has_and_what_is_wanted(tmp_path):
    save_file({"layer1.0.conv1.weight": torch.ones(3)}, tmp_path / "resnet.safetensors")
    with pytest.raises(ConfigError, match=r"lacks cls_token.*and has layer1\.0\.conv1\.weight"):
        fill(encoder_of(positions="learn", model="vit_tiny_patch16_224"), tmp_path / "resnet.safetensors")


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_that_are_not_finite_are_refused(tmp_path, ending):
    state = {"norm.weight": torch.ones(3), "norm.bias": torch.tensor([0.0, float("nan"), 1.0])}
    (save_file if ending == "safetensors" else torch.save)(state, tmp_path / f"broken.{ending}")
    with pytest.raises(ConfigError, match=rf"broken\.{ending} holds values that are not finite, first in norm\.bias"):
        fill(encoder_of(), tmp_path / f"broken.{ending}")


@pytest.mark.parametrize("name", ["resnet51", "nowhere/model.pth", "runs/none@3"])
def test_a_source_that_is_nothing_is_refused_with_what_it_could_be(name):
    with pytest.raises(ConfigError, match="is neither a file, a folder with"):
        fill(encoder_of(), name)


# ---- pickles ---------------------------------------------------------------------------------------------------------


class Hostile:
    """Writes a file when it is unpickled by an ordinary reader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_hostile_pickle_executes_nothing_and_is_refused_by_name(released, tmp_path):
    file, trace = tmp_path / "hostile.pth", tmp_path / "trace"
    torch.save({"model": released[1], "args": Hostile(trace)}, file)
    with pytest.raises(ConfigError, match=r"wants to load (io|_io|builtins|__builtin__)\.open, which could run code"):
        fill(encoder_of(), file)
    assert not trace.exists()
    torch.load(file, weights_only=False)  # the trap is real
    assert trace.exists()


@pytest.mark.parametrize("command", [os.system, exec])
def test_no_call_of_a_pickle_is_made(released, tmp_path, command):
    class Trap:
        def __reduce__(self):
            return (command, ("raise SystemExit(3)",))

    torch.save({"model": released[1], "args": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ConfigError, match="which could run code"):
        fill(encoder_of(), tmp_path / "trap.pth")


def test_what_published_scripts_leave_beside_their_tensors_is_read_as_nothing(released, tmp_path, monkeypatch):
    """BEiT and MAE: argparse.Namespace with paths. SimMIM: yacs' CfgNode, whose package need not be installed."""
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    for name in ("yacs", "yacs.config"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["yacs.config"].CfgNode = node
    settings = node(MODEL=node(NAME="simmim"))
    settings.__dict__["__immutable__"] = True
    args = argparse.Namespace(lr=1e-3, output_dir=pathlib.PosixPath("/tmp/x"), betas=[0.9, 0.95])
    torch.save({"model": released[1], "args": args, "config": settings, "epoch": 3}, tmp_path / "file.pth")
    monkeypatch.undo()
    assert "yacs" not in sys.modules
    names = "".join(
        zipfile.ZipFile(tmp_path / "file.pth").read(n).decode("latin1")
        for n in zipfile.ZipFile(tmp_path / "file.pth").namelist()
        if n.endswith("data.pkl")
    )
    assert "CfgNode" in names
    assert "Namespace" in names
    encoder = encoder_of()
    assert fill(encoder, tmp_path / "file.pth").unused == []
    assert encoder.vit.cls_token.equal(released[1]["cls_token"])


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(ConfigError, match=r"wants to load torch\.nn\.modules\.linear\.Linear"):
        fill(encoder_of(), tmp_path / "module.pth")


def test_what_is_no_torch_file_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "page.pth").write_text("<html>404</html>")
    with pytest.raises(ConfigError, match=r"page\.pth cannot be read as a torch file"):
        fill(encoder_of(), tmp_path / "page.pth")
    with (tmp_path / "list.pth").open("wb") as file:
        pickle.dump([1], file)
    with pytest.raises(ConfigError, match=r"list\.pth"):
        fill(encoder_of(), tmp_path / "list.pth")


def test_the_wrapper_that_was_taken_is_named(tmp_path):
    tensor = {"w": torch.ones(1)}
    found, notes = weight_files.unwrap({"model": tensor, "model_ema": {"module": {"w": torch.zeros(1)}}}, tmp_path)
    assert found["w"] == 0
    assert notes == ["'model_ema' was taken, not 'model'"]


# ---- runs ------------------------------------------------------------------------------------------------------------


def small(shards, **changes):
    """The sections of a tiny MAE run; `section__key=value` changes one."""
    sections = {
        "data": {"path": str(shards / "train"), "val_path": str(shards / "val"), "image_size": 32},
        "mask": {"name": "random", "ratio": 0.5},
        "encoder": {"name": "vit", **OURS},
        "objective": {"name": "mae", "decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2,
                      "norm_pix_loss": False},
        "optim": {"batch_size": 8, "length": "2 steps", "warmup": "1 steps", "lr": 1e-3},
        "train": {"workers": 0, "log_every": "1 steps", "save_every": "100 steps"},
    }  # fmt: skip
    sections["data"]["view"] = {"name": "crop"}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        sections.setdefault(section, {})[name] = value
    return sections


def train_in(folder, name, sections):
    file = folder / f"{name}.yaml"
    file.write_text(to_yaml(sections))
    assert train.main(str(file), [f"train.run={folder / name}"]) == stopping.DONE
    return folder / name


@pytest.fixture
def go(shards, tmp_path):
    """`go(NAME, section__key=value)` trains a tiny MAE in tmp_path/NAME; returns the folder."""
    return lambda name, **changes: train_in(tmp_path, name, small(shards, **changes))


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """A run of 80 steps that has an average of its weights, too."""
    changes = {"optim__length": "80 steps", "optim__warmup": "5 steps", "optim__lr": 3e-3, "optim__ema": 0.5}
    return train_in(tmp_path_factory.mktemp("trained"), "run", small(shards, **changes))


@pytest.fixture(scope="module")
def first(shards, tmp_path_factory):
    """A run of 2 steps."""
    return train_in(tmp_path_factory.mktemp("first"), "run", small(shards))


def logged(run: Path, event: str = "train") -> list[dict]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["event"] == event]


def mae_file(run: Path, file: Path) -> Path:
    """The weights of a run in the published layout of MAE: encoder and decoder in one flat dict."""
    state = checkpoint.read_tensors(checkpoint.newest(run), ("model.",))
    torch.save({"model": {n.removeprefix("model.").removeprefix("encoder.vit."): t for n, t in state.items()}}, file)
    return file


def test_a_continuation_from_a_file_in_mae_s_layout_starts_well_below_scratch(go, trained, tmp_path):
    file = mae_file(trained, tmp_path / "mae.pth")
    scratch = logged(trained)[0]["loss"]
    again = go("again", encoder__init=str(file), optim__lr=1e-5, optim__seed=5)
    assert logged(again)[0]["loss"] < 0.75 * scratch
    report = json.loads((again / "init.json").read_text())
    assert report["reinitialised"] == []
    assert "mae.decoder_pred.weight" in report["loaded"]


def test_an_encoder_alone_leaves_the_decoder_fresh_and_says_so(go, first, tmp_path, capsys):
    state = torch.load(mae_file(first, tmp_path / "mae.pth"), weights_only=True)["model"]
    state = {n: t for n, t in state.items() if not n.startswith("decoder") and n != "mask_token"}
    torch.save({"model": state}, tmp_path / "encoder.pth")
    again = go("again", encoder__init=str(tmp_path / "encoder.pth"))
    report = json.loads((again / "init.json").read_text())
    assert all(name.startswith("mae.") for name in report["reinitialised"])
    assert "mae.mask_token" in report["reinitialised"]
    assert f"weights from {tmp_path / 'encoder.pth'}" in capsys.readouterr().err


def test_the_weights_are_looked_at_before_the_first_step(go, first, tmp_path):
    evals = {"evals__knn": {"every": "2 steps", "k": 3}}
    assert [e["step"] for e in logged(go("scratch", **evals), "eval")] == [2]
    again = go("again", encoder__init=str(first), **evals)
    assert [e["step"] for e in logged(again, "eval")] == [0, 2]
    shutil.rmtree(again / "checkpoints")  # as a run that died before its first one
    (again / "status.json").unlink()
    go("again", encoder__init=str(first), **evals)
    assert [e["step"] for e in logged(again, "eval")] == [0, 2]


def test_looking_first_changes_nothing_in_the_training(go, first):
    one = go("one", encoder__init=str(first))
    two = go("two", encoder__init=str(first), evals__knn={"every": "9 steps", "k": 3})
    assert [e["loss"] for e in logged(one)] == [e["loss"] for e in logged(two)]


def test_a_run_of_ours_gives_its_encoder_alone_to_encoder_init(go, first):
    again = go("again", encoder__init=f"{first}@2")
    report = json.loads((again / "init.json").read_text())
    assert report["family"] == "our run of mae"
    assert "mae.decoder_pred.weight" in report["unused"]
    assert "mae.decoder_pred.weight" in report["reinitialised"]


def test_init_run_takes_everything_and_records_the_parent(go, trained):
    again = go("again", init__run=str(trained), optim__lr=1e-9)
    assert logged(again)[0]["loss"] < 0.75 * logged(trained)[0]["loss"]
    saved = checkpoint.read_config(again)
    parent = checkpoint.read_json(checkpoint.newest(trained) / "state.json")
    assert saved["parent"] == {"run": str(trained), "step": 80, "experiment": parent["experiment"]}
    assert saved["init"] == {"run": str(trained), "optimizer": False}
    report = json.loads((again / "init.json").read_text())
    assert report["reinitialised"] == report["unused"] == []


def test_a_resumed_run_reads_its_source_no_more_and_keeps_its_parent(go, tmp_path):
    first = go("first")
    again = go("again", init__run=str(first))
    parent = checkpoint.read_config(again)["parent"]
    first.rename(tmp_path / "gone")
    go("again", init__run=str(first))
    assert checkpoint.read_config(again)["parent"] == parent
    with pytest.raises(ConfigError, match=r"init\.run"):
        go("again", init__run=str(tmp_path / "other"))


def test_init_run_takes_the_average_of_a_run_that_has_one_unless_the_optimizer_comes_too(go, trained):
    state = checkpoint.read_tensors(checkpoint.newest(trained), ("model.", "ema."))
    name = "encoder.vit.blocks.0.mlp.fc1.weight"
    assert not state[f"model.{name}"].equal(state[f"ema.{name}"])
    for optimizer, part in ((False, "ema"), (True, "model")):
        run = go(
            f"again-{optimizer}", init__run=str(trained), init__optimizer=optimizer, optim__lr=1e-12, optim__ema=0.5
        )
        found = checkpoint.read_tensors(checkpoint.newest(run), ("model.",))[f"model.{name}"]
        assert torch.allclose(found, state[f"{part}.{name}"], atol=1e-7)


def test_init_optimizer_brings_the_moments(go, trained):
    moments = {}
    for optimizer in (False, True):
        run = go(f"again-{optimizer}", init__run=str(trained), init__optimizer=optimizer, optim__length="1 steps")
        moments[optimizer] = checkpoint.read_tensors(checkpoint.newest(run), ("optimizer.",))
    steps = {name: t for name, t in moments[True].items() if name.endswith(".step")}
    assert steps
    assert all(t == 81 for t in steps.values())
    assert all(moments[False][name] == 1 for name in steps)


def test_init_run_may_change_sizes_but_not_with_the_optimizer(go, first):
    again = go("again", init__run=str(first), data__image_size=48)
    report = json.loads((again / "init.json").read_text())
    assert report["resized"] == {"pos_embed": "1x17x32 -> 1x37x32 (positions 4x4 -> 6x6, bicubic)"}
    with pytest.raises(ConfigError, match="does not fit the recipe"):
        go("other", init__run=str(first), init__optimizer=True, data__image_size=48)


def test_the_state_of_another_optimizer_is_refused(go, first):
    with pytest.raises(ConfigError, match=r"takes the state of adamw from .*, but optim.name=lion; use one optimizer"):
        go("other", init__run=str(first), init__optimizer=True, optim__name="lion")


def test_a_tokenizer_run_starts_from_another(recipe, tmp_path):
    losses = []
    for name, init in (("first", None), ("again", str(tmp_path / "first"))):
        sections = recipe("tokenize") | {"train": {"workers": 0, "log_every": "1 steps"}, "init": {"run": init}}
        sections["optim"] |= {"lr": 1e-9}
        (tmp_path / f"{name}.yaml").write_text(to_yaml(sections))
        train.main(str(tmp_path / f"{name}.yaml"), [f"train.run={tmp_path / name}", f"optim.seed={len(losses)}"])
        losses.append(checkpoint.read_tensors(checkpoint.newest(tmp_path / name), ("model.",)))
    different = [n for n, t in losses[0].items() if not torch.allclose(losses[1][n].float(), t.float(), atol=1e-6)]
    assert different == ["model.counts"]  # the codes of the new run's own steps


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"init__run": "runs/nowhere"}, "runs/nowhere is not a run directory"),
        ({"init__optimizer": True}, "init.optimizer=true takes the optimizer of init.run, which is not set"),
        ({"init__run": "runs/a", "encoder__init": "b.pth"}, "both give the first weights; keep one of them"),
        ({"optim__freeze_encoder": "2 steps"}, "optim.freeze_encoder='2 steps' is 2 steps, but the run has 2"),
    ],
)
def test_a_beginning_that_cannot_be_is_refused(go, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        go("run", **changes)


def test_a_frozen_encoder_keeps_its_weights_until_its_time_and_the_decoder_learns(go, first):
    before = checkpoint.read_tensors(checkpoint.newest(first), ("model.",))
    changes = {"encoder__init": str(first), "optim__freeze_encoder": "2 steps", "optim__length": "4 steps",
               "optim__layer_decay": 0.8, "train__save_every": "2 steps"}  # fmt: skip
    again = go("again", **changes)
    for step, moved in ((2, False), (4, True)):
        after = checkpoint.read_tensors(again / f"checkpoints/step-{step:08d}", ("model.",))
        inside = [n for n in before if n.startswith("model.encoder.")]
        assert any(not after[n].equal(before[n]) for n in inside) == moved
    assert not after["model.decoder_pred.weight"].equal(before["model.decoder_pred.weight"])


def test_a_loaded_run_needs_no_source_any_more(go, tmp_path):
    first = go("first")
    again = go("again", encoder__init=str(first))
    first.rename(tmp_path / "gone")
    assert build.load_run(again).encoder is not None


def test_the_recipe_of_a_continuation_starts_and_says_what_became_of_every_tensor(shards, tmp_path, capsys):
    encoder = encoder_of()
    torch.save({"model": encoder.vit.state_dict()}, tmp_path / "vit.pth")
    overrides = [f"data.path={shards}", f"encoder.init={tmp_path / 'vit.pth'}", f"train.run={tmp_path / 'run'}"]
    assert train.main("continue_demo", overrides, dry_run=True) == stopping.DONE
    said = capsys.readouterr().err
    assert "positions 4x4 -> " in said
    assert not (tmp_path / "run").exists()


def test_a_dry_run_from_a_run_of_ours_reports_what_it_would_take(shards, first, tmp_path, capsys):
    overrides = [f"data.path={shards}", f"init.run={first}", f"train.run={tmp_path / 'run'}"]
    assert train.main("continue_demo", overrides, dry_run=True) == stopping.DONE
    assert "weights from" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_report_names_the_odd_ones_and_counts_the_rest():
    report = weights.Report("f.pth", "MAE", 12, loaded=["a"] * 9, unused=[f"u{i}" for i in range(8)])
    assert report.lines() == [
        "weights from f.pth (MAE): 9 of 12 tensors loaded, 0 resized, 0 neutral, 0 re-initialised; "
        "8 of the source unused",
        "  unused: u0, u1, u2, u3, u4, u5 and 2 more (init.json)",
    ]


def test_every_tensor_of_file_and_model_is_accounted_for(released, shards, recipe):
    file, state = released
    save_file(state | {"head.weight": torch.ones(3, 32)}, file)
    torch.manual_seed(0)
    sections = recipe("mae")
    sections["encoder"]["init"] = str(file)
    built = build.build(sections, dataset=Dataset.open(shards / "train"))
    report = weights.start(built, None, optimizer=False, resumed=False).report
    theirs = {*report.loaded, *report.resized, *report.unused}
    assert theirs >= state.keys() | {"head.weight"}
    own = [*report.loaded, *report.resized, *report.neutral, *report.reinitialised]
    inside = {n.replace("encoder.vit.", "") if "encoder" in n else f"mae.{n}" for n in built.objective.state_dict()}
    assert sorted(own) == sorted(inside)
    assert report.num_wanted == len(own)


def test_layouts_know_mae_s_positions_from_learned_ones():
    table = torch.cat([torch.zeros(1, 32), sincos_positions((4, 4), 32)]).unsqueeze(0)
    assert layouts.is_sincos(table, None)
    assert not layouts.is_sincos(table + 0.01, None)
    assert not layouts.is_sincos(table.roll(1, dims=1), None)


def test_the_tiny_recipe_and_the_published_one_differ_in_size_alone():
    tiny, full = (config.read(name) for name in ("continue_demo", "continue_mae_vitb16"))
    assert tiny.keys() == full.keys()
    assert tiny["optim"].keys() == full["optim"].keys()
