"""The folder of an export appears whole or not at all, and its report and card say what it is."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

from mim import __main__, build
from mim.config import ConfigError
from mim.contracts import ExportError, StorageError
from mim.exports import timm as timm_target
from mim.handover import export_folder
from mim.handover.export_folder import Terms, Written


def write(folder, difference=0.0):
    (folder / "weights.bin").write_bytes(b"123")
    return Written(difference, 1e-6, library="timm", usage="Open `{folder}` with {braces}.", tags=("timm",))


def export(loaded, out, write=write, **options):
    return export_folder.export_folder(loaded, out, target="thing", terms=Terms(**options), write=write)


@pytest.fixture
def loaded(loaded_run):
    return loaded_run("mae")


# ---- the place -----------------------------------------------------------------------------------


def test_a_folder_that_holds_something_is_not_touched(loaded, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="exists and is not empty; choose another folder"):
        export(loaded, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_file_in_the_place_of_the_folder_is_not_touched(loaded, tmp_path):
    (tmp_path / "out").write_text("keep")
    with pytest.raises(ConfigError, match="choose another folder"):
        export(loaded, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "keep"


def test_an_empty_folder_is_filled(loaded, tmp_path):
    (tmp_path / "out").mkdir()
    export(loaded, tmp_path / "out")
    assert (tmp_path / "out" / "weights.bin").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_folder_one_stands_in_is_not_replaced(loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in (Path(), tmp_path):
        with pytest.raises(
            ConfigError, match=r"is the folder you are in; name another one for the export, e\.g\. .*export"
        ):
            export(loaded, out)
    assert list(tmp_path.iterdir()) == []


def test_a_relative_folder_is_made_with_its_parents(loaded, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(loaded, Path("../a/b"))
    assert (tmp_path / "a" / "b" / "weights.bin").is_file()


def test_a_run_without_an_encoder_is_refused_before_anything_is_written(loaded_run, tmp_path):
    with pytest.raises(ConfigError, match="has no backbone to export"):
        export(loaded_run("tokenize"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_nothing_under_the_name_and_the_next_export_clears_the_rest(loaded, tmp_path):
    script = f"""
        import os, signal
        from pathlib import Path
        from mim import __main__, build
        from mim.handover import export_folder
        with export_folder._aside(Path({str(tmp_path / "out")!r})) as folder:
            (folder / "half.bin").write_bytes(b"1")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.tmp"]
    export(loaded, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "half.bin").exists()


def test_a_full_disk_ends_in_one_sentence_and_leaves_nothing(loaded, tmp_path):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match=r"cannot be written .No space left on device.; choose another folder"):
        export(loaded, tmp_path / "out", full)
    assert list(tmp_path.iterdir()) == []


# ---- the check -----------------------------------------------------------------------------------


@pytest.mark.parametrize("difference", [2e-6, float("nan"), float("inf")])
def test_a_difference_above_the_tolerance_leaves_no_folder(difference, loaded, tmp_path):
    with pytest.raises(ExportError, match=r"export to thing differs from .*run by (2e-06|nan|inf), above 1e-06"):
        export(loaded, tmp_path / "out", lambda folder: write(folder, difference))
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_its_check_ends_the_command_in_one_sentence(loaded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "load_run", lambda path, step: loaded)
    monkeypatch.setattr(timm_target, "compare", lambda *arguments: 0.5)
    monkeypatch.setattr(sys, "argv", ["mim", "export", "timm", "run", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    assert stopped.value.code == 70
    error = capsys.readouterr().err
    assert error.startswith("mim: the export to timm differs from")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_largest_difference_is_over_all_tensors_and_keeps_what_is_not_a_number():
    zeros = [torch.zeros(2, 3), torch.zeros(2, 0)]
    assert export_folder.largest_difference(zeros, [torch.tensor([[0.0, 0, 0], [0, -2, 1]]), torch.zeros(2, 0)]) == 2
    broken = [torch.full((2, 3), float("nan")), torch.zeros(2, 0)]
    assert export_folder.largest_difference(broken, broken) != export_folder.largest_difference(broken, broken)


def test_tensors_of_another_shape_are_told_with_both_shapes():
    with pytest.raises(ExportError, match="returns tensors of 2x4 where the run has 2x3"):
        export_folder.largest_difference([torch.zeros(2, 3)], [torch.zeros(2, 4)])


def test_missing_and_unused_tensors_are_named():
    with pytest.raises(ExportError, match="1 tensors are missing from FILE: b;"):
        export_folder.check_names({"a", "b"}, {"a"}, where="FILE")
    with pytest.raises(ExportError, match="4 tensors are unused in FILE: b, c, d and 1 more;"):
        export_folder.check_names({"a"}, "abcde", where="FILE")


def test_the_fixed_batch_is_the_same_every_time_and_of_the_size_of_the_run(loaded):
    images = export_folder.fixed_batch(loaded)
    assert images.shape == (2, 3, 32, 32)
    assert 0 <= images.min() < images.max() <= 1
    assert torch.equal(images, export_folder.fixed_batch(loaded))


# ---- the report and the card ---------------------------------------------------------------------


def test_the_folder_tells_where_it_comes_from(loaded, tmp_path):
    report = export(loaded, tmp_path / "out", license="cc0-1.0")
    folder = tmp_path / "out"
    assert json.loads((folder / "report.json").read_text()) == report
    assert {key: report[key] for key in ("target", "run", "step", "weights", "max_difference", "tolerance")} == {
        "target": "thing",
        "run": str(loaded.path),
        "step": 7,
        "weights": "of the last step",
        "max_difference": 0.0,
        "tolerance": 1e-6,
    }
    assert report["license"] == "cc0-1.0"
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert json.loads((folder / "recipe.json").read_text())["encoder"]["width"] == 32


def test_the_report_holds_the_hash_of_every_other_file(loaded, tmp_path):
    report = export(loaded, tmp_path / "out")
    others = {path.name: path for path in (tmp_path / "out").iterdir() if path.name != "report.json"}
    assert set(others) == {"README.md", "recipe.json", "weights.bin"}
    assert report["files"] == {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in others.items()}


def test_averaged_weights_are_said_to_be_averaged(loaded, tmp_path):
    loaded.config["optim"]["ema"] = 0.99
    assert export(loaded, tmp_path / "out")["weights"] == "exponential moving average (0.99)"


def test_the_card_begins_with_what_the_hub_reads(loaded, tmp_path):
    export(loaded, tmp_path / "out", license="cc0-1.0")
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "timm"
    assert front["license"] == "cc0-1.0"
    assert {"timm", "mimstream", "mae"} <= set(front["tags"])


def test_the_card_tells_normalisation_use_and_unknown_licences(loaded, tmp_path):
    export(loaded, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Open `{tmp_path / 'out'}` with {{braces}}." in card
    assert str([round(v, 6) for v in loaded.encoder.mean.flatten().tolist()]) in card
    assert "Licence of these weights: unknown." in card
    assert "Initial weights: none, the run started afresh." in card
    assert "No evaluation is in the log" in card


def test_the_card_names_the_initial_weights_and_their_licence(loaded, tmp_path):
    loaded.path.mkdir()
    (loaded.path / "init.json").write_text(json.dumps({"source": "mae_vit.pth", "family": "MAE"}))
    report = export(loaded, tmp_path / "out", initial_license="cc-by-nc-4.0")
    assert report["initial_weights"] == ["mae_vit.pth (MAE)"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Initial weights: mae_vit.pth (MAE); their licence: cc-by-nc-4.0." in card


def test_initial_weights_are_followed_through_the_parents_of_a_run(loaded, tmp_path):
    parent = tmp_path / "first"
    parent.mkdir()
    (parent / "config.yaml").write_text("format: 1\n")
    (parent / "init.json").write_text(json.dumps({"source": "mae_vit.pth", "family": "MAE"}))
    loaded.config["parent"] = {"run": str(parent), "step": 3, "experiment": "x"}
    assert export(loaded, tmp_path / "out")["initial_weights"] == ["run first at step 3", "mae_vit.pth (MAE)"]


def test_a_parent_that_is_gone_is_said_to_be_unknown(loaded, tmp_path):
    loaded.config["parent"] = {"run": str(tmp_path / "gone"), "step": 3, "experiment": "x"}
    found = export(loaded, tmp_path / "out")["initial_weights"]
    assert found == ["run gone at step 3", "weights that are not known here"]


def test_the_card_has_the_last_result_of_every_evaluation_up_to_the_step(loaded, tmp_path):
    loaded.path.mkdir()
    entries = [
        {"event": "eval", "step": 3, "eval": "knn", "knn": 0.25},
        {"event": "eval", "step": 6, "eval": "knn", "knn": 0.5},
        {"event": "train", "step": 6, "loss": 1.0},
        {"event": "eval", "step": 6, "eval": "reconstruction", "reconstruction": "picture.png"},
        {"event": "eval", "step": 9, "eval": "knn", "knn": 0.75},
    ]
    (loaded.path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"event"')
    export(loaded, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- knn: knn 0.5 (step 6" in card
    assert "0.75" not in card
    assert "picture" not in card
