"""Two processes give the losses of one, launched as users launch them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mim import build, config, optim
from mim.evals import accuracy
from mim.exports import timm as exports
from mim.saving import checkpoint
from tests import damage
from tests.test_train import dataset, lines, recipe, run, tensors  # noqa: F401  (dataset is a fixture)

ROOT = Path(__file__).parent.parent


def launch(*module: str, ranks: int = 2) -> subprocess.CompletedProcess:
    """Run a module with its arguments on so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *module], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def torchrun(path: str, folder: Path, *overrides: str, ranks: int = 2) -> subprocess.CompletedProcess:
    return launch("mim", "train", path, f"train.run={folder}", "train.cpu=true", *overrides, ranks=ranks)


@pytest.mark.parametrize("kind", ["mae", "dvae", "vqkd"])
def test_two_processes_give_the_losses_of_one(dataset, tmp_path, kind):  # noqa: F811
    changes = {"encoder__drop_path_rate": 0.0} if kind == "mae" else {}
    path = recipe(dataset, tmp_path, kind, **changes)
    run(path, tmp_path / "one")
    launched = torchrun(path, tmp_path / "two")
    assert launched.returncode == 0, launched.stderr
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [entry["fingerprint"] for entry in two] == [entry["fingerprint"] for entry in one]
    for name in ("loss", "grad_norm", *(["perplexity", "usage"] if kind != "mae" else [])):
        assert [entry[name] for entry in two] == pytest.approx([entry[name] for entry in one], abs=1e-5), name


def test_a_run_of_two_processes_resumes_on_one_and_back(dataset, tmp_path):  # noqa: F811
    """With 7 images a step over 2 ranks the shares differ, so padding is at work too."""
    path = recipe(dataset, tmp_path, encoder__drop_path_rate=0.0, optim__batch_size=7)
    run(path, tmp_path / "one")
    run(path, tmp_path / "mixed", stop_at=3)
    assert torchrun(path, tmp_path / "mixed", "train.trackers=[tensorboard]").returncode == 0
    told = [json.loads(line) for line in (tmp_path / "mixed/log.jsonl").read_text().splitlines()]
    told = [(e["step"], e["saved_by_ranks"], e["ranks"]) for e in told if e["event"] == "resumed"]
    assert told == [(3, 1, 2)]
    assert len(list((tmp_path / "mixed/trackers/tensorboard").glob("events.*"))) == 1  # of the main rank alone
    assert lines(tmp_path / "mixed")[-1]["loss"] == pytest.approx(lines(tmp_path / "one")[-1]["loss"], abs=1e-5)
    one, mixed = tensors(tmp_path / "one"), tensors(tmp_path / "mixed")
    assert one.keys() == mixed.keys()
    for name, value in one.items():
        if not name.endswith("qkv.bias"):  # the key bias has no gradient; Adam makes steps of its rounding noise
            assert mixed[name].float().allclose(value.float(), atol=1e-5), name


@pytest.mark.parametrize("key", ["init.run", "encoder.init"])
def test_two_processes_start_from_a_run_as_one_does(dataset, tmp_path, key):  # noqa: F811
    """One process reads the weights while the other waits for it, so reading must not wait for the other."""
    path = recipe(dataset, tmp_path, encoder__drop_path_rate=0.0, optim__length="2 steps", train__log_every="1 steps")
    run(path, tmp_path / "parent")
    start = f"{key}={tmp_path / 'parent'}"
    run(path, tmp_path / "one", start)
    launched = torchrun(path, tmp_path / "two", start)
    assert launched.returncode == 0, launched.stderr
    losses = ([entry["loss"] for entry in lines(tmp_path / name)] for name in ("one", "two"))
    assert next(losses) == pytest.approx(next(losses), abs=1e-5)


def test_the_average_of_a_run_of_two_processes_is_exported_under_the_names_of_timm(dataset, tmp_path):  # noqa: F811
    path = recipe(dataset, tmp_path, optim__ema=0.9)
    launched = torchrun(path, tmp_path / "two")
    assert launched.returncode == 0, launched.stderr
    report = exports.export(build.load_run(tmp_path / "two"), tmp_path / "out", exports.Config())
    assert report["max_difference"] == 0.0
    assert report["weights"] == "exponential moving average (0.9)"
    saved = tensors(tmp_path / "two")
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(saved.get(f"ema.encoder.vit.{name}", saved[f"model.encoder.vit.{name}"]), value), name


def test_evaluations_run_on_all_processes_and_are_told_by_the_first(dataset, tmp_path):  # noqa: F811
    path = recipe(dataset, tmp_path, encoder__drop_path_rate=0.0, data__val_path=str(dataset))
    evals = ["evals.knn.every=4 steps", "evals.knn.k=3", "evals.reconstruction.every=7 steps"]
    run(path, tmp_path / "one", *evals)
    launched = torchrun(path, tmp_path / "two", *evals)
    assert launched.returncode == 0, launched.stderr
    one, two = ([e for e in lines(tmp_path / name) if e["event"] == "eval"] for name in ("one", "two"))
    assert [(e["step"], e["eval"]) for e in one] == [(4, "knn"), (7, "knn"), (7, "reconstruction")]
    assert [(e["step"], e["eval"], e.get("knn")) for e in two] == [(e["step"], e["eval"], e.get("knn")) for e in one]
    assert launched.stderr.count("knn: knn") == 2
    assert launched.stderr.count("reconstruction: ") == 1
    assert [file.name for file in (tmp_path / "two/pictures").iterdir()] == ["reconstruction-00000007.png"]


def test_accuracy_in_the_loop_of_two_processes_is_that_of_one_on_the_saved_run(dataset, tmp_path):  # noqa: F811
    """Bit for bit: 6 batches of 4 are dealt to two ranks, and the weights are those of the last checkpoint.

    The encoder has BatchNorms, whose running statistics differ by rank: those of the first one count.
    """
    path = Path(recipe(dataset, tmp_path, data__val_path=str(dataset)))
    sections = config.read(str(path)) | {"objective": {"name": "classify", "head_std": 0.5}}
    options = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    sections["encoder"] = {"name": "dense", "model": "xcit_nano_12_p8_224", "options": options}
    sections["evals"] = {"accuracy": {"every": "7 steps", "batch_size": 4, "per_class": True}}
    sections.pop("mask")
    path.write_text(config.to_yaml(sections))
    launched = torchrun(str(path), tmp_path / "two")
    assert launched.returncode == 0, launched.stderr
    (logged,) = [e for e in lines(tmp_path / "two") if e["event"] == "eval"]
    alone = dict(accuracy.run(build.load_run(tmp_path / "two"), accuracy.Config(batch_size=4, per_class=True)))
    assert {name: logged[name] for name in alone} == alone
    assert alone["count"] == 23
    assert launched.stderr.count("accuracy: accuracy") == 1


def test_an_infinite_gradient_of_one_process_is_skipped_by_both():
    launched = launch("tests.one_bad_rank")
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.count("stayed and moved on both") == 2 * len(optim.BETAS)


def test_a_wrong_batch_size_is_one_sentence_on_two_processes(dataset, tmp_path):  # noqa: F811
    path = recipe(dataset, tmp_path)
    failed = torchrun(path, tmp_path / "run", "optim.batch_size=3", "train.micro_batches=2")
    assert "optim.batch_size=3 is smaller than 2 processes x 2 micro-batches; use at least 4" in failed.stderr
    assert not (tmp_path / "run").exists()
    assert failed.returncode == 1  # what torchrun makes of every failure


def test_bad_samples_that_any_process_meets_are_in_the_journal_and_the_stream_is_that_of_one(dataset, tmp_path):  # noqa: F811
    shutil.copytree(dataset, tmp_path / "damaged")
    bad = [2, 9, 17]
    damage.spoil_images(tmp_path / "damaged", bad)
    path = recipe(tmp_path / "damaged", tmp_path, encoder__drop_path_rate=0.0)
    run(path, tmp_path / "one")
    launched = torchrun(path, tmp_path / "two")
    assert launched.returncode == 0, launched.stderr
    journals = [(tmp_path / name / "journal.jsonl").read_text() for name in ("one", "two")]
    assert journals[0] == journals[1]
    assert {json.loads(line)["sample"] for line in journals[0].splitlines()} == set(bad)
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [entry["fingerprint"] for entry in two] == [entry["fingerprint"] for entry in one]
    assert two[-1]["num_bad"] == 3


def test_a_budget_stops_all_processes_at_one_saved_step_and_a_larger_one_goes_on(dataset, tmp_path):  # noqa: F811
    """Budget 0 stops at the first bad sample that any process meets; the other one stops with it."""
    shutil.copytree(dataset, tmp_path / "damaged")
    damage.spoil_images(tmp_path / "damaged", [2, 9, 17])
    path = recipe(tmp_path / "damaged", tmp_path, encoder__drop_path_rate=0.0)
    run(path, tmp_path / "one")
    refused = torchrun(path, tmp_path / "two", "data.bad_budget=0")
    assert refused.returncode != 0
    assert refused.stderr.count("more than the 0 that data.bad_budget=0 accepts") >= 2, refused.stderr  # both say so
    status = json.loads((tmp_path / "two/status.json").read_text())
    saved = checkpoint.list_checkpoints(tmp_path / "two")
    assert (status["state"], status["step"]) == ("failed", checkpoint.step_of(saved[-1]))
    run(path, tmp_path / "two", "data.bad_budget=0.5")
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [entry["fingerprint"] for entry in two] == [entry["fingerprint"] for entry in one]
    assert [entry["loss"] for entry in two] == pytest.approx([entry["loss"] for entry in one], abs=1e-5)
    assert (tmp_path / "two/journal.jsonl").read_text() == (tmp_path / "one/journal.jsonl").read_text()
