"""The loop: stopping at any step and rerunning changes nothing, whatever the number of workers or micro-batches."""

import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from mim import build, train
from mim.config import ConfigError, to_yaml
from mim.contracts import StorageError
from mim.data.make import make
from mim.saving import checkpoint, lease, save_stages
from mim.watch import stopping

STEPS = 7
TOKENIZERS = {
    "dvae": {"num_codes": 16, "width": 8, "num_groups": 3, "blocks_per_group": 1, "n_init": 8},
    "vqkd": {"target": "pixels", "network": "conv", "stride": 4, "width": 8, "depth": 1, "decoder_width": 8,
             "num_codes": 16, "code_width": 4, "decay": 0.5, "dead_below": 0.5},
    "fsq": {"target": "pixels", "network": "conv", "stride": 4, "width": 8, "depth": 1, "decoder_width": 8,
            "levels": [4, 4]},
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """23 labelled images in uneven shards: batches of 6 straddle epochs."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(23):
        path = root / f"class{i % 2}" / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((5, 5, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    out = tmp_path_factory.mktemp("shards") / "dataset"
    make(root, out, labels_from_folders=True, shard_size=5, workers=1)
    return out


def recipe(dataset: Path, folder: Path, kind: str = "mae", **changes) -> str:
    """Write a tiny recipe and return its path."""
    sections = {
        "data": {"path": str(dataset), "image_size": 16, "view": {"name": "crop"}},
        "mask": {"name": "random", "ratio": 0.75},
        "encoder": {"name": "vit", "model": "vit_tiny_patch16_224", "width": 24, "depth": 2, "num_heads": 2,
                    "patch_size": 4, "layer_scale": 0.1, "drop_path_rate": 0.2},
        "objective": {"name": "mae", "decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2},
        "optim": {"batch_size": 6, "length": f"{STEPS} steps", "warmup": "2 steps", "lr": 3e-3, "ema": 0.9,
                  "clip_grad": 1.0, "weight_decay_end": 0.2},
        "train": {"log_every": "2 steps", "save_every": "3 steps", "workers": 0},
    }  # fmt: skip
    if kind in TOKENIZERS:
        sections = {key: sections[key] for key in ("data", "optim", "train")}
        sections |= {"tokenizer": {"name": kind, **TOKENIZERS[kind]}, "objective": {"name": "tokenize"}}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        sections[section][name] = value
    path = folder / f"{kind}.yaml"
    path.write_text(to_yaml(sections))
    return str(path)


def run(path: str, folder: Path, *overrides: str, stop_at: int | None = None) -> int:
    stop = (lambda step: step == stop_at) if stop_at is not None else None
    return train.main(path, [f"train.run={folder}", *overrides], stop=stop)


def lines(folder: Path) -> list[dict]:
    """Log lines without what depends on the clock, and without those that tell of a start."""
    timing = ("images_per_s", "data_wait", "eta_s")
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    kept = [entry for entry in entries if entry["event"] not in ("resumed", "restarted")]
    return [{key: value for key, value in entry.items() if key not in timing} for entry in kept]


def tensors(folder: Path) -> dict:
    """Weights, average and optimizer of the newest checkpoint."""
    return tensors_of(checkpoint.newest(folder))


def tensors_of(checkpoint_folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted((checkpoint_folder / "tensors").glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same(folder: Path, reference: Path) -> None:
    assert lines(folder) == lines(reference)
    mine, theirs = tensors(folder), tensors(reference)
    assert mine.keys() == theirs.keys()
    assert any(name.startswith("optimizer.") for name in mine)
    assert any(name.startswith("ema.") for name in mine)
    for name, value in theirs.items():
        assert mine[name].equal(value), name


@pytest.fixture(scope="module")
def uninterrupted(dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    assert run(recipe(dataset, folder), folder / "run") == stopping.DONE
    return folder / "run"


@pytest.mark.parametrize("stop_at", range(1, STEPS))
def test_a_run_stopped_at_any_step_and_rerun_equals_one_never_stopped(dataset, tmp_path, uninterrupted, stop_at):
    path = recipe(dataset, tmp_path)
    assert run(path, tmp_path / "run", stop_at=stop_at) == stopping.STOPPED
    assert run(path, tmp_path / "run") == stopping.DONE
    assert_same(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("kind", ["fsq", "vqkd"])
def test_what_training_moves_beside_the_weights_is_averaged_with_them(dataset, tmp_path, kind):
    path = recipe(dataset, tmp_path, kind, train__save_every="1 steps")
    assert run(path, tmp_path / "run", stop_at=3) == stopping.STOPPED
    before, after = (tensors_of(folder) for folder in checkpoint.list_checkpoints(tmp_path / "run"))
    moved = [name for name, value in after.items() if name.startswith("ema.") and not value.equal(before[name])]
    buffers = {name for name, _ in build.load_run(tmp_path / "run").objective.named_buffers()}
    assert buffers & {name.removeprefix("ema.") for name in moved}
    for name in moved:
        present = after[name.replace("ema.", "model.", 1)]
        torch.testing.assert_close(after[name], before[name].lerp(present, 0.1))
    opened = build.load_run(tmp_path / "run").objective.state_dict()
    assert all(opened[name.removeprefix("ema.")].equal(after[name]) for name in moved)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing_even_at_a_resume(dataset, tmp_path, uninterrupted, workers):
    path = recipe(dataset, tmp_path)
    assert run(path, tmp_path / "run", f"train.workers={workers}", stop_at=3) == stopping.STOPPED
    assert run(path, tmp_path / "run", "train.workers=1") == stopping.DONE
    assert_same(tmp_path / "run", uninterrupted)


def test_a_run_with_gradient_accumulation_resumes_bit_for_bit(dataset, tmp_path):
    path = recipe(dataset, tmp_path, train__micro_batches=2)
    run(path, tmp_path / "whole")
    run(path, tmp_path / "stopped", stop_at=5)
    run(path, tmp_path / "stopped")
    assert_same(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("kind", ["mae", "vqkd"])
def test_accumulation_gives_the_losses_of_one_batch(dataset, tmp_path, kind):
    path = recipe(dataset, tmp_path, kind, **({"encoder__drop_path_rate": 0.0} if kind == "mae" else {}))
    for micro_batches in (1, 2, 3):
        run(path, tmp_path / str(micro_batches), f"train.micro_batches={micro_batches}")
    whole = [entry["loss"] for entry in lines(tmp_path / "1")]
    for micro_batches in (2, 3):
        assert [e["loss"] for e in lines(tmp_path / str(micro_batches))] == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_run_resumes_bit_for_bit_with_its_code_statistics(dataset, tmp_path, kind):
    path = recipe(dataset, tmp_path, kind)
    run(path, tmp_path / "whole")
    run(path, tmp_path / "stopped", stop_at=5)
    run(path, tmp_path / "stopped")
    assert_same(tmp_path / "stopped", tmp_path / "whole")
    assert "perplexity" in lines(tmp_path / "whole")[-1]


@pytest.mark.parametrize("name", ["lamb", "lars", "lion", "muon"])  # adamw everywhere else
def test_a_run_of_any_optimizer_resumes_bit_for_bit(dataset, tmp_path, name):
    path = recipe(dataset, tmp_path, optim__name=name, optim__layer_decay=0.75)
    run(path, tmp_path / "whole")
    run(path, tmp_path / "stopped", stop_at=5)
    run(path, tmp_path / "stopped")
    assert_same(tmp_path / "stopped", tmp_path / "whole")
    assert not lines(tmp_path / "whole")[-1]["skipped"]


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars", "lion", "muon"])
def test_a_run_whose_first_steps_were_skipped_resumes_as_if_never_stopped(dataset, tmp_path, monkeypatch, name):
    """Nothing has made the optimizer's state then but the start of the run."""
    from mim.objectives.mae import MAE

    honest = MAE.forward

    def poisoned(self, batch, progress):
        out = honest(self, batch, progress)
        return {"loss": out["loss"] * torch.where(progress * STEPS < 1.5, torch.inf, 1.0)}

    monkeypatch.setattr(MAE, "forward", poisoned)
    path = recipe(dataset, tmp_path, optim__name=name, train__log_every="1 steps")
    run(path, tmp_path / "whole")
    run(path, tmp_path / "stopped", stop_at=2)
    moments = {name: value for name, value in tensors(tmp_path / "stopped").items() if name.startswith("optimizer.")}
    assert moments
    assert not any(value.any() for value in moments.values())
    run(path, tmp_path / "stopped")
    assert_same(tmp_path / "stopped", tmp_path / "whole")
    told = lines(tmp_path / "whole")
    assert [entry["skipped"] for entry in told if entry["event"] == "train"] == [1, 1, 0, 0, 0, 0, 0]
    assert [entry["step"] for entry in told if entry["event"] == "skipped"] == [1, 2]


def scaled_losses(monkeypatch, *, growth_interval: int) -> list:
    """Give each run what fp16 has, on a CPU: accelerate's scaler, doubling its scale so often. Returns the scalers."""
    made: list = []
    honest = Accelerator.__init__

    def scaled(self, *args, **options):
        honest(self, *args, **options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=growth_interval)
        self.native_amp = True
        made.append(self.scaler)

    monkeypatch.setattr(Accelerator, "__init__", scaled)
    return made


def test_a_run_with_scaled_losses_resumes_with_its_scale(dataset, tmp_path, monkeypatch):
    made = scaled_losses(monkeypatch, growth_interval=2)
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    path = recipe(dataset, tmp_path, train__log_every="1 steps")
    run(path, tmp_path / "whole")
    run(path, tmp_path / "stopped", stop_at=5)
    run(path, tmp_path / "stopped")
    assert [scaler.get_scale() for scaler in made] == [64.0, 32.0, 64.0]
    assert_same(tmp_path / "stopped", tmp_path / "whole")


def test_a_killed_run_falls_back_to_its_newest_valid_checkpoint_and_says_why(dataset, tmp_path, uninterrupted, capsys):
    path = recipe(dataset, tmp_path)
    run(path, tmp_path / "run", stop_at=5)
    shard = next((tmp_path / "run/checkpoints/step-00000005/tensors").glob("*.safetensors"))
    damaged = bytearray(shard.read_bytes())
    damaged[-3] ^= 4
    shard.write_bytes(damaged)
    capsys.readouterr()
    run(path, tmp_path / "run")
    said = capsys.readouterr().err
    assert "step-00000005 is rejected" in said
    assert "does not match its hash" in said
    assert "resumed at step 3" in said
    assert_same(tmp_path / "run", uninterrupted)


def test_a_finished_run_that_is_rerun_only_says_so(dataset, tmp_path, uninterrupted):
    path = recipe(dataset, tmp_path)
    run(path, tmp_path / "run")
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    assert run(path, tmp_path / "run") == stopping.DONE
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"


def test_another_experiment_in_the_same_run_directory_is_refused_with_a_diff(dataset, tmp_path):
    path = recipe(dataset, tmp_path)
    run(path, tmp_path / "run", stop_at=2)
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.003 -> 0\.1"):
        run(path, tmp_path / "run", "optim.lr=0.1")


def test_the_machine_may_change_between_runs(dataset, tmp_path):
    path = recipe(dataset, tmp_path)
    run(path, tmp_path / "run", stop_at=2)
    assert run(path, tmp_path / "run", "train.log_every=3 steps", "train.micro_batches=2") == stopping.DONE


def test_a_dry_run_writes_nothing(dataset, tmp_path, capsys):
    assert train.main(recipe(dataset, tmp_path), [f"train.run={tmp_path / 'run'}"], dry_run=True) == stopping.DONE
    assert not (tmp_path / "run").exists()
    said = capsys.readouterr().err
    assert "1 epoch = 23 images = 3.8 steps; run = 7 steps" in said
    assert "order: a full permutation of 23 images per epoch; a batch draws from " in said


def test_a_folder_with_other_files_is_not_taken_for_a_run_directory(dataset, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="other files"):
        run(recipe(dataset, tmp_path), tmp_path / "run")


def test_a_non_finite_gradient_leaves_the_weights_alone_and_is_counted(dataset, tmp_path, monkeypatch):
    from mim.objectives.mae import MAE

    honest = MAE.forward
    calls = []

    def poisoned(self, batch, progress):
        out = honest(self, batch, progress)
        calls.append(None)
        return {"loss": out["loss"] * float("nan")} if len(calls) == STEPS else out

    monkeypatch.setattr(MAE, "forward", poisoned)
    path = recipe(dataset, tmp_path, train__log_every="1 steps")
    run(path, tmp_path / "run", stop_at=STEPS - 1)
    before = tensors(tmp_path / "run")
    run(path, tmp_path / "run")
    after = tensors(tmp_path / "run")
    assert all(after[name].equal(value) for name, value in before.items() if name.startswith(("model.", "optimizer.")))
    assert lines(tmp_path / "run")[-1]["skipped"] == 1.0


def test_evaluations_run_in_the_loop_and_leave_the_training_alone(dataset, tmp_path, uninterrupted):
    path = recipe(dataset, tmp_path)
    held_out = f"data.val_path={dataset}"
    evals = ["evals.knn.every=2 steps", "evals.knn.k=3", "evals.reconstruction.every=4 steps"]
    run(path, tmp_path / "run", held_out, *evals)
    logged = lines(tmp_path / "run")
    assert [e["step"] for e in logged if e.get("eval") == "knn"] == [2, 4, 6, 7]
    assert [e["step"] for e in logged if e.get("eval") == "reconstruction"] == [4, 7]
    assert Path(next(e for e in logged if e.get("eval") == "reconstruction")["reconstruction"]).is_file()
    assert [e for e in logged if e["event"] == "train"] == lines(uninterrupted)


def test_sigterm_to_the_whole_process_group_saves_and_stops_with_75(dataset, tmp_path):
    """What `timeout`, scancel and some launchers do: loader workers get the signal too."""
    path = recipe(dataset, tmp_path, optim__length="100000 steps", train__log_every="1 steps", train__workers=2)

    def launch():
        os.setsid()
        os._exit(run(path, tmp_path / "run"))

    process = multiprocessing.get_context("fork").Process(target=launch)
    process.start()
    log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and not (log.is_file() and len(log.read_text().splitlines()) > 3):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == stopping.STOPPED
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "stopped"
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "run")) == status["step"] > 3


def test_a_loop_that_waits_for_its_data_says_once_why(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mim.data.stages.MAX_WAIT", -1.0)  # any share is too much
    options = {"optim__length": "110 steps", "train__log_every": "50 steps", "train__save_every": "110 steps"}
    run(recipe(dataset, tmp_path, **options), tmp_path / "run")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("data: the loop waited")]
    assert len(said) == 1
    assert "of the last 50 steps. A worker makes" in said[0]


# ---- saves that fail, jobs that meet -------------------------------------------------------------


def full_disk(monkeypatch, saves: range) -> None:
    """Let the disk be full for some of the saves, counted from 1, as it would be in the middle of a file."""
    count = 0

    def reached(stage: str) -> None:
        nonlocal count
        count += stage == "begin"
        if stage == "within-tensors" and count in saves:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(save_stages, "reached", reached)


def test_a_run_goes_on_after_saves_that_fail_and_ends_with_the_same_weights(
    dataset, tmp_path, uninterrupted, monkeypatch
):
    full_disk(monkeypatch, range(1, 3))
    assert run(recipe(dataset, tmp_path), tmp_path / "run") == stopping.DONE
    told = [entry for entry in lines(tmp_path / "run") if entry["event"] == "save_failed"]
    assert [(entry["step"], entry["in_a_row"], entry["stops"]) for entry in told] == [(3, 1, False), (6, 2, False)]
    assert all("No space left on device" in entry["reason"] for entry in told)
    assert [entry for entry in lines(tmp_path / "run") if entry["event"] == "train"] == lines(uninterrupted)
    assert [folder.name for folder in checkpoint.list_checkpoints(tmp_path / "run")] == ["step-00000007"]
    assert all(value.equal(tensors(uninterrupted)[name]) for name, value in tensors(tmp_path / "run").items())


def test_one_failed_save_too_many_ends_the_run_and_the_same_command_goes_on_from_the_last_good_one(
    dataset, tmp_path, uninterrupted, monkeypatch
):
    path = recipe(dataset, tmp_path)
    full_disk(monkeypatch, range(2, 9))
    with pytest.raises(StorageError, match=r"step-00000006 was not saved: No space left.*run the same command"):
        run(path, tmp_path / "run", "train.failed_saves=0")
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 3)  # the newest that was saved
    assert "No space left on device" in status["reason"]
    monkeypatch.undo()
    assert run(path, tmp_path / "run") == stopping.DONE
    assert_same(tmp_path / "run", uninterrupted)


def test_a_second_job_on_a_run_directory_is_refused_and_the_first_goes_on(dataset, tmp_path):
    path = recipe(dataset, tmp_path)

    def second(step: int) -> bool:
        if step == 2:
            with pytest.raises(ConfigError, match=rf"is in use by process {os.getpid()} on "):
                run(path, tmp_path / "run")
        return False

    assert train.main(path, [f"train.run={tmp_path / 'run'}"], stop=second) == stopping.DONE
    assert not (tmp_path / "run/.lease.json").exists()


def test_a_dry_run_takes_no_lease(dataset, tmp_path):
    path = recipe(dataset, tmp_path)
    with lease.hold(tmp_path / "run"):
        assert train.main(path, [f"train.run={tmp_path / 'run'}"], dry_run=True) == stopping.DONE
