"""A training that goes wrong returns to its last good checkpoint, and its log and state give account of it.

Batches are made bad by their position in the stream, as bad data is: 6 images a step, so step 5 ends at position 30.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_distributed import ROOT, torchrun
from test_train import assert_same, dataset, lines, recipe, scaled_losses, tensors  # noqa: F401  (dataset is a fixture)

from mim import guard, rollback, train
from mim.contracts import NumericsError, StorageError
from mim.data import mixture
from mim.data.order import key64
from mim.data.shards import Dataset
from mim.data.stream import FINGERPRINT_MODULUS
from mim.guard import Incident
from mim.saving import checkpoint, lease
from mim.saving.saver import Saver
from mim.watch import stopping

LENGTH, SAVED = 12, 3  # steps of the run, and between saves
CHANGES = {"optim__length": f"{LENGTH} steps", "train__log_every": "1 steps", "train__save_every": f"{SAVED} steps"}
GUARD = ("train.guard.bad_steps=2",)


def run(path: str, folder: Path, *overrides: str, stop=None) -> int:
    return train.main(path, [f"train.run={folder}", *GUARD, *overrides], stop=stop or (lambda step: False))


def spoil(monkeypatch, factor: float, positions) -> None:
    """Multiply the loss of the steps that end at these positions."""
    from mim.objectives.mae import MAE

    honest = MAE.forward

    def forward(self, batch, progress):
        out = honest(self, batch, progress)
        return {"loss": out["loss"] * factor} if self.training and batch["position"] in positions else out

    monkeypatch.setattr(MAE, "forward", forward)


def events(folder: Path, *names: str) -> list[dict]:
    return [entry for entry in lines(folder) if entry["event"] in names]


def state(folder: Path) -> dict:
    return json.loads((checkpoint.newest(folder) / "state.json").read_text())


@pytest.fixture
def path(dataset, tmp_path) -> str:  # noqa: F811
    return recipe(dataset, tmp_path, **CHANGES)


# ---- a single bad step ---------------------------------------------------------------------------


def test_an_infinite_gradient_is_skipped_and_the_run_continues(path, tmp_path, monkeypatch):
    spoil(monkeypatch, math.inf, [30])
    assert run(path, tmp_path / "run") == stopping.DONE
    assert events(tmp_path / "run", "skipped", "rollback", "failed") == [{"event": "skipped", "step": 5}]
    trained = events(tmp_path / "run", "train")
    assert [entry["step"] for entry in trained] == list(range(1, LENGTH + 1))
    assert [entry["step"] for entry in trained if "loss" not in entry] == [5]
    assert [entry["position"] for entry in trained] == [6 * entry["step"] for entry in trained]
    assert not (tmp_path / "run/incidents").exists()


@pytest.mark.parametrize("kind", ["mae", "dvae", "vqkd", "fsq"])
def test_a_step_on_images_that_are_not_numbers_changes_nothing_that_is_saved(dataset, tmp_path, monkeypatch, kind):  # noqa: F811
    honest = train.on_device

    def on_device(job, batch):
        batch = honest(job, batch)
        return {**batch, "images": batch["images"] * math.nan} if batch["position"] == 30 else batch

    monkeypatch.setattr(train, "on_device", on_device)
    path = recipe(dataset, tmp_path, kind, **CHANGES)
    assert run(path, tmp_path / "run", stop=lambda step: step == 4) == stopping.STOPPED
    before = tensors(tmp_path / "run")
    assert run(path, tmp_path / "run", stop=lambda step: step == 5) == stopping.STOPPED
    after = tensors(tmp_path / "run")
    assert state(tmp_path / "run")["step"] == 5
    assert before.keys() == after.keys()
    assert [name for name, value in before.items() if not value.equal(after[name])] == []
    assert [entry["step"] for entry in events(tmp_path / "run", "skipped")] == [5]


def test_a_skipped_step_is_left_out_of_the_means_of_its_interval(dataset, tmp_path, monkeypatch):  # noqa: F811
    path = recipe(dataset, tmp_path, **CHANGES | {"train__log_every": "3 steps"})
    spoil(monkeypatch, math.nan, [30])
    run(path, tmp_path / "run")
    (entry,) = (e for e in events(tmp_path / "run", "train") if e["step"] == 6)
    assert math.isfinite(entry["loss"])
    assert entry["skipped"] == pytest.approx(1 / 3)
    assert events(tmp_path / "run", "skipped") == [{"event": "skipped", "step": 5}]


# ---- rollbacks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rolled_back(dataset, tmp_path_factory) -> Path:  # noqa: F811
    """A run whose steps 5 and 6 are bad: it returns to step 3, leaves out 18 images and goes on to the end."""
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as monkeypatch:
        spoil(monkeypatch, math.nan, [30, 36])
        assert run(recipe(dataset, folder, **CHANGES), folder / "run") == stopping.DONE
    return folder / "run"


def test_repeated_bad_steps_roll_back_and_the_log_gives_account(rolled_back):
    expected = [
        {
            "event": "rollback", "step": 3, "rollback": 1, "found_at": 6, "first_bad": 5,
            "reason": "the gradient of 2 steps in a row is not finite", "report": "incidents/step-00000006.json",
        },
        {"event": "intervention", "step": 3, "rollback": 1, "skipped": 18, "rate_factor": 0.5},
    ]  # fmt: skip
    assert events(rolled_back, "skipped", "rollback", "intervention", "failed") == expected
    trained = events(rolled_back, "train")
    assert [entry["step"] for entry in trained] == list(range(1, LENGTH + 1))
    assert [entry["position"] for entry in trained] == [6, 12, 18, *(6 * step + 18 for step in range(4, LENGTH + 1))]
    assert [entry["epoch"] for entry in trained] == [entry["position"] / 23 for entry in trained]
    assert json.loads((rolled_back / "status.json").read_text())["state"] == "done"


def test_the_state_holds_the_intervention_and_the_position_that_follows_from_it(rolled_back):
    saved = state(rolled_back)
    assert saved["interventions"] == [{"step": 3, "skipped": 18, "rate_factor": 0.5}]
    assert saved["position"] == 6 * LENGTH + 18


def test_the_rate_is_halved_from_the_rollback_on(rolled_back, path, tmp_path):
    run(path, tmp_path / "healthy")
    healthy = [entry["lr"] for entry in events(tmp_path / "healthy", "train")]
    found = [entry["lr"] for entry in events(rolled_back, "train")]
    assert found == healthy[:3] + [lr / 2 for lr in healthy[3:]]


def test_what_is_left_out_is_not_used_and_the_rest_is_used_once(rolled_back, dataset):  # noqa: F811
    """The fingerprint of the run is that of positions 0 to 18 and of those from 36 on."""
    order = mixture.order_of(Dataset.open(dataset), seed=0, lanes=None, window=None, repeats=1)
    used = np.array([*range(18), *range(36, 6 * LENGTH + 18)])
    slots = order.locate(used)
    rows = zip(used, slots.sample, slots.epoch, slots.draw, strict=True)
    expected = sum(key64("row", *row) for row in rows) % FINGERPRINT_MODULUS
    assert state(rolled_back)["fingerprint"] == expected


def test_the_report_names_samples_positions_layers_and_the_lines_that_the_log_lost(rolled_back):
    report = json.loads((rolled_back / "incidents/step-00000006.json").read_text())
    assert report["intervention"] == {"step": 3, "skipped": 18, "rate_factor": 0.5}
    assert [step["step"] for step in report["steps"] if step["skipped"]] == [5, 6]
    last = report["steps"][-1]
    assert last["positions"] == [30, 36]
    assert last["grad_norm"] == "nan"
    assert len(last["keys"]) == 6
    assert all(".tar/" in key for key in last["keys"])
    weights = report["weights"]["encoder.vit.blocks.0.attn.qkv.weight"]
    assert weights["not_finite"] == 0
    assert weights["norm"] > weights["max"] > 0
    (replayed,) = report["last_micro_batch"]
    assert replayed["keys"] == last["keys"]
    assert replayed["outputs"]["encoder.vit.blocks.0.mlp.fc1"]["max"] > 0
    assert replayed["gradients"]["decoder_pred.weight"]["norm"] > 0
    assert [(entry["event"], entry["step"]) for entry in report["log"]] == [
        ("train", 4), ("skipped", 5), ("train", 5), ("skipped", 6), ("train", 6),
    ]  # fmt: skip


@pytest.mark.parametrize("stop_at", [4, 6, 9, 11])
def test_a_run_stopped_after_a_rollback_and_rerun_equals_one_never_stopped(
    rolled_back, path, tmp_path, monkeypatch, stop_at
):
    spoil(monkeypatch, math.nan, [30, 36])
    asked = []

    def stop(step):
        asked.append(step)
        return asked.count(stop_at) == (2 if stop_at < 6 else 1)

    assert run(path, tmp_path / "run", stop=stop) == stopping.STOPPED
    assert run(path, tmp_path / "run") == stopping.DONE
    assert_same(tmp_path / "run", rolled_back)


def test_a_run_killed_before_it_saved_anything_after_a_rollback_comes_to_the_same_end(
    rolled_back, path, tmp_path, monkeypatch
):
    spoil(monkeypatch, math.nan, [30, 36])
    asked = []

    def power_cut(step):
        asked.append(step)
        if asked.count(5) == 2:
            raise ZeroDivisionError
        return False

    with pytest.raises(ZeroDivisionError):
        run(path, tmp_path / "run", stop=power_cut)
    assert len(events(tmp_path / "run", "rollback")) == 1
    assert run(path, tmp_path / "run") == stopping.DONE
    assert_same(tmp_path / "run", rolled_back)


def test_a_checkpoint_of_a_bad_step_is_not_returned_to_and_is_deleted(path, tmp_path, monkeypatch):
    spoil(monkeypatch, math.nan, [36, 42])
    assert run(path, tmp_path / "run", stop=lambda step: step == 6) == stopping.STOPPED  # saves a step that was skipped
    assert [folder.name for folder in checkpoint.list_checkpoints(tmp_path / "run")] == [
        "step-00000003",
        "step-00000006",
    ]
    assert run(path, tmp_path / "run", stop=lambda step: step == 4) == stopping.STOPPED
    assert events(tmp_path / "run", "rollback")[0]["step"] == 3
    assert [folder.name for folder in checkpoint.list_checkpoints(tmp_path / "run")] == [
        "step-00000003",
        "step-00000004",
    ]


def test_a_spike_of_the_loss_rolls_back(path, tmp_path, monkeypatch):
    spoil(monkeypatch, 1000.0, [48])
    assert run(path, tmp_path / "run", "train.guard.window=3") == stopping.DONE
    (told,) = events(tmp_path / "run", "rollback")
    assert (told["step"], told["found_at"], told["first_bad"]) == (6, 8, 8)
    assert told["reason"].startswith("the loss is ")
    assert events(tmp_path / "run", "train")[-1]["position"] == 6 * LENGTH + 12


def test_a_rollback_restores_the_scale_of_scaled_losses(path, tmp_path, monkeypatch):
    """The search for a scale may skip 16 steps, here none."""
    made = scaled_losses(monkeypatch, growth_interval=100)
    monkeypatch.setattr(guard, "SCALE_SEARCH", 0)
    spoil(monkeypatch, math.inf, [30, 36])
    assert run(path, tmp_path / "run") == stopping.DONE
    assert [entry["step"] for entry in events(tmp_path / "run", "rollback")] == [3]
    assert made[-1].get_scale() == 8.0  # two skipped steps had made it 2


def test_the_fourth_incident_stops_the_run_with_a_report(path, tmp_path, monkeypatch):
    spoil(monkeypatch, math.nan, range(30, 10_000))
    with pytest.raises(NumericsError) as error:
        run(path, tmp_path / "run")
    said = str(error.value)
    assert said.startswith("step 5: the gradient of 2 steps in a row is not finite, and 3 returns to a checkpoint did")
    assert "optim.lr" in said
    assert len(events(tmp_path / "run", "rollback")) == 3
    assert events(tmp_path / "run", "failed")[-1]["step"] == 5
    ended = json.loads((tmp_path / "run/status.json").read_text())
    assert (ended["state"], ended["step"], ended["reason"]) == ("failed", 3, said)  # the newest that was saved
    reports = sorted(file.name for file in (tmp_path / "run/incidents").iterdir())
    assert reports == ["step-00000005-2.json", "step-00000005-3.json", "step-00000005-4.json", "step-00000006.json"]
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "run")) == 3
    last = json.loads((tmp_path / "run/incidents/step-00000005-4.json").read_text())
    assert [one["rate_factor"] for one in last["interventions"]] == [0.5] * 3
    assert last["intervention"] is None


def test_without_a_checkpoint_to_return_to_the_run_stops_and_says_so(path, tmp_path, monkeypatch):
    spoil(monkeypatch, math.nan, [6, 12])
    with pytest.raises(NumericsError, match="there is no valid checkpoint of a step before 1 to return to"):
        run(path, tmp_path / "run")


def test_a_run_directory_that_another_job_took_over_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    with lease.hold(tmp_path / "run") as held:
        saver = Saver(tmp_path / "run", held, keep=2)
        rollback.check_lease(saver)
        held.token = "another"
        with pytest.raises(StorageError, match="was taken over"):
            rollback.check_lease(saver)


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(path, tmp_path):
    run(path, tmp_path / "run", stop=lambda step: step == 8)
    state_file = tmp_path / "run/checkpoints/step-00000006/state.json"
    assert rollback.last_good(tmp_path / "run", Incident(9, 8, ""), torch.device("cpu")).name == "step-00000006"
    state_file.write_text(state_file.read_text() + " ")
    assert (
        rollback.last_good(tmp_path / "run", Incident(9, 8, ""), torch.device("cpu")) is None
    )  # the older one was pruned


def test_summaries_count_what_is_not_finite_and_measure_the_rest():
    found = rollback.summaries({"a": torch.tensor([3.0, math.nan, -4.0, math.inf]), "none": torch.empty(0)})
    assert found == {
        "a": {"shape": [4], "norm": 5.0, "max": 4.0, "not_finite": 2},
        "none": {"shape": [0], "norm": 0.0, "max": 0.0, "not_finite": 0},
    }


# ---- two processes -------------------------------------------------------------------------------

PLUG_IN = """
import math

import torch.distributed as dist
from mim.objectives import mae

Config = mae.Config


class OneRankGoesWrong(mae.MAE):
    def forward(self, batch, progress):
        out = super().forward(batch, progress)
        bad = self.training and dist.get_rank() == 1 and batch["position"] in (30, 36)
        return {"loss": out["loss"] * math.nan} if bad else out


def build(encoder, cfg):
    return OneRankGoesWrong(encoder, cfg)
"""


def test_two_processes_roll_back_together_when_the_gradient_of_one_is_bad(dataset, tmp_path, monkeypatch, rolled_back):  # noqa: F811
    (tmp_path / "unlucky").mkdir()
    (tmp_path / "unlucky/second.py").write_text(PLUG_IN)
    (tmp_path / "unlucky/__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    path = recipe(dataset, tmp_path, **CHANGES, objective__name="unlucky.second")
    launched = torchrun(path, tmp_path / "two", *GUARD, "--plugin", "unlucky")
    assert launched.returncode == 0, launched.stderr
    names = ("skipped", "rollback", "intervention")
    assert events(tmp_path / "two", *names) == events(rolled_back, *names)
    one, two = events(rolled_back, "train"), events(tmp_path / "two", "train")
    assert [entry["fingerprint"] for entry in two] == [entry["fingerprint"] for entry in one]
    assert [entry["lr"] for entry in two] == [entry["lr"] for entry in one]
    report = json.loads((tmp_path / "two/incidents/step-00000006.json").read_text())
    assert [found["rank"] for found in report["last_micro_batch"]] == [0, 1]
    assert len(report["steps"][-1]["keys"]) == 6
    assert launched.stderr.count("rollback 1 of 3") == 1


def test_a_second_return_to_before_the_first_leaves_every_image_out_once(dataset, tmp_path, monkeypatch):  # noqa: F811
    """Saves that lie between log steps: the first return is to step 18, the second one, found by a log, to 15."""
    changes = {"optim__length": "24 steps", "train__log_every": "5 steps", "train__keep": 4}
    path = recipe(dataset, tmp_path, **CHANGES | changes)
    spoil(monkeypatch, math.nan, [114, 120])
    spoil(monkeypatch, 1000.0, [126])
    assert run(path, tmp_path / "run", "train.guard.window=3") == stopping.DONE
    assert [(told["step"], told["rollback"]) for told in events(tmp_path / "run", "rollback")] == [(15, 2)]
    assert [(one["step"], one["skipped"]) for one in state(tmp_path / "run")["interventions"]] == [(15, 12), (15, 30)]
    assert events(tmp_path / "run", "train")[-1]["position"] == 24 * 6 + 12 + 30
    stopped = run(path, tmp_path / "again", "train.guard.window=3", stop=lambda step: step == 22)
    assert stopped == stopping.STOPPED
    assert run(path, tmp_path / "again", "train.guard.window=3") == stopping.DONE
    assert_same(tmp_path / "again", tmp_path / "run")


def test_a_pinned_checkpoint_outlives_a_return_to_before_it_without_its_name(tmp_path, capsys):
    for step in (3, 6, 9):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000009/PINNED").touch()
    rollback.forget(tmp_path, 3)
    assert [checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(tmp_path)] == [3]
    (left,) = (tmp_path / "checkpoints").glob("left-*")
    assert left.name.startswith("left-step-00000009-")
    assert f"it stays as {left}, and no resume takes it" in capsys.readouterr().err
